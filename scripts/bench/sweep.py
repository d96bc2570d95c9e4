"""Training steps and inference over many combinations, beside PyTorch; for `benchmark.py train` and `infer`."""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import jax

from bench.costs import forward_flops, train_flops
from bench.machine import machine, use_cpu_devices
from bench.steps import busy_fraction, compile_step, random_batch, step_figures
from bench.torch_resnet import torch_step
from gravlens_jax.errors import check, check_installed


@dataclass(frozen=True)
class Steps:
    """What to measure; options that take several values are all combined."""

    batch_size: tuple[int, ...] = (64,)  # images a step, over all devices
    image_size: tuple[int, ...] = (50,)  # pixels of the network's input, height and width
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)  # of activations
    devices: tuple[int, ...] = (1,)  # number of devices to use; a CPU is split into as many as needed
    warmup: int = 10  # steps before each measurement
    steps: int = 30  # steps of each measurement
    repeats: int = 3  # measurements of each combination, alternating with the peer's
    peer: Literal["torch"] | None = None  # time the same in PyTorch (pip install torch)
    profile: Path | None = None  # folder for a trace of a few steps, for Perfetto or TensorBoard

    def __post_init__(self):
        for name in ("batch_size", "image_size", "devices"):
            values = getattr(self, name)
            check(len(values) > 0 and min(values) > 0, f"{name}={values}: expected one positive number or more")
        for name, least in {"warmup": 0, "steps": 1, "repeats": 1}.items():
            check(getattr(self, name) >= least, f"{name}={getattr(self, name)}: expected at least {least}")
        check(len(self.dtype) > 0, "dtype is empty: expected float32, bfloat16 or both")


def sweep(train: bool, a: Steps, show: Callable[[str], None]) -> dict[str, Any]:
    """Measures training steps, or else inference; JAX and PyTorch each run in a process of their own.

    Args:
      train: as in `compile_step`.
      a: what to measure.
      show: receives each line of the table as soon as it is known.

    Returns:
      the rows of the table and the facts about this machine, for JSON.
    """
    if a.peer:
        check_installed(a.peer, "--peer", a.peer)
    context = get_context("spawn")
    many = max(a.devices)
    rows = []
    with ProcessPoolExecutor(1, context, use_cpu_devices, (many,)) as ours, ProcessPoolExecutor(1, context) as peer:
        here = ours.submit(machine, a.dtype).result()
        show(f"{here['device_kind']}; peaks: {here['peaks']}\n{HEADER}")
        for size, batch_size, dtype, devices in itertools.product(a.image_size, a.batch_size, a.dtype, a.devices):
            row: dict[str, Any] = {"image_size": size, "batch_size": batch_size, "dtype": dtype, "devices": devices}
            row |= ours.submit(_prepare, train, batch_size, size, dtype, devices).result()
            if a.peer:
                row["torch"] = peer.submit(_prepare_torch, train, batch_size, size, dtype).result()
            seconds, torch_seconds = [], []
            for _ in range(a.repeats):  # alternating, so that both see the same machine
                seconds += ours.submit(_time, a.warmup, a.steps).result()
                torch_seconds += peer.submit(_time, a.warmup, a.steps).result() if a.peer else []
            if train and devices == 1:
                row["busy_fraction"] = ours.submit(busy_fraction, batch_size, size, dtype, a.steps).result()
            row |= step_figures(seconds, batch_size, train_flops(size) if train else forward_flops(size)[0])
            row["accessed_gb_per_second"] = row["accessed_bytes"] / row["step_seconds"] / 1e9
            if a.peer:
                row["torch_images_per_second"] = batch_size / statistics.median(torch_seconds)
                row["ratio"] = row["images_per_second"] / row["torch_images_per_second"]
            rows.append(row)
            show(line(row, here["peaks"].get(dtype, {})))
        if a.profile is not None:
            ours.submit(_profile, a.profile).result()
            show(f"trace of the last row: {a.profile}")
    return {"benchmark": "train" if train else "infer", "rows": rows} | here


_current: dict[str, Any] = {}  # the step that this worker process has prepared


def _prepare(*arguments) -> dict[str, Any]:
    _current["run"], facts = compile_step(*arguments)
    return facts


def _prepare_torch(train: bool, batch_size: int, size: int, dtype: str) -> dict[str, Any]:
    _current["run"], facts = torch_step(train, random_batch(batch_size, size), dtype)
    return facts


def _time(warmup: int, steps: int) -> list[float]:
    return _current["run"](warmup, steps)


def _profile(folder: Path) -> None:
    with jax.profiler.trace(str(folder)):
        _time(0, 5)


HEADER = (
    f"{'size':>5}{'batch':>6} {'dtype':9}{'dev':>4}{'compile s':>10}{'copy ms':>8}{'step ms':>9}{'quartiles':>16}"
    f"{'images/s':>10}{'TFLOP/s':>9}{'of peak':>8}{'GB/s':>7}{'of peak':>8}{'MiB':>7}{'busy':>7}{'torch':>8}"
    f"{'ratio':>7}"
)


def line(row: dict[str, Any], peak: dict[str, float]) -> str:
    """Returns a row of `sweep` as a line of its table; `peak` is the result of `machine.peaks`."""

    def part(value, of):
        return f"{value / peak[of]:8.1%}" if peak else f"{'-':>8}"

    low, high = (1e3 * seconds for seconds in row["step_seconds_quartiles"])
    return (
        f"{row['image_size']:5}{row['batch_size']:6} {row['dtype']:9}{row['devices']:4}{row['compile_seconds']:10.1f}"
        f"{1e3 * row['transfer_seconds']:8.2f}{1e3 * row['step_seconds']:9.2f}{f'{low:.2f}-{high:.2f}':>16}"
        f"{row['images_per_second']:10,.0f}{row['tflops']:9.3f}{part(row['tflops'], 'tflops')}"
        f"{row['accessed_gb_per_second']:7.0f}{part(row['accessed_gb_per_second'], 'bandwidth')}"
        f"{row['memory_bytes'] / 2**20:7.0f}"
        + (f"{row['busy_fraction']:7.1%}" if "busy_fraction" in row else f"{'-':>7}")
        + (f"{row['torch_images_per_second']:8,.0f}{row['ratio']:7.2f}" if "ratio" in row else f"{'-':>8}{'-':>7}")
    )
