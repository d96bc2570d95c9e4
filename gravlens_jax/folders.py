"""Images from elsewhere: .npy, FITS and other .npz, of one image or of several, and folders of them, one per class."""

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax import npz
from gravlens_jax.errors import InputError, check, check_installed
from gravlens_jax.files import is_visible
from gravlens_jax.npz import Dataset, MappedImages, read_rows, scale

FITS = (".fits", ".fit", ".fts", ".fits.gz", ".fits.bz2", ".fits.fz")
SUFFIXES = (".npy", *FITS)  # in any case
LABELS = ("labels", "label", "y", "targets", "target")
PAIRS = [(images, labels) for images in ("images", "image", "x", "data") for labels in LABELS]
PAIRS += [("x_train", "y_train"), ("arr_0", "arr_1")]  # names of the arrays in an .npz from elsewhere, in lower case
FOREIGN_BYTES = 2**30  # limit for images from elsewhere that are read into memory
Classes = Mapping[str, str]  # name in the network -> name in the data
Shape = tuple[int, ...] | None  # height and width, if known


@dataclass(frozen=True)
class Planes:
    """What is read of an .npy or FITS file that holds several planes (height, width)."""

    band: int | None = None  # number, from 0, of the one plane that is read of files with several bands
    stack: bool = False  # the planes of a file are images of different lenses: read all
    hdu: str | None = None  # of FITS files, number or name. Default: SCI, or the only one with suitable images

    def __post_init__(self):
        check(self.band is None or not self.stack, "give --band for bands, or --stack for images of different lenses")


ONE_PLANE = Planes()  # several are an error


def load_npz(path: Path, label_names: Sequence[str] = (), need_labels: bool = True) -> Dataset:
    """Opens an .npz of this project, or reads one from elsewhere into memory and prints which arrays are used.

    One from elsewhere may be compressed, have other usual names of arrays (PAIRS), or no names of its classes: then
    `label_names` are those of labels 0, 1, ... `need_labels`: see `open_npz`. InputError as `open_npz`, and for unknown
    names of the classes, or more than 1 GiB to be read into memory.
    """
    with npz.open_archive(path) as (archive, members):
        if npz.is_packed(members, need_labels):
            return npz.open_npz(path, need_labels)
        images, labels = find_names(path, members, need_labels)
        if members[images].file_size > FOREIGN_BYTES:
            return npz.open_npz(path)  # raises InputError with the command that converts the file
        arrays = npz.read_members(archive, members, {labels: "ui", "classes": "U"} if need_labels else {})
        shape = npz.read_image_header(archive, members[images]).shape
        pixels = npz.read_members(archive, members, {images: "uif"}, FOREIGN_BYTES)[images].reshape(shape)
    if not need_labels:
        return Dataset(pixels, np.zeros(len(pixels), np.int32), (), {})
    classes = tuple(arrays["classes"].ravel().tolist() if "classes" in arrays else label_names)
    unnamed = f"{path} does not name its classes; give --classes with the names of labels 0, 1, ... in this order"
    check(bool(classes), unnamed)
    return Dataset(pixels, npz.check_labels(arrays[labels], len(pixels), classes, path), classes, {})


def find_names(path: Path, members: npz.Members, need_labels: bool = True) -> tuple[str, str]:
    """Returns the names of the arrays of images and of labels in an .npz from elsewhere: the first complete of PAIRS.

    Names other than images and labels, and what is left out, are printed; InputError if there are none.
    """
    names = {name.lower(): name for name in members}
    known = [pair for pair in PAIRS if pair[0] in names]
    images, labels = min(known, key=lambda pair: pair[1] not in names, default=PAIRS[0])
    found = names.get(images, images), names.get(labels, labels)
    for name in found if need_labels else found[:1]:
        check(name in members, f"{path}: has no {name!r}, only {', '.join(sorted(members)) or 'nothing':.200}")
    if found != PAIRS[0]:
        others = sorted(members.keys() - {*found, "classes", "info"})
        text = f"{path}: images are {found[0]!r}" + f", labels are {found[1]!r}" * (found[1] in members)
        print(text + f"; left out: {', '.join(others):.400}" * bool(others), file=sys.stderr)
    return found


def open_images(path: Path, planes: Planes = ONE_PLANE, shape: Shape = None) -> np.ndarray | MappedImages:
    """Returns the images of a file, (n, height, width); those of .npy are not read yet: see `read_rows`.

    The file's name ends in one of SUFFIXES; it holds one plane (height, width), or several along the first axis, or up
    to four along the last one; axes of length 1 are ignored. `planes` chooses among several. If a FITS file has several
    images, `shape` (height, width) finds the right one. InputError if it is unreadable or ambiguous, or has Python
    objects, another shape, or more than 64 bits a pixel.
    """
    check(path.is_file(), f"{path}: no such file")
    if path.name.lower().endswith(FITS):
        return _open_fits(path, planes, shape)
    try:
        with open(path, "rb") as file:
            header = npz.read_header(file, os.stat(path).st_size, "uif", str(path))
            lengths, rows, last = _find_planes(header.shape, planes, str(path))
            if not (header.fortran_order or last):
                n, plane = rows.stop - rows.start, math.prod(lengths[1:]) * header.dtype.itemsize
                return npz.map_images(file, header.dtype, header.offset + rows.start * plane, (n, *lengths[1:]))
        return choose_planes(np.load(path, allow_pickle=False), planes, str(path))
    except OSError as error:
        raise InputError(f"{path}: not a readable .npy ({error})") from error


