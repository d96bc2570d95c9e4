"""Measures how fast this machine is; one subcommand for each thing that is measured."""

import importlib.util
import itertools
import json
import os
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES, check
from gravlens_jax.measure import (
    busy_fraction,
    compile_step,
    forward_flops,
    peaks,
    random_batch,
    step_figures,
    train_flops,
)
from gravlens_jax.measure_input import READERS, measure_reader, write_files
from gravlens_jax.measure_simulation import lenstronomy_rates, measure_on_cores, our_rates
from gravlens_jax.peers import torch_step


def simulate(seconds: float = 4.0, repeats: int = 3, lenstronomy: bool = True) -> None:
    """Measures images per second of `ct1` with photon noise, on one core and on all, beside lenstronomy.

    Every measurement is a process of its own on the cores it may use, and the codes take turns; medians are printed, as
    a table and as a JSON line. Compilation is not counted. lenstronomy sees lenses of the same population, the same
    grid, sub-pixels and PSF; its strings are 100 point masses; on all cores it runs one process on each.

    Args:
        seconds: length of one measurement of one class.
        repeats: measurements of each figure.
        lenstronomy: whether to measure it (pip install lenstronomy).
    """
    check(hasattr(os, "sched_setaffinity"), "this benchmark pins processes to cores, which only Linux allows")
    cores = sorted(os.sched_getaffinity(0))
    functions = {"gravlens_jax": our_rates} | ({"lenstronomy": lenstronomy_rates} if lenstronomy else {})
    rates: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for code, function in functions.items():
            for used in (cores[:1], cores):
                groups = [used] if code == "gravlens_jax" else [[core] for core in used]
                rates.setdefault((code, len(used)), []).append(measure_on_cores(function, seconds, groups))
    names = (*CLASSES, "all")
    medians = {key: {k: float(np.median([r[k] for r in runs])) for k in names} for key, runs in rates.items()}
    print(f"{'images/s':28}" + "".join(f"{name:>10}" for name in names))
    for (code, n), values in medians.items():
        print(f"{code + f', {n} core' + 's' * (n > 1):28}" + "".join(f"{values[name]:10.1f}" for name in names))
    result = [{"code": code, "cores": n} | values for (code, n), values in medians.items()]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "simulate", "images_per_second": result} | versions))


def measure_input(
    images: int = 6_000,
    batch_size: int = 256,
    batches: int = 20,
    repeats: int = 3,
    peer: Literal["torch"] | None = None,
) -> None:
    """Measures opening and random batches of a packed file beside what others read, in processes of their own.

    The same images as the packed, memory-mapped npz, as the same file read by np.load, as a compressed npz, and with
    --peer torch as one .npy file each read by a DataLoader (the best of 0, 1 and as many workers as there are cores).
    Files are written to the folder for temporary files first, and are in the page cache when they are read.

    Args:
        images: number of images, 150 x 150 pixels.
        batch_size: images a batch.
        batches: batches of each measurement.
        repeats: measurements of each reader, in turn.
        peer: whether to measure the DataLoader (pip install torch).
    """
    check(Path("/proc/self/statm").exists(), "this benchmark reads its memory from /proc, which only Linux has")
    check(images >= batch_size, f"--images {images} do not fill a batch of {batch_size}; give more")
    _check_peer(peer)
    cases = [(reader, 0) for reader in READERS[:3]]
    if peer:
        cases += [(READERS[3], workers) for workers in sorted({0, 1, os.cpu_count() or 1})]
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), images, peer is not None)
        for _ in range(repeats):
            for reader, workers in cases:
                with ProcessPoolExecutor(1, context) as pool:
                    future = pool.submit(measure_reader, reader, Path(folder), batch_size, batches, workers)
                    results.setdefault((reader, workers), []).append(future.result())
    medians = {case: {k: float(np.median([run[k] for run in runs])) for k in runs[0]} for case, runs in results.items()}
    if peer:
        loaders = {case: values for case, values in medians.items() if case[0] == READERS[3]}
        best = max(loaders, key=lambda case: loaders[case]["batches_per_second"])
        medians = {case: values for case, values in medians.items() if case not in loaders or case == best}
    copy = peaks("float32")["bandwidth"] / 2 if jax.default_backend() == "cpu" else None
    print(f"{'':24}{'open ms':>10}{'MiB':>8}{'batches/s':>11}{'images/s':>10}{'GB/s':>7}{'MiB':>8}")
    for (reader, workers), v in medians.items():
        gb = v["batches_per_second"] * batch_size * 150 * 150 * (8 if reader == READERS[3] else 2) / 1e9
        name = reader + (f", {workers} workers" if reader == READERS[3] else "")
        print(
            f"{name:24}{1e3 * v['open_seconds']:10.1f}{v['open_mib']:8.0f}{v['batches_per_second']:11.1f}"
            f"{v['batches_per_second'] * batch_size:10,.0f}{gb:7.2f}{v['read_mib']:8.0f}"
        )
    print(f"a copy in memory: {copy:.1f} GB/s" if copy else "")
    rows = [{"reader": reader, "workers": workers} | values for (reader, workers), values in medians.items()]
    print(
        json.dumps({"benchmark": "input", "images": images, "batch_size": batch_size, "copy_gb_s": copy, "rows": rows})
    )


