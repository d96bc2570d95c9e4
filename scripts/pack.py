"""Packs folders of images into memory-mappable .npz files."""

import io
import math
import os
import pickle
import pickletools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from gravlens_jax import cli, npz
from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import temporary_name
from gravlens_jax.folders import (
    ONE_PLANE,
    Classes,
    Planes,
    choose_planes,
    digest,
    find_names,
    list_classes,
    list_folder,
    named,
    open_images,
    show_notices,
    show_unread,
)
from gravlens_jax.npz import read_rows, scale, write_npz
from gravlens_jax.progress import show_progress

# All that NumPy writes for [image, mass], and Python 3 for bytes in protocol 2; NumPy 1 names numpy._core numpy.core.
FUNCTIONS = {"dtype": "numpy", "ndarray": "numpy", "encode": "_codecs"}
FUNCTIONS |= {"_reconstruct": "numpy._core.multiarray", "scalar": "numpy._core.multiarray"}
OPCODES = re.compile(
    "PROTO|FRAME|STOP|(STACK_)?GLOBAL|REDUCE|BUILD|MARK|NONE|NEWTRUE|NEWFALSE|BININT[12]?|BINFLOAT|BINGET|BINPUT|"
    "MEMOIZE|(SHORT_)?BIN(BYTES|UNICODE)|EMPTY_LIST|APPENDS?|(EMPTY_)?TUPLE|TUPLE[123]"
)
DEFAULT_CLASSES = {name: name for name in CLASSES}
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # in any case
MAX_OPCODES = 200  # NumPy writes about 100


class Images(NamedTuple):
    """Labelled images of a split, not read yet."""

    places: list[tuple[Path, int | None]]  # file, and row in a file of several images
    labels: np.ndarray  # int32 (n,)
    masses: np.ndarray  # float32 (n,), NaN where the file gives none
    shape: tuple[int, ...]  # height and width

    def take(self, rows: np.ndarray) -> "Images":
        """Returns some of the images."""
        return Images([self.places[row] for row in rows], self.labels[rows], self.masses[rows], self.shape)


class Call(NamedTuple):
    """A call of one of FUNCTIONS in a pickle, which is not made."""

    function: str
    arguments: tuple
    state: list  # what the result's __setstate__ would get

    def __setstate__(self, state: Any) -> None:
        self.state.append(state)


class CallReader(pickle.Unpickler):
    """Reads a pickle without calling anything: restoring the state of a NumPy dtype could already crash Python."""

    def find_class(self, module: str, name: str) -> Callable[..., Call]:
        """Returns a function that makes a Call."""
        known = FUNCTIONS.get(name) == module.replace("numpy.core", "numpy._core")
        check(known, f"it names {module}.{name}")
        return lambda *arguments: Call(name, arguments, [])


def read_pair(data: bytes) -> tuple[np.ndarray, float]:
    """Returns the image (any shape) and the mass of the pickle of an object array [image, mass].

    Raises:
      Exception: of any kind, if the pickle holds anything else; nothing in it is executed.
    """
    opcodes = [opcode.name for opcode, _, _ in islice(pickletools.genops(data), MAX_OPCODES)]
    check("STOP" in opcodes, f"more than {MAX_OPCODES} opcodes")
    for opcode in opcodes:
        check(OPCODES.fullmatch(opcode) is not None, f"opcode {opcode}")
    pair = CallReader(io.BytesIO(data)).load()
    _, shape, dtype, _, (image, mass) = _state(pair, "_reconstruct")
    check(shape == (2,) and dtype.arguments[0] in ("O", "O4", "O8"), "not two objects")
    _, shape, dtype, fortran_order, pixels = _state(image, "_reconstruct")
    array = np.frombuffer(_bytes(pixels), _dtype(dtype)).reshape(shape, order="F" if fortran_order else "C")
    if isinstance(mass, Call):
        check(mass.function == "scalar", "the mass is not a number")
        (mass,) = np.frombuffer(_bytes(mass.arguments[1]), _dtype(mass.arguments[0])).tolist()
    check(type(mass) in (int, float), "the mass is not a number")
    check(abs(mass) <= float(np.finfo(np.float32).max), f"the mass is {mass}, not a finite float32")
    return array, float(mass)


def _state(call: Any, function: str) -> tuple:
    check(isinstance(call, Call) and call.function == function, "not an array")
    (state,) = call.state
    return state


