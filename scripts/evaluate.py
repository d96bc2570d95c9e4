"""Evaluates a run on labelled images."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.evaluate import evaluate_run, load_labelled, table
from gravlens_jax.weights import load_network


def main(
    run: cli.Source,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    checkpoint: Literal["best", "final"] = "best",
    out: Path | None = None,
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Evaluates a run on labelled images: metrics.json, predictions.npz and figures.

    examples:
      python scripts/evaluate.py runs/default packed/test.npz
      python scripts/evaluate.py pretrained dataset/val --tta --out real

    Args:
        data: .npz made by pack.py or simulate.py, or a folder with one folder of .npy images for each class.
        checkpoint: the epoch of lowest validation loss, or the last one.
        out: folder for the report; RUN/report if not given, or for a file RUN-report; it replaces the one before.
        tta: average the logits over each image and its three mirror images.
    """
    out = out or (run / "report" if run.is_dir() else Path(f"{run.stem}-report"))
    dataset = load_labelled(data, load_network(run, checkpoint).model.classes)
    print(table(evaluate_run(run, dataset, checkpoint, out, tta), out))


if __name__ == "__main__":
    cli.run_function(main)
