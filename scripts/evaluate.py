"""Evaluates a run on labelled images."""

from pathlib import Path
from typing import Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.checkpoint import read_run
from gravlens_jax.evaluate import evaluate_run, load_labelled
from gravlens_jax.report import table


def main(
    run: tyro.conf.Positional[Path],
    data: tyro.conf.Positional[Path],
    checkpoint: Literal["best", "final"] = "best",
    out: Path | None = None,
) -> None:
    """Evaluates a run on labelled images: metrics.json, predictions.npz and figures.

    Args:
        run: directory made by train.py or import_torch.py.
        data: .npz made by pack.py or simulate.py, or a folder with one folder of .npy images for each class.
        checkpoint: the epoch of lowest validation loss, or the last one.
        out: folder for the report; RUN/report if not given, where it replaces the one before.
    """
    out = out or run / "report"
    print(table(evaluate_run(run, load_labelled(data, read_run(run).classes), checkpoint, out), out))


if __name__ == "__main__":
    cli.run_function(main)