def _dtype(call: Call) -> np.dtype:
    """Returns a dtype of real numbers, of at most 64 bits."""
    order, code = _state(call, "dtype")[1], call.arguments[0]
    check(re.fullmatch("[<>|][fiu][1248]", order + code) is not None, f"numbers of dtype {order}{code}")
    return np.dtype(order + code)


def _bytes(value: Any) -> bytes:
    """Returns bytes that are pickled as such, or in protocol 2 as a call of encode."""
    if isinstance(value, Call) and value.function == "encode":
        value, _ = value.arguments
    return value.encode("latin1") if isinstance(value, str) else value


def open_file(path: Path, planes: Planes = ONE_PLANE) -> tuple[np.ndarray | npz.MappedImages, float]:
    """Returns the images (n, height, width) of a file, and the mass of [image, mass], otherwise NaN.

    Raises:
      InputError: as `open_images`, except for Python objects that are one image and its mass.
    """
    try:
        return open_images(path, planes), math.nan
    except InputError:
        if (data := _pickled_pair(path)) is None:
            raise
    try:
        image, mass = read_pair(data)
        return choose_planes(image, ONE_PLANE, str(path)), mass
    except Exception as error:  # damaged pickles fail in many ways
        message = f"{path}: holds Python objects other than one image and its mass, which are never unpickled"
        raise InputError(f"{message} ({error!s:.200}); save it again with numpy.save(path, image)") from error


def _pickled_pair(path: Path) -> bytes | None:
    """Returns the pickle in an .npy of two Python objects; None for any other file."""
    try:
        with open(path, "rb") as file:
            check(np.lib.format.read_magic(file) == (1, 0), "longer than the header of such a file")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return file.read() if (shape, dtype) == ((2,), np.dtype(object)) else None
    except Exception:  # see read_header
        return None


def list_images(folder: Path, classes: Classes, planes: Planes, shape: tuple[int, ...] | None = None) -> Images:
    """Finds the images of `folder/<class>/` and checks their headers and, if given, their shape (height, width)."""
    places: list[tuple[Path, int | None]] = []
    labels, masses = [], []
    for file, label in zip(*list_folder(folder, tuple(classes.values())), strict=True):
        images, mass = open_file(file, planes)
        n, height, width = images.shape
        shape = shape or (height, width)
        expected = f"expected {shape[0]} x {shape[1]} as before"
        check(shape == (height, width), f"{file}: image has {height} x {width} pixels, {expected}")
        places += [(file, row) for row in range(n)] if n > 1 else [(file, None)]
        labels += [label] * n
        masses += [mass] * n
    assert shape is not None  # `list_folder` finds at least one file
    return Images(places, np.array(labels, np.int32), np.array(masses, np.float32), shape)


