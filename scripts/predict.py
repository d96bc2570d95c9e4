"""Classifies images."""

import csv
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.evaluate import predict_files
from gravlens_jax.weights import load_network


def main(
    run: tyro.conf.Positional[Path],
    paths: tyro.conf.Positional[tuple[Path, ...]],
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Prints one CSV line for each image: file, class, probability of each class.

    Args:
        run: directory made by train.py or import_torch.py, .npz made by export.py, or the word pretrained.
        paths: .npy files of one image, .npz files of images, or folders of them.
        tta: average the logits over each image and its three mirror images.
    """
    network = load_network(run)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "class", *(f"p_{name}" for name in network.model.classes)])
    for file, name, probabilities in predict_files(network, paths, tta):
        writer.writerow([file, name, *(f"{p:.6f}" for p in probabilities)])


if __name__ == "__main__":
    cli.run_function(main)