def choose_planes(array: np.ndarray, planes: Planes, where: str) -> np.ndarray:
    """Returns the images (n, height, width) of an array of one plane or of several: see `open_images`."""
    lengths, rows, last = _find_planes(array.shape, planes, where)
    array = array.reshape(lengths)
    return np.ascontiguousarray((np.moveaxis(array, 2, 0) if last else array)[rows])


def _find_planes(shape: tuple[int, ...], planes: Planes, where: str) -> tuple[tuple[int, ...], slice, bool]:
    """Returns the shape with three axes, the chosen planes, and whether they are along the last axis."""
    lengths = tuple(length for length in shape if length > 1)
    right = len(shape) <= 4 and len(lengths) in (2, 3) and 0 not in shape
    check(right, f"{where}: images have shape {shape}, expected (height, width), or several such planes")
    if len(lengths) == 2:
        lengths = (1, *lengths)
    last = lengths[0] > 1 and lengths[2] <= 4
    n, band = lengths[2 if last else 0], planes.band
    several = f"{where}: {n} planes in an array of shape {shape}"
    chosen = n == 1 or planes.stack or band is not None
    check(chosen, f"{several}; give --band 0 to {n - 1}, or --stack if they are images of different lenses")
    band = band or 0
    check(0 <= band < n, f"{several}, but --band {band}; expected 0 to {n - 1}")
    return lengths, slice(0, n) if planes.stack else slice(band, band + 1), last


