"""What a run makes of images: a report on labelled ones, probabilities for any."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax.checkpoint import Which, load_checkpoint, save_temperatures
from gravlens_jax.config import check
from gravlens_jax.data import take_rows
from gravlens_jax.explain import saliency
from gravlens_jax.files import write_atomically, writing
from gravlens_jax.folders import load_folder, load_image
from gravlens_jax.mesh import is_main
from gravlens_jax.metrics import calibration_error, evaluate, fit_temperature, intervals, softmax
from gravlens_jax.model import predict, predict_logits
from gravlens_jax.npz import Dataset, is_copy, open_npz
from gravlens_jax.run import read_history
from gravlens_jax.weights import Network, load_network


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


def calibrate_run(run_dir: Path, dataset: Dataset) -> None:
    """Fits the temperatures of a run's checkpoints on images it was not trained on, for `load_run` to use."""
    temperatures = {}
    for which in ("best", "final"):
        model, variables, step = load_checkpoint(run_dir, which)
        if step not in temperatures:
            temperatures[step] = fit_temperature(predict_logits(model, variables, dataset.images), dataset.labels)
    if is_main():
        save_temperatures(run_dir, temperatures)


def evaluate_run(
    run: str | Path, dataset: Dataset, checkpoint: Which, out: Path | None, tta: bool = False
) -> dict[str, Any]:
    """Evaluates a checkpoint on labelled images and writes the report.

    Args:
      run: a run, or another source of `load_network`.
      dataset: images and labels, in the run's order of classes.
      checkpoint: "best" or "final".
      out: folder for metrics.json, predictions.npz and the figures; made if needed, files of those names replaced.
        None to write nothing.
      tta: average over mirror images: see `predict_logits`.

    Returns:
      what metrics.json holds: see `metrics.evaluate`; and `checkpoint`, `tta`, `interval_95` (see `metrics.intervals`),
      `temperature` and `ece_uncalibrated`, without it.
    """
    model, variables, image_shape, temperature = load_network(run, checkpoint)
    _check_shape(dataset.images.shape[1:], image_shape, "the images")
    logits = predict_logits(model, variables, dataset.images, tta=tta)
    bad = np.flatnonzero(~np.isfinite(logits).all(1))
    check(not len(bad), f"image {bad[0] if len(bad) else ''}: its logits are not finite; it has NaN or infinite pixels")
    values = evaluate(logits, dataset.labels, model.classes) | {
        "checkpoint": checkpoint,
        "tta": tta,
        "interval_95": intervals(logits, dataset.labels, model.classes),
        "temperature": temperature,
        "ece_uncalibrated": calibration_error(softmax(logits * temperature), dataset.labels),
    }
    if out is None:
        return values
    from gravlens_jax import report  # and Matplotlib, which takes a third of a second

    history = read_history(Path(run) / "metrics.jsonl")
    right = logits.argmax(1) == dataset.labels
    rows = np.concatenate([np.flatnonzero(right & (dataset.labels == k))[:3] for k in range(len(model.classes))])
    arrays = io.BytesIO()
    np.savez(arrays, logits=logits, labels=dataset.labels, classes=np.array(model.classes))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "metrics.json", json.dumps(values, indent=2) + "\n")
        write_atomically(out / "predictions.npz", arrays.getvalue())
        report.draw(out, dataset.images, logits, dataset.labels, model.classes, history)
        if len(rows):
            images = take_rows(dataset.images, rows)
            maps = saliency(model, variables, images)
            report.draw_saliency(out / "saliency.png", images, maps, dataset.labels[rows], model.classes)
    return values


def table(values: dict[str, Any], where: Path) -> str:
    """Returns what `evaluate_run` does as a small text table, and where the report is."""
    auc = values["auc"] | {"macro": values["macro_auc"]}
    confusion = zip(values["classes"], values["confusion"], strict=True)
    recall = {name: f"{row[k] / max(1, sum(row)):.3f}" for k, (name, row) in enumerate(confusion)}
    low, high = values["interval_95"]["accuracy"]
    lines = [
        f"{values['n']:,} images, {values['checkpoint']} checkpoint",
        f"  accuracy {values['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})   loss {values['loss']:.4f}",
        f"  calibration error {values['ece']:.4f} ({values['ece_uncalibrated']:.4f} without its temperature)",
        "  recall   " + "   ".join(f"{name} {value}" for name, value in recall.items()),
        "  AUC      " + "   ".join(f"{name} {'-' if v is None else f'{v:.4f}'}" for name, v in auc.items()),
        f"report: {where}",
    ]
    return "\n".join(lines)


def predict_files(network: Network, paths: Iterable[Path], tta: bool = False) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (file, class, probabilities (classes,)) for every image of the paths.

    Args:
      network: from `load_network`.
      paths: .npy files of one image, .npz files of images (named file.npz[i]), or folders, searched for both.
      tta: average over mirror images: see `predict_logits`.
    """
    model, variables, image_shape, _ = network
    for path in _image_files(paths):
        if path.suffix == ".npz":
            images = open_npz(path, need_labels=False).images
            names = [f"{path}[{i}]" for i in range(len(images))]
        else:
            images, names = load_image(path)[None], [str(path)]
        _check_shape(images.shape[1:], image_shape, str(path))
        for name, probabilities in zip(names, predict(model, variables, images, tta=tta), strict=True):
            check(bool(np.isfinite(probabilities).all()), f"{name}: image has NaN or infinite pixels")
            yield name, model.classes[int(probabilities.argmax())], probabilities


def _check_shape(shape: tuple[int, ...], expected: tuple[int, int], what: str) -> None:
    check(
        tuple(shape) == expected,
        f"{what}: {shape[0]} x {shape[1]} pixels, but the network was trained on {expected[0]} x {expected[1]}; give "
        f"images of that size and pixel scale",
    )


def _image_files(paths: Iterable[Path]) -> list[Path]:
    files = []
    for path in map(Path, paths):
        check(path.exists(), f"{path}: no such file or folder")
        found = [path]
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in (".npy", ".npz") and not is_copy(f))
        check(bool(found), f"{path}: no .npy or .npz files there")
        check(path.is_dir() or path.suffix in (".npy", ".npz"), f"{path}: expected a .npy or .npz file or a folder")
        files += found
    return files