def _sweep(train: bool, a: "Steps") -> None:
    _check_peer(a.peer)
    os.environ.setdefault("GLIBC_TUNABLES", cli.HUGE_PAGES)  # as train.py does; for both codes
    context = get_context("spawn")
    many = max(a.devices)
    rows = []
    with ProcessPoolExecutor(1, context, _use_cpu_devices, (many,)) as ours, ProcessPoolExecutor(1, context) as peer:
        machine = ours.submit(_machine, a.dtype).result()
        print(f"{machine['device_kind']}; peaks: {machine['peaks']}\n{HEADER}", flush=True)
        for size, batch_size, dtype, devices in itertools.product(a.image_size, a.batch_size, a.dtype, a.devices):
            row = {"image_size": size, "batch_size": batch_size, "dtype": dtype, "devices": devices}
            row |= ours.submit(_prepare, train, batch_size, size, dtype, devices).result()
            if a.peer:
                row["torch"] = peer.submit(_prepare_torch, train, batch_size, size, dtype).result()
            seconds, torch_seconds = [], []
            for _ in range(a.repeats):  # the codes take turns, so that both see the same machine
                seconds += ours.submit(_time, a.warmup, a.steps).result()
                torch_seconds += peer.submit(_time, a.warmup, a.steps).result() if a.peer else []
            if train and devices == 1:
                row["busy_fraction"] = ours.submit(busy_fraction, batch_size, size, dtype, a.steps).result()
            flops = train_flops(size) if train else forward_flops(size)[0]
            rows.append(row | step_figures(seconds, torch_seconds, batch_size, flops, row["accessed_bytes"]))
            print(_line(rows[-1], machine["peaks"].get(dtype, {})), flush=True)
        if a.profile is not None:
            ours.submit(_profile, a.profile).result()
            print(f"trace of the last row: {a.profile}")
    print(json.dumps({"benchmark": "train" if train else "infer", "rows": rows} | machine))


@dataclass(frozen=True)
class Steps:
    """What to measure; options that take several values are all combined."""

    batch_size: tuple[int, ...] = (64,)  # images a step, over all devices
    image_size: tuple[int, ...] = (50,)  # pixels of the network's input, height and width
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)  # of activations
    devices: tuple[int, ...] = (1,)  # number of devices to use; CPUs are split into as many as asked for
    warmup: int = 10  # steps before each measurement
    steps: int = 30  # steps of each measurement
    repeats: int = 3  # measurements of each combination, in turn with the peer's
    peer: Literal["torch"] | None = None  # time the same in PyTorch (pip install torch)
    profile: Path | None = None  # folder for a trace of a few steps, for Perfetto or TensorBoard

    def __post_init__(self):
        for name in ("batch_size", "image_size", "devices"):
            values = getattr(self, name)
            check(len(values) > 0 and min(values) > 0, f"{name}={values}: expected one positive number or more")
        for name, least in {"warmup": 0, "steps": 1, "repeats": 1}.items():
            check(getattr(self, name) >= least, f"{name}={getattr(self, name)}: expected at least {least}")
        check(len(self.dtype) > 0, "dtype is empty: expected float32, bfloat16 or both")


def train(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures training steps of ResNet-20: stored images on the device -> flips, forward, backward, update."""
    _sweep(True, options)


def infer(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures inference of ResNet-20: stored images on the device -> logits."""
    _sweep(False, options)


def _check_peer(peer: str | None) -> None:
    found = peer is None or importlib.util.find_spec(peer) is not None
    check(found, f"--peer {peer}: {peer} is not installed; pip install {peer}, or leave the option out")


# What a worker process has prepared and times.
_current: dict[str, Any] = {}


def _use_cpu_devices(devices: int) -> None:
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)


def _machine(dtypes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "device_kind": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "peaks": {dtype: peaks(dtype) for dtype in dtypes},
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "huge_pages": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


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
        _current["run"](0, 5)


HEADER = (
    f"{'size':>5}{'batch':>6} {'dtype':9}{'dev':>4}{'compile s':>10}{'copy ms':>8}{'step ms':>9}{'quartiles':>16}"
    f"{'images/s':>10}{'TFLOP/s':>9}{'of peak':>8}{'GB/s':>7}{'of peak':>8}{'MiB':>7}{'busy':>7}{'torch':>8}"
    f"{'ratio':>7}"
)


def _line(row: dict[str, Any], peak: dict[str, float]) -> str:
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


if __name__ == "__main__":
    commands = {"train": train, "infer": infer, "input": measure_input, "simulate": simulate}
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
