"""Folders of .npy images in the public layout, {train,val}/<class>/<n>.npy, and packing them into .npz."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from gravlens_jax.archive import read_header
from gravlens_jax.config import CLASSES, InputError, check
from gravlens_jax.npz import Dataset, write_npz


def list_classes(folder: Path) -> tuple[str, ...]:
    """Returns the names of the folders in `folder`, sorted."""
    return tuple(sorted(f.name for f in Path(folder).iterdir() if f.is_dir() and not f.name.startswith(".")))


def list_folder(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], np.ndarray]:
    """Returns the .npy files of `folder/<class>/`, numbers in numerical order, and their labels int32 (n,)."""
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            (Path(folder) / name).glob("*.npy"), key=lambda f: (not f.stem.isdecimal(), f.stem.zfill(20), f.stem)
        )
        check(
            bool(found),
            f"{Path(folder) / name}: no .npy files there; expected one folder for each of the classes "
            f"{', '.join(classes)} (name other ones with --classes)",
        )
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int32)


def load_image(path: Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Reads one image, (height, width) of any real dtype up to 64 bits.

    Its .npy has shape (height, width) or (1, height, width).

    Raises:
      InputError: unreadable, Python objects, another shape than `shape`, more than 64 bits a pixel, NaN or infinite
        pixels.
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
    check(bool(np.isfinite(image).all()), f"{path}: image has NaN or infinite pixels; remove it or mend it")
    return image


def load_folder(folder: Path, classes: tuple[str, ...]) -> Dataset:
    """Reads all images of `folder/<class>/*.npy` into memory, as float32."""
    files, labels = list_folder(folder, classes)
    shape = load_image(files[0]).shape
    images = np.stack([load_image(file, shape).astype(np.float32) for file in files])
    return Dataset(images, labels, classes, {"files": [f"{file.parent.name}/{file.name}" for file in files]})


def split_indices(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices in two, stratified by label: sorted int arrays, the second with `fraction` of each class."""
    rng = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        parts.append(members[: round(fraction * len(members))])
    second = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), second), second


def pack(
    source: Path,
    out: Path,
    dtype: str = "float32",
    classes: tuple[str, ...] = CLASSES,
    test_fraction: float = 0.5,
    seed: int = 0,
    progress: Callable[[Iterable, str, int], Iterable] = lambda items, name, total: items,
) -> dict[str, int]:
    """Packs `source/{train,val}/<class>/*.npy` into `out/{train,val,test}.npz`; returns the number of images of each.

    val is split into val and test, stratified, by `seed`; the files of each split are recorded in its `info`.

    Args:
      source: the public layout; either of train and val may be missing.
      out: folder of the .npz files; existing ones are refused.
      dtype: "float32" or "float16", of the stored images.
      classes: folder names, in the order of the labels.
      test_fraction: of val that becomes test, in [0, 1).
      seed: of the split.
      progress: wraps the loop over the files: (files, split, number of files) -> files.
    """
    source, out = Path(source), Path(out)
    check(dtype in ("float16", "float32"), f"dtype={dtype!r}: expected float16 or float32")
    check(0 <= test_fraction < 1, f"test_fraction={test_fraction}: expected a number in [0, 1)")
    folders = [name for name in ("train", "val") if (source / name).is_dir()]
    check(bool(folders), f"{source}: has neither train/ nor val/; expected {source}/train/{classes[0]}/1.npy and so on")
    todo = {}
    for name in folders:
        files, labels = list_folder(source / name, classes)
        if name == "train" or test_fraction == 0:
            todo[name] = files, labels
        else:
            val, test = split_indices(labels, test_fraction, seed)
            todo |= {s: ([files[i] for i in part], labels[part]) for s, part in (("val", val), ("test", test))}
    for name in todo:
        check(not (out / f"{name}.npz").exists(), f"{out / name}.npz exists; remove it or choose another folder")
    shape = load_image(next(iter(todo.values()))[0][0]).shape
    for name, (files, labels) in todo.items():
        check(len(files) > 0, f"{name}: no images are left for it with test_fraction={test_fraction}")

        def chunks(files=files, name=name):
            for file in progress(files, name, len(files)):
                image = load_image(file, shape).astype(dtype)
                check(bool(np.isfinite(image).all()), f"{file}: pixels overflow {dtype}; use --dtype float32")
                yield image[None]

        info = {
            "source": source.name,
            "files": [f"{file.parent.parent.name}/{file.parent.name}/{file.name}" for file in files],
            "split": None if name == "train" else {"seed": seed, "test_fraction": test_fraction},
        }
        write_npz(out / f"{name}.npz", chunks(), (len(files), *shape), np.dtype(dtype), labels, classes, info)
    return {name: len(files) for name, (files, _) in todo.items()}
