"""How the training step's speed grows with the number of devices; for `scripts/benchmark.py scale`.

Weak scaling gives each device the same batch, strong scaling shares out one batch of fixed size. Efficiency is the
images per second of n devices over n times those of one, so 1 is perfect. What accelerators can reach is computed in
`costs.py`. Virtual devices of a CPU share its cores, and one of them uses most of these already: there the images per
second stay as they are at best, an efficiency of 1/n, and what is measured is only what the splitting costs.

In a run of several processes all must call these functions with the same arguments. The devices of process 0 come
first, so that it takes part in every case; processes without a device in a case wait.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gravlens_jax.config import check
from gravlens_jax.costs import train_flops
from gravlens_jax.measure import compile_step
from gravlens_jax.mesh import check_batch_size, data_mesh, wait_for_all


class Case(NamedTuple):
    """One thing to time; the same may belong to weak and to strong scaling."""

    devices: int
    batch_size: int  # over all devices


Cases = dict[str, list[Case]]  # "weak" and "strong", by the number of devices


def powers_of_two(n: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... up to at most `n`."""
    return tuple(2**k for k in range(n.bit_length()))


def scaling_cases(devices: tuple[int, ...], batch_per_device: int, batch_size: int | None = None) -> Cases:
    """Returns the cases of weak and strong scaling.

    Args:
      devices: numbers of devices.
      batch_per_device: of weak scaling.
      batch_size: of strong scaling; without it, that of weak scaling on the most devices.
    """
    counts = sorted(set(devices))
    check(len(counts) > 0 and counts[0] > 0, f"devices={devices}: expected one positive number or more")
    for name, value in {"batch_per_device": batch_per_device, "batch_size": batch_size}.items():
        check(value is None or value > 0, f"{name}={value}: expected a positive number")
    batch_size = batch_size or batch_per_device * counts[-1]
    return {
        "weak": [Case(n, n * batch_per_device) for n in counts],
        "strong": [Case(n, batch_size) for n in counts],
    }


def time_cases(cases: Cases, size: int, dtype: str, warmup: int, steps: int, repeats: int) -> dict[Case, list[float]]:
    """Compiles all cases, then times them in turn, so that all see the same machine.

    Args:
      cases: what to time.
      size, dtype: as in `measure.compile_step`.
      warmup: steps before each measurement.
      steps: of each measurement.
      repeats: measurements of each case.

    Returns:
      the seconds of each step; those of cases in which this process has no device are missing.

    Raises:
      InputError: there are too few devices for a case, or they cannot share its batch evenly.
    """
    for name, value, least in zip(
        ("image_size", "warmup", "steps", "repeats"), (size, warmup, steps, repeats), (1, 0, 1, 1), strict=True
    ):
        check(value >= least, f"{name}={value}: expected at least {least}")
    distinct = sorted({case for some in cases.values() for case in some})
    meshes = {case: data_mesh(case.devices) for case in distinct}
    for case, mesh in meshes.items():
        check_batch_size(case.batch_size, mesh)
    runs: dict[Case, Callable[[int, int], list[float]]] = {}
    for case in distinct:
        wait_for_all(f"compile {case}")  # also those without a device in a case
        if meshes[case].local_devices:
            runs[case], _ = compile_step(True, case.batch_size, size, dtype, case.devices)
    seconds: dict[Case, list[float]] = {case: [] for case in runs}
    for i in range(repeats):
        for case in distinct:
            wait_for_all(f"time {i} {case}")
            if case in runs:
                seconds[case] += runs[case](warmup, steps)
    return seconds


def scaling_rows(cases: Cases, seconds: dict[Case, list[float]], size: int) -> list[dict[str, Any]]:
    """Returns what the seconds of single steps on `size` x `size` pixels amount to, a row for each case.

    Returns:
      dicts of scaling ("weak" or "strong"), devices, batch_size, step_seconds (median), step_seconds_quartiles,
      images_per_second, tflops (of all devices together), and efficiency: images per second and device over those of
      the fewest devices.
    """
    rows = []
    for scaling, some in cases.items():
        rates = [case.batch_size / statistics.median(seconds[case]) for case in some]
        for case, rate in zip(some, rates, strict=True):
            rows.append(
                {
                    "scaling": scaling,
                    "devices": case.devices,
                    "batch_size": case.batch_size,
                    "step_seconds": case.batch_size / rate,
                    "step_seconds_quartiles": np.quantile(seconds[case], [0.25, 0.75]).tolist(),
                    "images_per_second": rate,
                    "tflops": rate * train_flops(size) / 1e12,
                    "efficiency": rate / case.devices / (rates[0] / some[0].devices),
                }
            )
    return rows


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of `scaling_rows` as a text table, with what can be expected if the devices are virtual."""
    lines = [
        f"{'scaling':8}{'dev':>4}{'batch':>7}{'per dev':>9}{'step ms':>9}{'quartiles':>18}{'images/s':>11}"
        f"{'TFLOP/s':>9}{'efficiency':>12}"
    ]
    for row in rows:
        low, high = (1e3 * seconds for seconds in row["step_seconds_quartiles"])
        lines.append(
            f"{row['scaling']:8}{row['devices']:4}{row['batch_size']:7}{row['batch_size'] // row['devices']:9}"
            f"{1e3 * row['step_seconds']:9.2f}{f'{low:.2f}-{high:.2f}':>18}{row['images_per_second']:11,.0f}"
            f"{row['tflops']:9.3f}{row['efficiency']:12.3f}"
        )
    if rows[0]["devices"] > 1:
        lines.append(f"efficiency is relative to {rows[0]['devices']} devices")
    if jax.default_backend() == "cpu":
        lines.append("CPU devices share the cores: at best images/s stay as they are, an efficiency of 1/devices")
    return "\n".join(lines)


def scaling_curves(rows: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns devices, images per second and efficiency of each scaling, as `figures.draw_scaling` wants them."""

    def column(scaling: str, name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if row["scaling"] == scaling])

    return {
        scaling: (column(scaling, "devices"), column(scaling, "images_per_second"), column(scaling, "efficiency"))
        for scaling in dict.fromkeys(row["scaling"] for row in rows)
    }
