"""Draws the learning curves of runs compared with GravLensNet's published run."""

from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import check_folder

# Validation accuracy of GravLensNet's published run after each of its epochs of 30,000 public images, from its record:
# https://github.com/harish-jhr/GravLensNet.
GRAVLENSNET = (
    *(0.336, 0.339, 0.526, 0.610, 0.510, 0.793, 0.728, 0.713, 0.760, 0.814),
    *(0.773, 0.790, 0.822, 0.882, 0.843, 0.879, 0.877, 0.876, 0.888, 0.791),
)
FIT_0_7 = (0.0164, 0.47)  # `fit_power_law` of the runs of version 0.7.0


def load_history(run: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, with `image_steps` (steps times batch size) added; InputError if none.

    `run` is as in `load_network`.
    """
    from gravlens_jax.network import read_record

    record = read_record(run)
    try:
        size = record["config"]["batch_size"]
        check(bool(record["history"]), f"{run}: has no epoch of training yet")
        return [line | {"image_steps": line["step"] * size} for line in record["history"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{run}: has no record of its training ({error!r}); give a run directory") from error


def fit_power_law(image_steps: list[float], errors: list[float]) -> tuple[float, float]:
    """Returns a and b of error = a (image-steps / 1 million)^-b: a line through the logarithms, by least squares."""
    slope, offset = np.polyfit(np.log(np.array(image_steps) / 1e6), np.log(errors), 1)
    return float(np.exp(offset)), float(-slope)


def draw_learning_curves(path: Path, histories: dict[str, list[dict]]) -> None:
    """Draws validation error over image-steps, GravLensNet's too, and power laws: of version 0.7.0 and of last epochs.

    Args:
      path: where to write the PNG.
      histories: name -> lines as in metrics.jsonl.
    """
    from gravlens_jax.report import COLOURS, new_figure, save_figure

    figure = new_figure(6.5, 4, dpi=100)
    axes = figure.subplots()
    ends = []
    for colour, (name, lines) in zip(cycle(COLOURS), histories.items(), strict=False):
        seen = [line["image_steps"] for line in lines]
        errors = [1 - line["val_accuracy"] for line in lines]
        axes.plot(seen, errors, "-", color=colour, lw=1)
        axes.plot(seen[-1], errors[-1], "o", color=colour, ms=5, label=f"{name}: {errors[-1]:.2%}")
        ends.append((seen[-1], max(errors[-1], 1e-4)))
    fits = {"version 0.7.0 (ReLU)": FIT_0_7}
    if len({steps for steps, _ in ends}) >= 3:
        fits["last epochs"] = fit_power_law(*map(list, zip(*ends, strict=True)))
    x = np.geomspace(min(ends)[0], 4 * max(ends)[0])
    for style, (name, (a, b)) in zip(("-.", ":"), fits.items(), strict=False):
        label = f"{name}: {a:.2%} (image-steps / 1 million)$^{{-{b:.2f}}}$"
        axes.plot(x, a * (x / 1e6) ** -b, style, color="0.3", lw=1, label=label)
    published = 30_000 * np.arange(1, len(GRAVLENSNET) + 1), 1 - np.array(GRAVLENSNET)
    axes.plot(*published, "s--", color="0.6", ms=3, lw=1, label="GravLensNet, public images")
    axes.set(xlabel="image-steps", ylabel="validation error", xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.1%}" if f"{value:e}"[0] in "235" else "")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save_figure(figure, path)


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    figure: Path = Path("learning_curve.png"),
) -> None:
    """Draws the validation error over image-steps, compared with GravLensNet's and the power law of version 0.7.0.

    example:
      python scripts/learning_curve.py pretrained runs/default --figure learning_curve.png

    Args:
        runs: directories made by train.py, .npz made by export.py, or the word pretrained.
        figure: PNG to write.
    """
    check(bool(runs), "no RUN given")
    check(figure.suffix == ".png", f"{figure}: expected a name that ends in .png")
    check_folder(figure)
    draw_learning_curves(figure, {str(run): load_history(run) for run in runs})
    print(figure)


if __name__ == "__main__":
    cli.run_function(main)
