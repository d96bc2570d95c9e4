"""How the training step's speed grows with the number of devices; for `scripts/benchmark.py scale`.

Weak scaling gives each device the same batch, strong scaling divides one batch of fixed size. Efficiency is the images
per second of n devices over n times those of one, so 1 is perfect. Virtual devices of a CPU share its cores, and one of
them uses most of these already: at best the images per second stay the same, an efficiency of 1/n, and only the
overhead of the split is measured.

In a run of several processes all must call these functions with the same arguments. The devices of process 0 come
first, so that it takes part in every case; processes without a device in a case wait.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench.costs import train_flops
from bench.steps import compile_step, step_figures
from gravlens_jax.errors import check
from gravlens_jax.sharding import check_batch_size, data_mesh, wait_for_all


class Case(NamedTuple):
    """One combination to time; the same may belong to weak and to strong scaling."""

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
      batch_size: of strong scaling; by default that of weak scaling on the most devices.
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
    """Compiles all cases, then times them alternately, so that all see the same machine.

    Args:
      cases: what to time.
      size, dtype: as in `steps.compile_step`.
      warmup: steps before each measurement.
      steps: of each measurement.
      repeats: measurements of each case.

    Returns:
      the seconds of each step; cases in which this process has no device are missing.

    Raises:
      InputError: there are too few devices for a case, or its batch does not divide evenly over them.
    """
    least = {"image_size": (size, 1), "warmup": (warmup, 0), "steps": (steps, 1), "repeats": (repeats, 1)}
    for name, (value, minimum) in least.items():
        check(value >= minimum, f"{name}={value}: expected at least {minimum}")
    distinct = sorted({case for some in cases.values() for case in some})
    meshes = {case: data_mesh(case.devices) for case in distinct}
    for case, mesh in meshes.items():
        check_batch_size(case.batch_size, mesh)
    runs: dict[Case, Callable[[int, int], list[float]]] = {}
    for case in distinct:
        wait_for_all(f"compile {case}")  # also processes without a device in a case
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
    """Returns a row of results for each case from the seconds of single steps on `size` x `size` pixels.

    Returns:
      dicts of scaling ("weak" or "strong"), devices, batch_size, the results of `steps.step_figures` (tflops of all
      devices together), and efficiency: images per second and device over those of the fewest devices.
    """
    rows = []
    for scaling, some in cases.items():
        rates = [case.batch_size / statistics.median(seconds[case]) / case.devices for case in some]
        for case, rate in zip(some, rates, strict=True):
            figures = step_figures(seconds[case], case.batch_size, train_flops(size))
            rows.append({"scaling": scaling} | case._asdict() | figures | {"efficiency": rate / rates[0]})
    return rows


def scaling_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of `scaling_rows` as a text table, with the best possible efficiency if devices are virtual."""
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
        lines.append("CPU devices share the cores: at best images/s stay the same, an efficiency of 1/devices")
    return "\n".join(lines)


def draw_scaling(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws images per second and efficiency over the number of devices; dotted lines are perfect scaling.

    Args:
      path: PNG to write.
      rows: as `scaling_rows` returns them.
    """
    from matplotlib.figure import Figure

    from gravlens_jax.report import COLOURS, DPI, save_figure

    figure = Figure((7, 3.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for scaling, colour in zip(dict.fromkeys(row["scaling"] for row in rows), COLOURS, strict=False):
        some = [row for row in rows if row["scaling"] == scaling]
        devices = [row["devices"] for row in some]
        rates = [row["images_per_second"] for row in some]
        perfect = [rates[0] * n / devices[0] for n in devices]
        left.loglog(devices, rates, "o-", color=colour, ms=3, label=f"{scaling} scaling", base=2)
        left.loglog(devices, perfect, ":", color=colour, base=2)
        right.semilogx(devices, [row["efficiency"] for row in some], "o-", color=colour, ms=3, base=2)
    right.axhline(1, ls=":", color="0.6")
    right.set_ylim(0)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.legend(frameon=False)
    for axes, title in ((left, "images per second"), (right, "efficiency")):
        axes.set(xlabel="devices", title=title, xticks=devices, xticklabels=devices)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