def read_images(path: Path, shape: Shape = None, planes: Planes = ONE_PLANE) -> np.ndarray:
    """Returns the images of a file, (n, height, width), as `read_rows` does; InputError also if not of `shape`."""
    images = open_images(path, planes, shape)
    (height, width), expected = images.shape[1:], " x ".join(map(str, shape or ()))
    check(shape in (None, (height, width)), f"{path}: image has {height} x {width} pixels, expected {expected}")
    with named(path):
        return read_rows(images, slice(None))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the name of the file to an InputError without it: about images in memory."""
    try:
        yield
    except InputError as error:
        if path.name in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def list_classes(path: Path) -> tuple[str, ...]:
    """Returns the names of the folders in a folder, sorted; or of the classes that an .npz names, () for none."""
    if path.is_dir():
        return tuple(sorted(f.name for f in path.iterdir() if f.is_dir() and is_visible(f.name)))
    with npz.open_archive(path) as (archive, members):
        return tuple(npz.read_members(archive, members, {"classes": "U"}).get("classes", np.zeros(0)).ravel().tolist())


def list_folder(folder: Path, names: Sequence[str]) -> tuple[list[Path], np.ndarray]:
    """Returns the image files of `folder/<name>/`, numbers in numerical order, and the label of each, int32 (files,).

    The paths of other visible files there, and of other folders, are printed to stderr.
    """
    files, labels, unread = [], [], [folder / name for name in list_classes(folder) if name not in names]
    check(bool(names), f"{folder}: no folders there; expected one folder of images for each class")
    for label, name in enumerate(names):
        class_folder = folder / name
        found = [f for f in class_folder.iterdir() if is_visible(f.name)] if class_folder.is_dir() else []
        stems = {f: f.name.partition(".")[0] for f in found if f.name.lower().endswith(SUFFIXES)}
        images = sorted(stems, key=lambda f: (not stems[f].isdecimal(), stems[f].zfill(20), f.name))
        expected = f"one folder for each of the classes {', '.join(names)} (name other ones with --classes)"
        check(bool(images), f"{class_folder}: no {', '.join(SUFFIXES)} files there; expected {expected}")
        files += images
        labels += [label] * len(images)
        unread += sorted(set(found) - set(images))
    show_unread(unread)
    return files, np.array(labels, np.int32)


def show_unread(files: Iterable[Path]) -> None:
    """Prints the paths of files that are not read to stderr."""
    if text := ", ".join(map(str, files)):
        print(f"not read: {text}", file=sys.stderr)


def load_labelled(
    path: Path, classes: Classes, label_names: Sequence[str] = (), planes: Planes = ONE_PLANE, shape: Shape = None
) -> Dataset:
    """Opens an .npz, see `load_npz`, or reads a folder with one folder of images for each class, scaled to [0, 1].

    Labels of the result index the keys of `classes`. Other folders are not read; an .npz must have just these names.
    `planes` and `shape` (height, width): see `open_images`.
    """
    names = tuple(classes.values())
    if path.is_dir():
        files, file_labels = list_folder(path, names)
        size, origins = open_images(files[0], planes, shape).shape[1:], []
        stacks = [np.stack([scale(image) for image in read_images(file, size, planes)]) for file in files]
        for file, stack in zip(files, stacks, strict=True):
            origins += [f"{file.parent.name}/{file.name}" + f"[{i}]" * (len(stack) > 1) for i in range(len(stack))]
        labels = np.repeat(file_labels, [len(stack) for stack in stacks])
        return Dataset(np.concatenate(stacks), labels, tuple(classes), {"files": origins})
    check(planes == ONE_PLANE, f"{path}: --band, --stack and --hdu are for .npy and FITS files; leave them out")
    dataset = load_npz(path, label_names)
    has = f"{path} has the classes {', '.join(dataset.classes)}; expected {', '.join(names)}"
    hint = "give --classes a name for each of the file's classes (name=name in the file where they differ)"
    check(sorted(dataset.classes) == sorted(names), f"{has}: {hint}")
    order = np.array([names.index(name) for name in dataset.classes], np.int32)
    return dataset._replace(labels=order[dataset.labels], classes=tuple(classes))


def digest(image: np.ndarray) -> bytes:
    """Returns 16 bytes that identify an image (height, width) as scaled to [0, 1]."""
    return hashlib.blake2b(scale(image).tobytes(), digest_size=16).digest()


def show_notices(splits: Mapping[str, tuple[Sequence[bytes], np.ndarray]], classes: Sequence[str]) -> None:
    """Names on stderr identical images in two splits or under two labels, and classes of very different numbers.

    `splits` are the digests of the images of each split, and their labels, int32 (n,), which index `classes`.
    """
    seen: dict[bytes, tuple[str, int]] = {}
    copies = [
        (seen.setdefault(key, (name, label)), (name, label))
        for name, (keys, labels) in splits.items()
        for key, label in zip(keys, labels.tolist(), strict=True)
    ]
    for i, what in enumerate(("in another split, too: the metrics are too good", "under another label, too")):
        if count := sum(first[i] != other[i] for first, other in copies):
            print(f"notice: {count} of {len(copies)} images are {what}", file=sys.stderr)
    counts = np.bincount(np.concatenate([labels for _, labels in splits.values()]), minlength=len(classes))
    if counts.max() > 3 * counts.min():
        numbers = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
        print(f"notice: very different numbers of images ({numbers}): the rare class is learnt less", file=sys.stderr)


def _open_fits(path: Path, planes: Planes, shape: Shape) -> np.ndarray:
    """Reads the images of one HDU; astropy may fail in many ways on a damaged file."""
    check_installed("astropy", str(path), '"gravlens_jax[fits]"')
    from astropy.io import fits

    kinds = fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            hdus = enumerate(islice(fits.open(file, memmap=False), 100))  # damaged files can seem endless
            found = [(i, hdu) for i, hdu in hdus if isinstance(hdu, kinds) and 2 <= len(hdu.shape) <= 4]
            hdu = _choose_hdu(path, found, planes.hdu, shape)
            size, most = math.prod(hdu.shape) * abs(hdu.header["BITPIX"]) // 8, FOREIGN_BYTES
            check(size <= most, f"{path} would unpack to {size:,} bytes, expected at most {most:,}")
            return choose_planes(np.asarray(hdu.data), planes, str(path))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable FITS file ({error!r:.200})") from error


def _choose_hdu(path: Path, found: list[tuple[int, Any]], wanted: str | None, shape: Shape) -> Any:
    """Returns the wanted one of several (number, HDU): SCI, or the only one of `shape`, or with two axes."""
    check(bool(found), f"{path}: holds no image of 2 to 4 axes")
    names = {i: f"{i} {hdu.name} ({' x '.join(map(str, hdu.shape))})" for i, hdu in found}
    if wanted:
        chosen = [(i, hdu) for i, hdu in found if wanted.upper() in (str(i), hdu.name)]
    else:
        science = [(i, hdu) for i, hdu in found if hdu.name == "SCI"]
        right = [(i, hdu) for i, hdu in found if (hdu.shape[-2:] == shape if shape else len(hdu.shape) == 2)]
        chosen = science or right or found
    several = f"{path}: has the images {', '.join(names.values())}; choose one with --hdu"
    check(len(chosen) == 1, several + f", not {wanted}" * bool(wanted))
    if len(found) > 1:
        _name_hdu(names[chosen[0][0]])
    return chosen[0][1]


@cache
def _name_hdu(name: str) -> None:
    print(f"FITS files with several images: HDU {name} is read", file=sys.stderr)  # once for all of a kind
