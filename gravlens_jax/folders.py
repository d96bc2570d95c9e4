"""Folders of .npy images, <class>/<n>.npy, and single .npy images."""

import os
from pathlib import Path

import numpy as np

from gravlens_jax.errors import InputError, check
from gravlens_jax.npz import Dataset, open_npz, read_header


def list_classes(folder: Path) -> tuple[str, ...]:
    """Returns the names of the folders in `folder`, sorted."""
    return tuple(sorted(f.name for f in Path(folder).iterdir() if f.is_dir() and not f.name.startswith(".")))


def list_folder(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], np.ndarray]:
    """Returns the .npy files of `folder/<class>/`, numbers in numerical order, and their labels int32 (n,)."""
    files, labels = [], []
    for label, name in enumerate(classes):
        own = Path(folder) / name
        found = sorted(own.glob("*.npy"), key=lambda f: (not f.stem.isdecimal(), f.stem.zfill(20), f.stem))
        expected = f"one folder for each of the classes {', '.join(classes)} (name other ones with --classes)"
        check(bool(found), f"{own}: no .npy files there; expected {expected}")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int32)


def load_image(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Reads one image of shape (height, width) or (1, height, width); returns (height, width), any real dtype.

    Raises:
      InputError: unreadable, Python objects, another shape than `shape`, more than 64 bits a pixel, NaN or infinite
        pixels, pixels beyond float32.
    """
    try:
        with open(path, "rb") as file:
            read_header(file, os.stat(path).st_size, "uif", str(path))
        image = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: not a readable .npy ({error})") from error
    stored = image.shape
    if image.ndim == 3 and stored[0] == 1:
        image = image[0]
    expected = f"(1, {shape[0]}, {shape[1]}) or {shape}" if shape else "(1, height, width) or (height, width)"
    check(image.ndim == 2 and shape in (None, image.shape), f"{path}: image has shape {stored}, expected {expected}")
    check(image.dtype.itemsize <= 8, f"{path}: image is {image.dtype}, expected at most 64 bits a pixel")
    finite = bool((np.abs(image) <= np.finfo(np.float32).max).all())
    check(finite, f"{path}: image has NaN or infinite pixels, or pixels beyond float32; fix or remove it")
    return image


def load_folder(folder: Path, classes: tuple[str, ...]) -> Dataset:
    """Reads all images of `folder/<class>/*.npy` into memory, as float32."""
    files, labels = list_folder(folder, classes)
    shape = load_image(files[0]).shape
    images = np.stack([load_image(file, shape).astype(np.float32) for file in files])
    return Dataset(images, labels, classes, {"files": [f"{file.parent.name}/{file.name}" for file in files]})


def load_labelled(path: Path, classes: tuple[str, ...]) -> Dataset:
    """Opens an .npz, or a folder with one for each class; labels index `classes`, InputError if it has others."""
    path = Path(path)
    dataset = load_folder(path, classes) if path.is_dir() else open_npz(path)
    message = f"{path} has the classes {', '.join(dataset.classes)}; the network knows {', '.join(classes)}"
    check(sorted(dataset.classes) == sorted(classes), message)
    order = np.array([classes.index(name) for name in dataset.classes], np.int32)
    return dataset._replace(labels=order[dataset.labels], classes=classes)
