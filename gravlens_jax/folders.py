"""Images in files of their own: .npy and FITS, of one image or of several, and folders of them, one for each class."""

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from gravlens_jax.errors import InputError, check, check_installed
from gravlens_jax.npz import MAX_RATIO, MEMORY_BYTES, Dataset, is_visible, open_npz
from gravlens_jax.pixels import as_stack, map_images, read_image_header, read_rows, scale

FITS = (".fits", ".fit", ".fts", ".fits.gz")
SUFFIXES = (".npy", *FITS)  # in any case
Classes = tuple[str, ...] | Mapping[str, str]  # names, or name -> name in the data


def is_image_file(path: Path) -> bool:
    """Returns whether `open_images` reads a file, by its name; hidden files are none."""
    return path.name.lower().endswith(SUFFIXES) and is_visible(path.name)


def open_images(path: Path) -> np.ndarray:
    """Returns the images of a file, (n, height, width); those of .npy are a memory map, read by `read_rows`.

    Args:
      path: a file whose name ends in one of SUFFIXES: (height, width) or (n, height, width), perhaps with an axis of
        length 1 for the channel. Of FITS, the first image of 2 to 4 axes.

    Raises:
      InputError: unreadable, Python objects, another shape, more than 64 bits a pixel.
    """
    path = Path(path)
    check(path.is_file(), f"{path}: no such file")
    if path.name.lower().endswith(FITS):
        return _open_fits(path)
    try:
        with open(path, "rb") as file:
            header = read_image_header(file, os.stat(path).st_size, str(path))
            if not header.fortran_order:
                return map_images(file, header.dtype, header.offset, header.shape)
        return np.ascontiguousarray(np.load(path, allow_pickle=False)).reshape(header.shape)
    except OSError as error:
        raise InputError(f"{path}: not a readable .npy ({error})") from error


def read_images(path: Path, shape: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Yields the images (height, width) of a file, as `read_rows` returns them: finite pixels of the stored order.

    Raises:
      InputError: as `open_images` and `read_rows`; another shape than `shape`. It names file and image.
    """
    images = open_images(path)
    (height, width), expected = images.shape[1:], " x ".join(map(str, shape or ()))
    check(shape in (None, (height, width)), f"{path}: image has {height} x {width} pixels, expected {expected}")
    for row in range(len(images)):
        with named(path):
            (image,) = read_rows(images, slice(row, row + 1))
        yield image


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the name of the file to an InputError without it: about images in memory."""
    try:
        yield
    except InputError as error:
        if path.name in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def list_classes(folder: Path) -> tuple[str, ...]:
    """Returns the names of the folders in `folder`, sorted."""
    return tuple(sorted(f.name for f in Path(folder).iterdir() if f.is_dir() and is_visible(f.name)))


def list_folder(folder: Path, classes: Classes) -> tuple[list[Path], np.ndarray]:
    """Returns the image files of `folder/<class>/`, numbers in numerical order, and the label of each, int32 (files,).

    Other visible files there, and other folders, are named on stderr.
    """
    names = names_in_data(classes)
    files, labels, unread = [], [], [Path(folder) / name for name in list_classes(folder) if name not in names]
    check(bool(names), f"{folder}: no folders there; expected one folder of images for each class")
    for label, name in enumerate(names):
        own = Path(folder) / name
        found = [f for f in own.iterdir() if is_visible(f.name)] if own.is_dir() else []
        images = sorted(filter(is_image_file, found), key=_number)
        expected = f"one folder for each of the classes {', '.join(names)} (name other ones with --classes)"
        check(bool(images), f"{own}: no {', '.join(SUFFIXES)} files there; expected {expected}")
        files += images
        labels += [label] * len(images)
        unread += sorted(set(found) - set(images))
    show_unread(unread)
    return files, np.array(labels, np.int32)


def names_in_data(classes: Classes) -> tuple[str, ...]:
    """Returns the names that the data have for classes."""
    return tuple(classes.values() if isinstance(classes, Mapping) else classes)


def show_unread(files: Iterable[Path]) -> None:
    """Names files that are not read on stderr."""
    if text := ", ".join(map(str, files)):
        print(f"not read: {text}", file=sys.stderr)


def load_folder(folder: Path, classes: Classes) -> Dataset:
    """Reads all images of `folder/<class>/` into memory, float32, each scaled to [0, 1]."""
    files, of_file = list_folder(folder, classes)
    shape = open_images(files[0]).shape[1:]
    images, labels, names = [], [], []
    for file, label in zip(files, of_file, strict=True):
        own = [scale(image) for image in read_images(file, shape)]
        images += own
        labels += [label] * len(own)
        names += [f"{file.parent.name}/{file.name}" + (f"[{i}]" if len(own) > 1 else "") for i in range(len(own))]
    return Dataset(np.stack(images), np.array(labels, np.int32), tuple(classes), {"files": names})


def load_labelled(path: Path, classes: Classes) -> Dataset:
    """Opens an .npz, or a folder with one for each class; labels index `classes`, InputError if it has others."""
    path, names = Path(path), names_in_data(classes)
    if path.is_dir():
        return load_folder(path, classes)
    dataset = open_npz(path)
    found, expected = ", ".join(dataset.classes), ", ".join(names)
    hint = "give --classes a name for each of the file's classes (own=theirs where they differ)"
    check(sorted(dataset.classes) == sorted(names), f"{path} has the classes {found}; expected {expected}: {hint}")
    order = np.array([names.index(name) for name in dataset.classes], np.int32)
    return dataset._replace(labels=order[dataset.labels], classes=tuple(classes))


def _number(path: Path) -> tuple:
    stem = path.name.partition(".")[0]
    return not stem.isdecimal(), stem.zfill(20), path.name


def _open_fits(path: Path) -> np.ndarray:
    """Reads the first image of 2 to 4 axes; astropy may fail in many ways on a damaged file."""
    check_installed("astropy", str(path), '"gravlens_jax[fits]"')
    from astropy.io import fits

    limit = max(MEMORY_BYTES, MAX_RATIO * path.stat().st_size)
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            for hdu in islice(fits.open(file, memmap=False), 100):  # damaged files can seem endless
                if isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU) and 2 <= len(hdu.shape) <= 4:
                    shape, size = as_stack(hdu.shape, str(path)), math.prod(hdu.shape) * abs(hdu.header["BITPIX"]) // 8
                    check(size <= limit, f"{path} would unpack to {size:,} bytes, expected at most {limit:,}")
                    return np.asarray(hdu.data).reshape(shape)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable FITS file ({error!r:.200})") from error
    raise InputError(f"{path}: holds no image of 2 to 4 axes")