def split_indices(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices in two, stratified by label: sorted int arrays, the second with `fraction` of each class."""
    rng = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        parts.append(members[: round(fraction * len(members))])
    second = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), second), second


def find_folders(source: Path, classes: Classes, val_fraction: float | None) -> dict[str, Path]:
    """Returns the folders of train, val and test, as far as they exist, or `source` itself as train; see `pack`.

    The paths of other visible folders are printed to stderr.
    """
    check(source.is_dir(), f"{source}: no such folder")
    folders: dict[str, Path] = {}
    others = [source / name for name in list_classes(source)]
    for split, names in SPLIT_FOLDERS.items():
        for folder in [folder for folder in others if folder.name.lower() in names]:
            check(split not in folders, f"{folder} and {folders.get(split)} are both the {split} split; remove one")
            folders[split] = folder
            others.remove(folder)
    if val_fraction is not None:
        exists = f"{folders.get('val')} exists and is the validation split; leave --val-fraction out"
        check("val" not in folders, exists)
    first = next(iter(classes.values()))
    expected = f"expected {source}/train/{first}/1.npy and so on, or {source}/{first}/1.npy and --val-fraction 0.2"
    check(bool(folders) or val_fraction is not None, f"{source}: has neither train/ nor val/ nor test/; {expected}")
    if folders:
        show_unread(others)
    return folders or {"train": source}


def pack(
    source: Path,
    out: Path,
    dtype: str = "float32",
    classes: Classes = DEFAULT_CLASSES,
    test_fraction: float | None = None,
    seed: int = 0,
    val_fraction: float | None = None,
    planes: Planes = ONE_PLANE,
) -> dict[str, int]:
    """Packs `source/{train,val,test}/<class>/*` into `out/{train,val,test}.npz`; returns the number of images of each.

    Each image is scaled to [0, 1] by its own minimum and maximum, as for the network. Splits are stratified by class;
    the files of each are recorded in its `info`. All .npz are published together, or none.

    Args:
      source: holds some of train/, val/ (or valid/, validation/) and test/, in any case, used as they are; or, with
        `val_fraction`, a folder for each class.
      out: folder of the .npz files; existing ones are refused.
      dtype: "float32" or "float16", of the stored images.
      classes: name -> name of its folder, in the order of the labels.
      test_fraction: of val that becomes test, in [0, 1), by default a half; an error if there is test.
      seed: of the splits.
      val_fraction: of train, or of `source` without train, that becomes val, in (0, 1); an error if there is val.
      planes: of files with several; with `stack` these are images like others, and may come into different splits.
    """
    check(dtype in ("float16", "float32"), f"dtype={dtype!r}: expected float16 or float32")
    check(test_fraction is None or 0 <= test_fraction < 1, f"test_fraction={test_fraction}: expected one in [0, 1)")
    check(val_fraction is None or 0 < val_fraction < 1, f"val_fraction={val_fraction}: expected a number in (0, 1)")
    folders = find_folders(source, classes, val_fraction)
    if "test" in folders:
        check(test_fraction is None, f"{folders['test']} exists and is the test split; leave --test-fraction out")
    elif test_fraction is None and ("val" in folders or val_fraction):
        test_fraction = 0.5
    names, steps = list(folders), []
    for name, part, fraction in (("train", "val", val_fraction), ("val", "test", test_fraction)):
        advice = "give --val-fraction too, or leave it out" if part == "test" else "leave it out"
        lacks = f"--{part}-fraction {fraction}: {source} has no {name}/ to take it from; {advice}"
        check(name in names or not fraction, lacks)
        if fraction:
            steps.append((name, part, fraction))
            names.append(part)
    for name in names:
        check(not (out / f"{name}.npz").exists(), f"{out / name}.npz exists; remove it or choose another folder")
    splits: dict[str, Images] = {}
    for name, folder in folders.items():
        splits[name] = list_images(folder, classes, planes, next((found.shape for found in splits.values()), None))
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    for name, part, fraction in steps:
        rest, taken = split_indices(splits[name].labels, fraction, seed)
        empty = part if len(rest) else name
        left = f"--{part}-fraction {fraction} leaves no images for {empty}; choose another fraction or give more images"
        check(len(rest) > 0 and len(taken) > 0, left)
        splits |= {name: splits[name].take(rest), part: splits[name].take(taken)}
    info = {"source": source.name, "split": {"seed": seed} | fractions, "planes": asdict(planes)}
    write_splits(source, out, np.dtype(dtype), tuple(classes), splits, info, planes)
    return {name: len(images.places) for name, images in splits.items()}


def write_splits(
    source: Path,
    out: Path,
    dtype: np.dtype,
    classes: tuple[str, ...],
    splits: dict[str, Images],
    info: dict[str, Any],
    planes: Planes,
) -> None:
    """Writes `out/<name>.npz` of all splits in a temporary folder, then moves them to `out`."""
    temporary = temporary_name(out / "pack")
    digests: dict[str, tuple[list[bytes], np.ndarray]] = {name: ([], found.labels) for name, found in splits.items()}
    try:
        for name, images in splits.items():
            files = [f.relative_to(source).as_posix() + ("" if i is None else f"[{i}]") for f, i in images.places]
            masses = {} if np.isnan(images.masses).all() else {"mass": images.masses}
            scaled = read_scaled(images.places, planes, digests[name][0])
            chunks, shape = show_progress(scaled, name, len(files)), (len(files), *images.shape)
            about = info | {"files": files}
            write_npz(temporary / f"{name}.npz", chunks, shape, dtype, images.labels, classes, about, masses)
        show_notices(digests, classes)
        for name in splits:
            os.replace(temporary / f"{name}.npz", out / f"{name}.npz")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_scaled(places: list[tuple[Path, int | None]], planes: Planes, digests: list[bytes]) -> Iterator[np.ndarray]:
    """Yields images float32 (1, height, width), scaled to [0, 1], and appends their digests; opens each file once."""
    for file, rows in groupby(places, lambda place: place[0]):
        images, _ = open_file(file, planes)
        for _, row in rows:
            with named(file):
                (image,) = read_rows(images, np.array([row or 0]))
            digests.append(digest(image))
            yield scale(image)[None]


def convert(path: Path, out: Path, classes: Classes | None = None) -> None:
    """Copies an .npz from elsewhere to the new file `out`, uncompressed and with the names of its classes.

    Args:
      path: see `folders.load_npz`; of any size.
      out: the copy.
      classes: names of labels 0, 1, ... if the file does not name them itself; or name -> name in the file, to rename.
    """
    check(out.suffix == ".npz", f"{out}: expected the name of a file that ends in .npz, such as packed/train.npz")
    check(not out.exists(), f"{out} exists; give the name of a new file")
    with npz.open_archive(path) as (archive, members):
        images, labels = find_names(path, members, need_labels=bool(classes))
        arrays = npz.read_members(archive, members, {labels: "ui", "classes": "U"})
        names = tuple(arrays["classes"].ravel().tolist()) if "classes" in arrays else None
        if names and classes:
            new = {in_data: name for name, in_data in classes.items()}
            renamed = new.keys() == set(names) and any(old != name for old, name in new.items())
            text = f"{path} names its classes {', '.join(names)}; leave --classes {','.join(new)} out, or rename each"
            check(renamed or tuple(new) == names, text)
            names = tuple(new[name] for name in names)
        names = names or tuple(classes or ())
        unnamed = f"{path} does not name its classes; give --classes with the names of labels 0, 1, ... in this order"
        check(bool(names) or labels not in arrays, unnamed)
        header = npz.read_image_header(archive, members[images])
        check(not header.fortran_order, f"{path}: {images} {npz.FORTRAN}")
        known = npz.check_labels(arrays[labels], header.shape[0], names, path) if labels in arrays else None
        with archive.open(members[images]) as member:
            member.read(header.offset)
            chunks = read_chunks(member, header.shape, header.dtype)
            write_npz(out, chunks, header.shape, header.dtype, known, names, {"source": path.name})


def read_chunks(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields arrays of a few images each, of images (n, height, width) that follow in a file."""
    image_bytes = math.prod(shape[1:]) * dtype.itemsize
    check(
        image_bytes <= npz.CHUNK_BYTES, f"images have {image_bytes:,} bytes each, expected at most {npz.CHUNK_BYTES:,}"
    )
    rows = npz.CHUNK_BYTES // image_bytes
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        yield np.frombuffer(file.read(count * image_bytes), dtype).reshape(count, *shape[1:])


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    dtype: Literal["float32", "float16"] = "float32",
    classes: str | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    planes: cli.PlaneOptions = ONE_PLANE,
) -> None:
    """Packs SOURCE/{train,val,test}/<class>/* into OUT/train.npz, val.npz and test.npz, each image scaled to [0, 1].

    Files are .npy or FITS; an .npy may also hold [image, mass], as in DeepLenseSim's Models I to III, whose masses
    become an array `mass`. SOURCE may also be an .npz from elsewhere with images and labels: it
    is copied to the file OUT, uncompressed and with class names.

    examples:
      python scripts/pack.py dataset packed
      python scripts/pack.py Model_I packed --val-fraction 0.1 --classes no=no_sub,sphere=cdm,vort=axion
      python scripts/pack.py theirs.npz packed/train.npz --classes no,vort,sphere

    Args:
        source: folder that holds some of train/, val/ (or valid/, validation/) and test/ (the public data set's, with
            train/ and val/, is called dataset) or, with --val-fraction, a folder for each class; or an .npz.
        out: folder to write to, or a file if SOURCE is an .npz.
        dtype: of the stored images.
        classes: names of labels 0, 1, ..., separated by commas, and of their folders or classes in an .npz where these
            differ: name=folder. By default no,sphere,vort.
        val_fraction: part of each class of train, or of SOURCE, that becomes the validation split, if there is no val.
        test_fraction: part of each class of val that becomes the test split, if there is no test; by default a half.
        seed: of the splits.
    """
    names = cli.parse_classes(classes) if classes else None
    if source.suffix.lower() == ".npz":
        given = {"dtype": dtype != "float32", "seed": seed != 0, "band, --stack or --hdu": planes != ONE_PLANE}
        given |= {"val-fraction": val_fraction is not None, "test-fraction": test_fraction is not None}
        unused = " and ".join(f"--{name}" for name, is_given in given.items() if is_given)
        check(not unused, f"{source} is copied to one file as it is; leave {unused} out")
        convert(source, out, names)
        print(out)
    else:
        counts = pack(source, out, dtype, names or DEFAULT_CLASSES, test_fraction, seed, val_fraction, planes)
        print(f"{out}: " + ", ".join(f"{split}.npz {n:,} images" for split, n in counts.items()))


if __name__ == "__main__":
    cli.run_function(main)
