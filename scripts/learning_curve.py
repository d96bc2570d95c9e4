"""Draws the learning curves of runs beside GravLensNet's published run."""

from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.errors import InputError, check
from gravlens_jax.report import COLOURS, new_figure, save_figure
from gravlens_jax.run_dir import check_folder, read_config, read_history
from gravlens_jax.weights import read_file, resolve

# Validation accuracy of GravLensNet's published run after each of its epochs of 30,000 real images, from the record in
# its repository, https://github.com/harish-jhr/GravLensNet.
GRAVLENSNET = (
    *(0.336, 0.339, 0.526, 0.610, 0.510, 0.793, 0.728, 0.713, 0.760, 0.814),
    *(0.773, 0.790, 0.822, 0.882, 0.843, 0.879, 0.877, 0.876, 0.888, 0.791),
)


def load_history(source: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, with `image_steps` added, of a `load_network` source; InputError if none."""
    path = resolve(source)
    if path.suffix == ".npz":
        about, _ = read_file(path)
    else:
        about = {"config": read_config(path)["config"], "history": read_history(path)}
    try:
        size = about["config"]["batch_size"]
        check(bool(about["history"]), f"{path}: has no epoch of training yet")
        return [line | {"image_steps": line["step"] * size} for line in about["history"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: has no record of its training ({error!r})") from error


def draw_learning_curves(path: Path, histories: dict[str, list[dict]]) -> None:
    """Validation accuracy of several runs over image-steps and minutes, beside GravLensNet's over image-steps.

    Args:
      path: where to write the PNG.
      histories: name -> lines as in metrics.jsonl; lines with a real_accuracy are shown with it too.
    """
    figure = new_figure(9, 3.4, dpi=100)
    by_steps, by_minutes = figure.subplots(1, 2, sharey=True)
    for colour, (name, lines) in zip(cycle(COLOURS), histories.items(), strict=False):
        seen = [line["image_steps"] / 1000 for line in lines]
        minutes = np.cumsum([line["wall_seconds"] for line in lines]) / 60
        real = [line.get("real_accuracy", np.nan) for line in lines]
        for axes, x in ((by_steps, seen), (by_minutes, minutes)):
            axes.plot(x, [line["val_accuracy"] for line in lines], "o-", color=colour, ms=3, label=name)
            if np.isfinite(real).any():
                axes.plot(x, real, "x", color=colour, ms=5, label=f"{name}, 135 real images")
    epochs = np.arange(1, len(GRAVLENSNET) + 1)
    by_steps.plot(30 * epochs, GRAVLENSNET, "s--", color="0.5", ms=3, label="GravLensNet, 32 layers, real images")
    by_steps.set(xlabel="thousands of image-steps", ylabel="validation accuracy", ylim=(0.3, 1))
    by_minutes.set(xlabel="minutes of training")
    for axes in (by_steps, by_minutes):
        axes.grid(alpha=0.3)
    by_steps.legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    figure: Path = Path("learning_curve.png"),
) -> None:
    """Draws validation accuracy over image-steps and minutes, beside GravLensNet's.

    example:
      python scripts/learning_curve.py pretrained runs/default --figure learning_curve.png

    Args:
        runs: directories made by train.py, .npz made by export.py, or the word pretrained.
        figure: PNG to write.
    """
    check(bool(runs), "no RUN given")
    check_folder(figure)
    draw_learning_curves(figure, {str(run): load_history(run) for run in runs})
    print(figure)


if __name__ == "__main__":
    cli.run_function(main)
