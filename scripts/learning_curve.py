"""Draws how fast runs learnt, beside GravLensNet's published run."""

from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.config import check
from gravlens_jax.figures import draw_learning_curves
from gravlens_jax.files import check_folder
from gravlens_jax.weights import load_history


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    figure: Path = Path("learning_curve.png"),
) -> None:
    """Draws validation accuracy over image-steps and minutes, beside GravLensNet's.

    example:
      python scripts/learning_curve.py pretrained runs/default --figure learning_curve.png

    Args:
        runs: directories made by train.py, .npz made by export.py, or the word pretrained.
        figure: PNG to draw.
    """
    check(bool(runs), "no RUN given")
    check_folder(figure)
    draw_learning_curves(figure, {str(run): load_history(run) for run in runs})
    print(figure)


if __name__ == "__main__":
    cli.run_function(main)
