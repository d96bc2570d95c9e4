"""Classifies images."""

import csv
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import check_folder, is_visible, write_arrays
from gravlens_jax.folders import ONE_PLANE, SUFFIXES, Planes, load_npz, named, open_images, show_unread
from gravlens_jax.metrics import convergence, outlier_scores, softmax
from gravlens_jax.npz import MappedImages, read_rows

if TYPE_CHECKING:
    from gravlens_jax.network import Network

IMAGE_SUFFIXES = (*SUFFIXES, ".npz")
BATCH = 128  # images that are read and predicted together


class Prediction(NamedTuple):
    """Of one image."""

    probabilities: np.ndarray  # (classes,)
    outlier: np.ndarray  # (), see `predict`
    peak: np.ndarray  # (), largest convergence; NaN if the network predicts no deflections
    deflection: np.ndarray  # (cells, cells, 2), see `predict_deflection`; empty unless asked for


def predict_files(
    network: "Network",
    files: Iterable[Path],
    tta: bool = False,
    skip_bad: bool = False,
    planes: Planes = ONE_PLANE,
    maps: bool = False,
) -> Iterator[tuple[str, Prediction | InputError]]:
    """Yields (name, prediction) for each image, and (file, error) for what is unusable.

    Args:
      network: from `load_network`.
      files: from `find_images`; the images of an .npz and of a stack are named file[i].
      tta: average over mirror images: see `predict_logits`.
      skip_bad: whether an image with bad pixels is left out alone, instead of its file.
      planes: of files with several.
      maps: whether predictions keep their deflection.
    """
    from gravlens_jax.inference import has_deflection, outputs
    from gravlens_jax.preprocess import check_image_shape

    model, variables = network
    has_maps = has_deflection(model, variables)
    for path in files:
        try:
            with named(path):
                shape, packed = network.image_shape, _is_npz(path)
                images = load_npz(path, need_labels=False).images if packed else open_images(path, planes, shape)
                check_image_shape(images.shape[1:], shape, str(path))
                bad = find_bad(path, images) if skip_bad else {}
                good = np.setdiff1d(np.arange(len(images)), list(bad))
                results: list[Prediction] = []
                for start in range(0, len(good), BATCH):
                    batch = read_rows(images, good[start : start + BATCH])
                    logits, means, *mapped = outputs(model, variables, batch, BATCH, tta, maps=has_maps)
                    scores, peaks = outlier_scores(variables.get("population"), means), np.full(len(batch), np.nan)
                    if has_maps:
                        peaks = convergence(mapped[0], network.cell_width).max((1, 2))
                    deflections = mapped[0] if maps else np.empty((len(batch), 0))
                    results += map(Prediction, softmax(logits), scores, peaks, deflections)
        except InputError as error:
            yield str(path), error
            continue
        yield from ((str(path), error) for error in bad.values())
        for row, prediction in zip(good, results, strict=True):
            yield f"{path}[{row}]" if packed or len(images) > 1 else str(path), prediction


def find_bad(path: Path, images: np.ndarray | MappedImages) -> dict[int, InputError]:
    """Returns the images of a file that `read_rows` refuses: row -> error."""
    bad = {}
    for row in range(len(images)):
        try:
            with named(path):
                read_rows(images, slice(row, row + 1))
        except InputError as error:
            bad[row] = error
    return bad


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Returns the files of images among the paths and in folders among them, also linked ones; names others on stderr.

    Hidden files are ignored in folders.
    """
    files, unread = [], []
    for path in paths:
        check(path.exists(), f"{path}: no such file or folder")
        if not path.is_dir():
            check(_is_image(path), f"{path}: expected a file that ends in {', '.join(IMAGE_SUFFIXES)} or a folder")
            files.append(path)
            continue
        visible = sorted(_walk(path))
        found = [file for file in visible if _is_image(file)]
        check(bool(found), f"{path}: contains no files that end in {', '.join(IMAGE_SUFFIXES)}")
        files += found
        unread += [file for file in visible if not _is_image(file)]
    show_unread(unread)
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all visible files in a folder and its subfolders, also linked ones, but each real folder only once."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; fix the permissions or move it away")

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(is_visible, folders))
        yield from (Path(root, name) for name in files if is_visible(name))


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def describe_prediction(network: "Network", prediction: Prediction) -> list[str]:
    """Returns the columns of an image after its name."""
    probabilities, outlier, peak, _ = prediction
    name = network.model.classes[int(probabilities.argmax())]
    return [name, *(f"{p:.6f}" for p in probabilities), f"{outlier:.3f}", "" if np.isnan(peak) else f"{peak:.4f}"]


def write_maps(out: Path, network: "Network", names: list[str], deflections: np.ndarray) -> None:
    """Writes deflections (n, cells, cells, 2), their convergence, the grid and the names of the images, atomically."""
    from gravlens_jax.inference import deflection_grid

    x, y = deflection_grid(network.model, network.image_shape)
    kappa = convergence(deflections, network.cell_width)
    arrays = {"files": np.array(names), "deflection": deflections, "convergence": kappa, "x": x, "y": y}
    write_arrays(out, arrays)


def main(
    run: cli.Run,
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")],
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    skip_bad: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    maps: Path | None = None,
    planes: cli.PlaneOptions = ONE_PLANE,
) -> None:
    """Prints one CSV line for each image: file, class, probability of each class, outlier score, peak convergence.

    The class of an image unlike those of training, with an outlier score far above 1, is unreliable; about 1 % of
    ordinary images are above 1. The convergence is that of the dark substructure, where it is largest: see --maps.
    Files that cannot be used are an error, after all others are done.

    examples:
      python scripts/predict.py pretrained dataset/val/no/1.npy
      python scripts/predict.py runs/default images packed/test.npz > predictions.csv
      python scripts/predict.py pretrained images --maps maps.npz

    Args:
        paths: files of images (.npy, FITS, .npz), or folders of them.
        tta: average the logits over each image and its three mirror images.
        skip_bad: leave out files, and single images, that cannot be used, name them, and exit with status 3.
        maps: .npz to write, with maps of the dark substructure: files (n,), deflection (n, cells, cells, 2) and
            convergence (n, cells, cells), see gravlens_jax.predict_deflection, and x and y (cells, cells) in arcsec.
    """
    from gravlens_jax.inference import check_deflection
    from gravlens_jax.network import load_network

    check(bool(paths), "no PATH given; name at least one file of images or folder of them")
    network = load_network(run)
    if maps:
        check_folder(maps)
        check_deflection(*network)
    errors: list[str] = []
    names: list[str] = []
    scores: list[float] = []
    deflections: list[np.ndarray] = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "class", *(f"p_{name}" for name in network.model.classes), "outlier", "peak_convergence"])
    for name, result in predict_files(network, find_images(paths), tta, skip_bad, planes, bool(maps)):
        if isinstance(result, InputError):
            errors.append(str(result))
            if skip_bad:
                print(f"skipped: {result}", file=sys.stderr)
        else:
            writer.writerow([name, *describe_prediction(network, result)])
            scores.append(float(result.outlier))
            if maps:
                names.append(name)
                deflections.append(result.deflection)
    if above := sum(score > 1 for score in scores):
        print(f"{above} of {len(scores)} images have an outlier score above 1; see --help", file=sys.stderr)
    if maps and names:
        write_maps(maps, network, names, np.stack(deflections))
    check(skip_bad or not errors, "; ".join(errors))
    if errors:
        sys.stdout.flush()
        raise SystemExit(3)


if __name__ == "__main__":
    cli.run_function(main)
