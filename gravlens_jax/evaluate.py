"""What a run makes of images: a report on labelled ones, probabilities for any."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax import report
from gravlens_jax.checkpoint import Which, load_run, read_run, write_atomically
from gravlens_jax.config import check
from gravlens_jax.folders import load_folder, load_image
from gravlens_jax.metrics import evaluate
from gravlens_jax.model import predict, predict_logits
from gravlens_jax.npz import Dataset, open_npz


def load_labelled(path: Path, classes: tuple[str, ...]) -> Dataset:
    """Opens labelled images for a network of `classes`: an .npz, or a folder with one folder of .npy for each class."""
    path = Path(path)
    dataset = load_folder(path, classes) if path.is_dir() else open_npz(path)
    check(
        sorted(dataset.classes) == sorted(classes),
        f"{path} has the classes {', '.join(dataset.classes)}; the network knows {', '.join(classes)}",
    )
    order = np.array([classes.index(name) for name in dataset.classes], np.int32)
    return dataset._replace(labels=order[dataset.labels], classes=classes)


def evaluate_run(run_dir: Path, dataset: Dataset, checkpoint: Which, out: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on labelled images and writes the report.

    Args:
      run_dir: the run.
      dataset: images and labels, in the run's order of classes.
      checkpoint: "best" or "final".
      out: folder for metrics.json, predictions.npz and the figures; made if needed, files of those names replaced.

    Returns:
      what metrics.json holds: see `metrics.evaluate`, and `checkpoint`.
    """
    run_dir, out = Path(run_dir), Path(out)
    _check_shape(dataset.images.shape[1:], run_dir, "the images")
    model, variables = load_run(run_dir, checkpoint)
    logits = predict_logits(model, variables, dataset.images)
    bad = np.flatnonzero(~np.isfinite(logits).all(1))
    check(not len(bad), f"image {bad[0] if len(bad) else ''}: its logits are not finite; it has NaN or infinite pixels")
    values = evaluate(logits, dataset.labels, model.classes) | {"checkpoint": checkpoint}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "metrics.json", json.dumps(values, indent=2) + "\n")
    np.savez(out / "predictions.npz", logits=logits, labels=dataset.labels, classes=np.array(model.classes))
    report.draw(out, dataset.images, logits, dataset.labels, model.classes, run_dir / "metrics.jsonl")
    return values


def predict_files(run_dir: Path, paths: list[Path]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (file, class, probabilities (classes,)) for every image of the paths.

    Args:
      run_dir: the run.
      paths: .npy files of one image, .npz files of images (named file.npz[i]), or folders, searched for both.
    """
    model, variables = load_run(run_dir)
    for path in _image_files(paths):
        if path.suffix == ".npz":
            images = open_npz(path, need_labels=False).images
            names = [f"{path}[{i}]" for i in range(len(images))]
        else:
            images, names = load_image(path)[None], [str(path)]
        _check_shape(images.shape[1:], run_dir, str(path))
        for name, probabilities in zip(names, predict(model, variables, images), strict=True):
            check(bool(np.isfinite(probabilities).all()), f"{name}: image has NaN or infinite pixels")
            yield name, model.classes[int(probabilities.argmax())], probabilities


def _check_shape(shape: tuple[int, ...], run_dir: Path, what: str) -> None:
    expected = read_run(run_dir).image_shape
    check(
        tuple(shape) == expected,
        f"{what}: {shape[0]} x {shape[1]} pixels, but {run_dir} was trained on {expected[0]} x {expected[1]}; give "
        f"images of that size and pixel scale",
    )


def _image_files(paths: list[Path]) -> list[Path]:
    files = []
    for path in map(Path, paths):
        check(path.exists(), f"{path}: no such file or folder")
        found = sorted(f for f in path.rglob("*") if f.suffix in (".npy", ".npz")) if path.is_dir() else [path]
        check(bool(found), f"{path}: no .npy or .npz files there")
        check(path.is_dir() or path.suffix in (".npy", ".npz"), f"{path}: expected a .npy or .npz file or a folder")
        files += found
    return files
