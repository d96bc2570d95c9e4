"""Classifies images."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.config import check
from gravlens_jax.evaluate import predict_files
from gravlens_jax.weights import load_network


def main(
    run: cli.Source,
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")],
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Prints one CSV line for each image: file, class, probability of each class.

    examples:
      python scripts/predict.py pretrained dataset/val/no/1.npy
      python scripts/predict.py runs/default images packed/test.npz > predictions.csv

    Args:
        paths: .npy files of one image, .npz files of images, or folders of them.
        tta: average the logits over each image and its three mirror images.
    """
    check(bool(paths), "no PATH given; name at least one .npy, .npz or folder of them")
    network = load_network(run)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "class", *(f"p_{name}" for name in network.model.classes)])
    for file, name, probabilities in predict_files(network, paths, tta):
        writer.writerow([file, name, *(f"{p:.6f}" for p in probabilities)])


if __name__ == "__main__":
    cli.run_function(main)
