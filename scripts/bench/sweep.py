"""Training steps and inference over many combinations: beside PyTorch, or over the number of devices."""

import itertools
import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench.costs import Case, Peak, Steps, peak_of, quartiles, roofline, step_flops
from bench.harness import Row, Run, alternate, check_least, worker
from bench.steps import compile_step
from gravlens_jax.errors import check_installed
from gravlens_jax.sharding import check_batch_size, data_mesh

STEP_COLUMNS = (
    "  step s{step_seconds:.3g}    25 %{step_seconds_quartiles[0]:.3g}    75 %{step_seconds_quartiles[1]:.3g}"
    " images/s{images_per_second:,.0f}TFLOP/s{tflops:.3f}"
)
RATE_COLUMNS = (
    f"compile s{{compile_seconds:.1f}}{STEP_COLUMNS}of peak{{tflops_fraction:.1%}} GB/s{{gb_per_second:.0f}}"
    "of peak{bandwidth_fraction:.1%}   MiB{memory_mib:.0f}bound        {bound}"
)
COLUMNS = (
    "size{image_size}batch{batch_size}dtype   {dtype}"
    f"{RATE_COLUMNS}torch{{torch_images_per_second:,.0f}}ratio{{ratio:.2f}}"
)
SCALING_COLUMNS = f"scaling {{scaling}}dev{{devices}}batch{{batch_size}}{STEP_COLUMNS}efficiency{{efficiency:.3f}}"


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
    """Returns the figures of a step.

    Args:
      case: the step.
      peak: of its devices.
      warmup: calls before each measurement.
      steps: calls of each measurement.
      repeats: measurements, alternating with the peer's.
      most_seconds: of a measurement, with fewer calls if need be.
      peer: a process in which PyTorch runs the same.
      profile: folder for a trace of a few steps.

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
        check_installed(a.peer, "--peer", a.peer)
    with worker() if a.peer else nullcontext() as peer:
        for size, batch_size, dtype in itertools.product(a.image_size, a.batch_size, a.dtype):
            case = Case(train, batch_size, size, dtype)
            peak = peak_of(dtype, 1, a.peak_tflops, a.peak_gb)
            yield measure_step(case, peak, a.warmup, a.steps, a.repeats, peer=peer)


def _torch_step(case: Case, *calls: int) -> Any:
    """Returns the seconds of `torch_step` if numbers of calls are given, else its facts."""
    from bench.torch_resnet import torch_step

    run, facts = torch_step(case)
    return run(*calls) if calls else facts


def scaling_cases(devices: tuple[int, ...], batch_per_device: int, size: int) -> list[tuple[str, Case]]:
    """Returns the steps of "weak" scaling, with the same batch for each device, and of "strong", with one batch.

    Args:
      devices: numbers of devices; if empty, powers of two up to all.
      batch_per_device: of weak scaling; the batch of strong scaling is that of weak scaling on the most devices.
      size: pixels, height and width.
    """
    counts = sorted(set(devices)) or [2**k for k in range(jax.device_count().bit_length())]
    check_least(1, devices=devices or None, batch_per_device=batch_per_device, image_size=size)
    weak = [("weak", Case(True, n * batch_per_device, size, devices=n)) for n in counts]
    return weak + [("strong", Case(True, counts[-1] * batch_per_device, size, devices=n)) for n in counts]


def scale_steps(cases: list[tuple[str, Case]], warmup: int, steps: int, repeats: int) -> Iterator[Row]:
    """Yields the figures of steps over several numbers of devices.

    Virtual devices of a CPU share its cores, and one of them uses most of these already: at best the images per second
    stay the same, an efficiency of 1/n, and only the overhead of the split is measured.

    Args:
      cases: of `scaling_cases`.
      warmup, steps, repeats: as in `measure_step`.

    Returns:
      scaling ("weak" or "strong"); `measure_step`; and efficiency: images per second and device over those of the
      fewest devices, so 1 is perfect.

    Raises:
      InputError: there are too few devices for a case, or its batch does not divide evenly over them.
    """
    check_least(1, steps=steps, repeats=repeats)
    check_least(0, warmup=warmup)
    for _, case in cases:
        check_batch_size(case.batch_size, data_mesh(case.devices))
    fewest: dict[str, Row] = {}
    for scaling, case in cases:
        row = measure_step(case, peak_of(case.dtype, case.devices), warmup, steps, repeats)
        first = fewest.setdefault(scaling, row)
        efficiency = row["images_per_second"] / first["images_per_second"] * first["devices"] / case.devices
        yield {"scaling": scaling} | row | {"efficiency": efficiency}
