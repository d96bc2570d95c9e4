"""Classifies images."""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.errors import InputError, check
from gravlens_jax.folders import load_image
from gravlens_jax.inference import predict
from gravlens_jax.npz import is_copy, open_npz
from gravlens_jax.report import check_image_shape
from gravlens_jax.weights import Network, load_network


def predict_files(network: Network, paths: Iterable[Path], tta: bool = False) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (file, class, probabilities (classes,)) for every image of the paths.

    Args:
      network: from `load_network`.
      paths: .npy files of one image, .npz files of images (named file.npz[i]), or folders, searched for both.
      tta: average over mirror images: see `predict_logits`.

    Raises:
      InputError: after all others are done, if files cannot be used; it names each of them.
    """
    model, variables = network
    unusable = []
    for path in find_images(paths):
        try:
            if path.suffix == ".npz":
                images = open_npz(path, need_labels=False).images
                names = [f"{path}[{i}]" for i in range(len(images))]
            else:
                images, names = load_image(path)[None], [str(path)]
            check_image_shape(images.shape[1:], network.image_shape, str(path))
            probabilities = predict(model, variables, images, tta=tta)
        except InputError as error:
            unusable.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        for name, own in zip(names, probabilities, strict=True):
            yield name, model.classes[int(own.argmax())], own
    check(not unusable, "; ".join(unusable))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Returns the .npy and .npz files among the paths and in folders among them."""
    files = []
    for path in paths:
        check(path.exists(), f"{path}: no such file or folder")
        if not path.is_dir():
            check(path.suffix in (".npy", ".npz"), f"{path}: expected a .npy or .npz file or a folder")
            files.append(path)
            continue
        found = sorted(f for f in path.rglob("*") if f.suffix in (".npy", ".npz") and not is_copy(f))
        check(bool(found), f"{path}: contains no .npy or .npz files")
        files += found
    return files


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
