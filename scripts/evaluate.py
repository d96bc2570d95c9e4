"""Evaluates a network on labelled images."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.folders import load_labelled
from gravlens_jax.report import evaluate_network, table
from gravlens_jax.run_dir import read_history
from gravlens_jax.weights import load_network


def main(
    run: cli.Source,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    checkpoint: Literal["best", "final"] = "best",
    out: Path | None = None,
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Evaluates a network on labelled images: metrics.json, predictions.npz and figures.

    examples:
      python scripts/evaluate.py runs/default packed/test.npz
      python scripts/evaluate.py pretrained dataset/val --tta --out real

    Args:
        data: .npz made by pack.py or simulate.py, or a folder with one folder of .npy images for each class.
        checkpoint: the epoch of lowest validation loss, or the last one.
        out: folder for the report, by default RUN/report or, for a file, RUN-report; existing files are replaced.
        tta: average the logits over each image and its three mirror images.
    """
    out = out or (run / "report" if run.is_dir() else Path(f"{run.stem}-report"))
    network = load_network(run, checkpoint)
    dataset = load_labelled(data, network.model.classes)
    values = evaluate_network(
        network, dataset, checkpoint=checkpoint, out=out, tta=tta, history=read_history(run) if run.is_dir() else ()
    )
    print(table(values, out))


if __name__ == "__main__":
    cli.run_function(main)
