"""Training steps and inference over many combinations of options, also compared with PyTorch."""

import itertools
import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax

from bench.costs import Case, Peak, Steps, peak_of, quartiles, roofline, step_flops
from bench.harness import Row, Run, alternate
from bench.steps import compile_step
from gravlens_jax.errors import check_installed
from gravlens_jax.sharding import check_batch_size, data_mesh

RATE_COLUMNS = (
    "compile s{compile_seconds:.1f}  step s{step_seconds:.3g}    25 %{step_seconds_quartiles[0]:.3g}"
    "    75 %{step_seconds_quartiles[1]:.3g} images/s{images_per_second:,.0f}TFLOP/s{tflops:.3f}"
    "of peak{tflops_fraction:.1%} GB/s{gb_per_second:.0f}of peak{bandwidth_fraction:.1%}   MiB{memory_mib:.0f}"
    "bound        {bound}"
)
COLUMNS = (
    "size{image_size}batch{batch_size}dtype   {dtype}dev{devices}"
    f"{RATE_COLUMNS}torch{{torch_images_per_second:,.0f}}ratio{{ratio:.2f}}"
)


def measure_step(
    case: Case,
    peak: Peak | None,
    warmup: int,
    steps: int,
    repeats: int = 1,
    most_seconds: float = math.inf,
    peer: ProcessPoolExecutor | None = None,
    profile: Path | None = None,
) -> Row:
    """Returns the results of a step, of `repeats` measurements that alternate with those of the `peer`, if given.

    A measurement is `steps` calls after `warmup` others, or fewer within `most_seconds`; `peak` is that of the devices;
    `peer` a process in which PyTorch runs the same; `profile` a folder for a trace of a few steps.

    Returns:
      the fields of `Case`; the facts of `compile_step`; `quartiles`; tflops; gb_per_second, of memory traffic;
      if the peak is known, peak, tflops_fraction and `roofline`; with a peer torch (facts about
      it), torch_images_per_second and ratio, our speed over its.
    """
    run, facts = compile_step(case)
    runs: dict[str, Run] = {"jax": partial(run, most_seconds=most_seconds)}
    row = case._asdict() | facts
    if peer:
        row["torch"] = peer.submit(_torch_step, case).result()
        runs["torch"] = lambda *calls: peer.submit(_torch_step, case, *calls).result()
    timed = alternate(runs, lambda code: runs[code](warmup, steps), repeats)
    seconds = {code: list(itertools.chain.from_iterable(some)) for code, some in timed.items()}
    if profile:
        with jax.profiler.trace(str(profile)):
            run(0, 5)
    row |= quartiles(seconds["jax"], case.batch_size)
    row["tflops"] = step_flops(case) * row["images_per_second"] / 1e12
    if peak:
        row |= {"peak": peak._asdict(), "tflops_fraction": row["tflops"] / peak.tflops}
    if case.steps_per_call == 1 and row["accessed_bytes"]:  # the compiler counts a loop once
        row["gb_per_second"] = row["accessed_bytes"] * case.devices / row["step_seconds"] / 1e9
        row |= roofline(row["tflops"], row["gb_per_second"], peak) if peak else {}
    if peer:
        row["torch_images_per_second"] = case.batch_size / statistics.median(seconds["torch"])
        row["ratio"] = row["images_per_second"] / row["torch_images_per_second"]
    return row


def sweep(train: bool, options: Steps) -> Iterator[Row]:
    """Yields `measure_step` of training steps, or else of inference, for each combination of the options.

    PyTorch runs in a process of its own.
    """
    a = options
    if a.peer:
        check_installed(a.peer, "--peer", '"gravlens_jax[peers]"')
    with ProcessPoolExecutor(1, get_context("spawn")) if a.peer else nullcontext() as peer:
        for size, batch_size, dtype, devices in itertools.product(a.image_size, a.batch_size, a.dtype, a.devices):
            check_batch_size(batch_size, data_mesh(devices))
            case = Case(train, batch_size, size, dtype, devices)
            peak = peak_of(dtype, devices, a.peak_tflops, a.peak_gb)
            yield measure_step(case, peak, a.warmup, a.steps, a.repeats, peer=peer)


def _torch_step(case: Case, *calls: int) -> Any:
    """Returns the seconds of `torch_step` if numbers of calls are given, else its facts."""
    from bench.torch_resnet import torch_step

    run, facts = torch_step(case)
    return run(*calls) if calls else facts
