"""Classifies images."""

import csv
import sys
from pathlib import Path

import tyro

from gravlens_jax import cli
from gravlens_jax.checkpoint import read_run
from gravlens_jax.evaluate import predict_files


def main(run: tyro.conf.Positional[Path], paths: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Prints one CSV line for each image: file, class, probability of each class.

    Args:
        run: directory made by train.py or import_torch.py.
        paths: .npy files of one image, .npz files of images, or folders of them.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "class", *(f"p_{name}" for name in read_run(run).classes)])
    for file, name, probabilities in predict_files(run, paths):
        writer.writerow([file, name, *(f"{p:.6f}" for p in probabilities)])


if __name__ == "__main__":
    cli.run_function(main)
