"""Training steps and inference over many combinations: beside PyTorch, or over the number of devices."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import jax

from bench.costs import Case, Dtype, Steps, peaks, step_figures
from bench.harness import Row, Run, check_least, time_runs, worker
from bench.steps import busy_fraction, compile_step
from gravlens_jax.errors import check_installed
from gravlens_jax.report import COLOURS, new_figure, save_figure
from gravlens_jax.sharding import check_batch_size, data_mesh, is_main

STEP_COLUMNS = (
    "    step s{step_seconds:.3g}      25 %{step_seconds_quartiles[0]:.3g}      75 %{step_seconds_quartiles[1]:.3g}"
    "  images/s{images_per_second:,.0f}  TFLOP/s{tflops:.3f}"
)
COLUMNS = (
    " size{image_size}  batch{batch_size}  dtype    {dtype} dev{devices}  compile s{compile_seconds:.1f}"
    f"  transfer s{{transfer_seconds:.3g}}{STEP_COLUMNS} of peak{{tflops_fraction:.1%}}  GB/s{{gb_per_second:.0f}}"
    " of peak{bandwidth_fraction:.1%}   MiB{memory_mib:.0f}   busy{busy_fraction:.1%}"
    "  torch{torch_images_per_second:,.0f} ratio{ratio:.2f}"
)
SCALING_COLUMNS = (
    f"scaling {{scaling}}  dev{{devices}}  batch{{batch_size}}{STEP_COLUMNS}  efficiency{{efficiency:.3f}}"
    "  at best{best_efficiency:.3f}"
)


def split_cpu(devices: tuple[int, ...]) -> None:
    """Splits the CPU into as many virtual devices as are needed, where JAX runs on one; call it before it uses one."""
    if max(devices, default=1) > 1 and not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", max(devices))


def sweep(train: bool, options: Steps) -> Iterator[Row]:
    """Yields the figures of a training step, or else of inference, for each combination of the options.

    PyTorch runs in a process of its own. The step of the last combination is the one to profile.

    Returns:
      the fields of `Case`; the facts of `steps.compile_step`; `step_figures`; gb_per_second, of memory traffic; where
      they are known peaks, and tflops_fraction and bandwidth_fraction of them; busy_fraction (see `steps`); with the
      peer torch (facts about it), torch_images_per_second and ratio, our speed over its.
    """
    a = options
    if a.peer:
        check_installed(a.peer, "--peer", a.peer)
    split_cpu(a.devices)
    known = {dtype: peaks(dtype) for dtype in a.dtype}
    with worker() as peer:
        for size, batch_size, dtype, devices in itertools.product(a.image_size, a.batch_size, a.dtype, a.devices):
            case = Case(train, batch_size, size, dtype, devices)
            runs: dict[str, Run] = {}
            runs["jax"], facts = compile_step(case)
            if a.peer:
                facts["torch"] = peer.submit(_torch_facts, case).result()
                runs["torch"] = lambda *steps, case=case: peer.submit(_time_torch, case, *steps).result()
            seconds = time_runs(runs, a.warmup, a.steps, a.repeats)
            row = case._asdict() | facts | step_figures(seconds["jax"], case)
            row["gb_per_second"] = row["accessed_bytes"] / row["step_seconds"] / 1e9
            if peak := known[dtype]:
                row |= {"peaks": peak, "tflops_fraction": row["tflops"] / peak["tflops"]}
                row["bandwidth_fraction"] = row["gb_per_second"] / peak["bandwidth"]
            if train and devices == 1:
                row["busy_fraction"] = busy_fraction(case, a.steps)
            if a.peer:
                row["torch_images_per_second"] = batch_size / statistics.median(seconds["torch"])
                row["ratio"] = row["images_per_second"] / row["torch_images_per_second"]
            yield row
    if a.profile is not None:
        with jax.profiler.trace(str(a.profile)):
            runs["jax"](0, 5)


def _torch_facts(case: Case) -> Row:
    from bench.torch_resnet import torch_step

    return torch_step(case)[1]


def _time_torch(case: Case, warmup: int, steps: int) -> list[float]:
    from bench.torch_resnet import torch_step

    return torch_step(case)[0](warmup, steps)


def scaling_cases(
    devices: tuple[int, ...], batch_per_device: int, batch_size: int | None, size: int, dtype: Dtype = "float32"
) -> dict[str, list[Case]]:
    """Returns the training steps of weak scaling, with the same batch for each device, and of strong, with one batch.

    Args:
      devices: numbers of devices; if empty, powers of two up to all.
      batch_per_device: of weak scaling.
      batch_size: of strong scaling, over all devices; by default that of weak scaling on the most devices.
      size, dtype: see `Case`.
    """
    counts = sorted(set(devices)) or [2**k for k in range(jax.device_count().bit_length())]
    check_least(1, devices=devices or None, batch_per_device=batch_per_device, batch_size=batch_size, image_size=size)
    whole = batch_size or batch_per_device * counts[-1]
    return {
        "weak": [Case(True, n * batch_per_device, size, dtype, n) for n in counts],
        "strong": [Case(True, whole, size, dtype, n) for n in counts],
    }


def scale(cases: dict[str, list[Case]], warmup: int, steps: int, repeats: int) -> list[Row]:
    """Returns the figures of all cases, which take turns.

    In a run of several processes all must call this with the same arguments; only the first returns anything. Virtual
    devices of a CPU share its cores, and one of them uses most of these already: at best the images per second stay the
    same, an efficiency of 1/n, and only the overhead of the split is measured.

    Args:
      cases: of `scaling_cases`.
      warmup, steps, repeats: as in `time_runs`.

    Returns:
      scaling ("weak" or "strong"); the fields of `Case`; `step_figures`; efficiency: images per second and device over
      those of the fewest devices, so 1 is perfect; and best_efficiency, the best to expect.

    Raises:
      InputError: there are too few devices for a case, or its batch does not divide evenly over them.
    """
    check_least(1, steps=steps, repeats=repeats)
    check_least(0, warmup=warmup)
    distinct = sorted({case for some in cases.values() for case in some})
    for case in distinct:
        check_batch_size(case.batch_size, data_mesh(case.devices))
    seconds = time_runs({case: compile_step(case)[0] for case in distinct}, warmup, steps, repeats)
    rows = []
    for scaling, some in cases.items() if is_main() else ():
        figures = [case._asdict() | step_figures(seconds[case], case) for case in some]
        for row in figures:
            growth = row["devices"] / figures[0]["devices"]
            efficiency = row["images_per_second"] / figures[0]["images_per_second"] / growth
            best = 1 / growth if jax.default_backend() == "cpu" else 1.0
            rows.append({"scaling": scaling} | row | {"efficiency": efficiency, "best_efficiency": best})
    return rows


def draw_scaling(path: Path, rows: list[Row]) -> None:
    """Draws images per second and efficiency over the number of devices as PNG; dotted lines are perfect scaling."""
    figure = new_figure(7, 3.2)
    for axes, name in zip(figure.subplots(1, 2), ("images_per_second", "efficiency"), strict=True):
        for scaling, colour in zip(("weak", "strong"), COLOURS, strict=False):
            some = [row for row in rows if row["scaling"] == scaling]
            devices, values = [row["devices"] for row in some], [row[name] for row in some]
            perfect = [values[0] * (1 if name == "efficiency" else n / devices[0]) for n in devices]
            axes.loglog(devices, values, "o-", color=colour, ms=3, base=2, label=f"{scaling} scaling")
            axes.loglog(devices, perfect, ":", color=colour, base=2)
        axes.set(xlabel="devices", title=name.replace("_", " "), xticks=devices, xticklabels=devices)
        axes.yaxis.set_major_formatter("{x:,g}")
    axes.legend(frameon=False)
    save_figure(figure, path)
