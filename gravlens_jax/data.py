"""Images on disk: packing folders of .npy into .npz, memory-mapping .npz, the order of batches.

An .npz of this project holds, uncompressed, images (n, height, width), labels int32 (n,), classes (names of the
labels) and info (JSON text: where the images come from). No file is ever unpickled.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gravlens_jax.config import CLASSES, SPLITS, InputError, check

CHUNK_BYTES = 32 * 2**20  # read or written at a time
SMALL_MEMBERS = ("labels", "classes", "info")  # of an .npz, besides images


class Dataset(NamedTuple):
    """Labelled images; `images` is usually a view of a memory-mapped file."""

    images: np.ndarray  # (n, height, width), uint8 to float64
    labels: np.ndarray  # int32 (n,)
    classes: tuple[str, ...]
    info: dict


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_npz(
    path: Path,
    chunks: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    labels: np.ndarray,
    classes: tuple[str, ...],
    info: dict,
) -> None:
    """Streams images into an uncompressed .npz; the file appears under its name only when it is complete.

    Args:
      path: where to write; its folder is made if needed.
      chunks: arrays (k, height, width) that follow each other in `shape`'s first axis.
      shape: (n, height, width) of all images together.
      dtype: of the stored images.
      labels: int (n,).
      classes: the names of labels 0, 1, ...
      info: what JSON can hold.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    small = {"labels": np.asarray(labels, np.int32), "classes": np.array(classes), "info": np.array(json.dumps(info))}
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            with archive.open("images.npy", "w", force_zip64=True) as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for chunk in chunks:
                    assert chunk.shape[1:] == tuple(shape[1:])
                    member.write(np.ascontiguousarray(chunk, dtype).data.cast("B"))
                    written += len(chunk)
                assert written == shape[0], (written, shape)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}; free space or choose another folder")
    finally:
        temporary.unlink(missing_ok=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_npz(path: str | Path, need_labels: bool = True) -> Dataset:
    """Opens an .npz of images without reading them: `images` is a read-only memory map.

    A compressed file is unpacked once to `<name>.unpacked.npz` beside it, which is used from then on. A file without
    `classes` is taken to label no, sphere, vort as 0, 1, 2.

    Args:
      path: the file.
      need_labels: whether a file without labels is an error; otherwise they are all 0.

    Raises:
      InputError: the file is missing, damaged, has no images or labels, or labels outside its classes.
    """
    path = Path(path).resolve()
    check(path.is_file(), f"{path}: no such file; expected an .npz made by scripts/pack.py or scripts/simulate.py")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            for name in ("images", "labels")[: 1 + need_labels]:
                check(name in members, f"{path}: has no {name!r}, only {', '.join(sorted(members)) or 'nothing'}")
            if members["images"].compress_type == zipfile.ZIP_STORED:
                images = _map_member(path, members["images"])
                small = {name: _read_member(archive, m) for name, m in members.items() if name in SMALL_MEMBERS}
                return _checked(path, images, **small)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable .npz ({error}); make it again") from error
    return open_npz(unpack_npz(path))


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _map_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """Maps a stored .npy member. The local header repeats name and extra field, with lengths of its own."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)
        check(len(local) == 30 and local[:4] == b"PK\x03\x04", f"{path}: damaged header of {member.filename}")
        file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), io.SEEK_CUR)
        start = file.tell()
        shape, fortran_order, dtype = _read_npy_header(file)
        offset = file.tell()
    check(not dtype.hasobject, f"{path}: {member.filename} holds Python objects, which are never unpickled")
    check(dtype.kind in "uif", f"{path}: {member.filename} has dtype {dtype}, expected real numbers")
    check(not fortran_order, f"{path}: {member.filename} is in Fortran order, expected C order")
    expected = offset - start + int(np.prod(shape, dtype=object)) * dtype.itemsize
    check(
        member.file_size == expected and start + expected <= path.stat().st_size,
        f"{path}: {member.filename} announces shape {shape} of {dtype} but holds {member.file_size} bytes; make it again",
    )
    return np.memmap(path, dtype, "r", offset, shape)


def _read_npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _checked(
    path: Path, images: np.ndarray, labels: np.ndarray | None = None, classes: Any = CLASSES, info: Any = "{}"
) -> Dataset:
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if labels is None:
        labels = np.zeros(len(images), np.int32)
    classes, info = tuple(map(str, classes)), json.loads(str(info))
    check(images.ndim == 3, f"{path}: images have shape {images.shape}, expected (n, height, width)")
    check(labels.shape == images.shape[:1], f"{path}: {len(images)} images but labels of shape {labels.shape}")
    check(len(labels) > 0, f"{path}: holds no images")
    check(labels.dtype.kind in "ui", f"{path}: labels have dtype {labels.dtype}, expected integers")
    low, high = labels.min(), labels.max()
    check(
        low >= 0 and high < len(classes),
        f"{path}: labels run from {low} to {high}, expected 0 to {len(classes) - 1} for the classes {', '.join(classes)}",
    )
    return Dataset(images, labels.astype(np.int32), classes, info)


def unpack_npz(path: Path, out: Path | None = None, classes: tuple[str, ...] = CLASSES) -> Path:
    """Copies a compressed .npz to an uncompressed one in this project's format, once; returns the copy's path.

    Args:
      path: an .npz with images (n, height, width) or (n, 1, height, width) and labels (n,).
      out: the copy; `<name>.unpacked.npz` beside `path` if not given. It is reused if newer than `path`.
      classes: names of the labels, if the file itself does not say.
    """
    path = Path(path).resolve()
    out = Path(out or path.with_suffix(".unpacked.npz")).resolve()
    if out.exists() and out.stat().st_mtime >= path.stat().st_mtime:
        return out
    print(f"{path} is compressed and cannot be memory-mapped: unpacking it once to {out}")
    with zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        for name in ("images", "labels"):
            check(name in members, f"{path}: has no {name!r}, only {', '.join(sorted(members)) or 'nothing'}")
        labels = _read_member(archive, members["labels"])
        if "classes" in members:
            classes = tuple(map(str, _read_member(archive, members["classes"])))
        else:
            print(f"{path.name} does not name its classes: labels 0, 1, ... are taken as {', '.join(classes)}")
        with archive.open("images.npy") as member:
            shape, fortran_order, dtype = _read_npy_header(member)
            check(not dtype.hasobject, f"{path}: images.npy holds Python objects, which are never unpickled")
            check(dtype.kind in "uif" and not fortran_order, f"{path}: images.npy must be real numbers in C order")
            height, width = shape[-2:]
            rows = max(1, CHUNK_BYTES // (height * width * dtype.itemsize))

            def chunks():
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    data = member.read(count * height * width * dtype.itemsize)
                    yield np.frombuffer(data, dtype).reshape(count, height, width)

            info = {"source": path.name}
            write_npz(out, chunks(), (shape[0], height, width), dtype, labels, classes, info)
    return out


# ---- folders of .npy -------------------------------------------------------------------------------------------------


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
    """Reads one image, (height, width) of any real dtype, from a .npy of shape (height, width) or (1, height, width).

    Raises:
      InputError: unreadable, Python objects, another shape than `shape`, NaN or infinite pixels.
    """
    try:
        image = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a readable .npy of numbers ({error})") from error
    check(isinstance(image, np.ndarray) and image.dtype.kind in "uif", f"{path}: expected a .npy of real numbers")
    stored = image.shape
    if image.ndim == 3 and stored[0] == 1:
        image = image[0]
    expected = f"(1, {shape[0]}, {shape[1]}) or {shape}" if shape else "(1, height, width) or (height, width)"
    check(
        image.ndim == 2 and shape in (None, image.shape), f"{path}: image has shape {stored}, expected {expected}"
    )
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
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        second.append(members[: round(fraction * len(members))])
    second = np.sort(np.concatenate(second))
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


# ---- batches ---------------------------------------------------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the `n` training images in epoch 0, 1, ...: an int permutation, a function of the rest."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_batches(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the full batches of an epoch, new host arrays: images (batch_size, height, width), labels (batch_size,)."""
    order = epoch_order(len(dataset.labels), seed, epoch)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield {"images": take_rows(dataset.images, rows), "labels": dataset.labels[rows]}


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields all images in order; the last batch is filled up with repeats that `mask` (bool) leaves out."""
    n = len(dataset.labels)
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size)
        mask, rows = rows < n, np.minimum(rows, n - 1)
        yield {"images": take_rows(dataset.images, rows), "labels": dataset.labels[rows], "mask": mask}


def take_rows(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns images[rows] as a new array; row by row, since a mapped file is rarely aligned to its dtype."""
    batch = np.empty((len(rows), *images.shape[1:]), images.dtype)
    for i, row in enumerate(rows):
        batch[i] = images[row]
    return batch


def prefetch(batches: Iterator, depth: int = 2) -> Iterator:
    """Yields the same items, read up to `depth` ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(next, batches, None) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield item


def load_splits(folder: Path) -> dict[str, Dataset]:
    """Opens train.npz, val.npz and test.npz of a folder and checks that they belong together."""
    datasets = {split: open_npz(Path(folder) / f"{split}.npz") for split in SPLITS}
    train = datasets["train"]
    for split, other in datasets.items():
        check(
            other.classes == train.classes and other.images.shape[1:] == train.images.shape[1:],
            f"{folder}/{split}.npz has classes {other.classes} and images of {other.images.shape[1:]} pixels, "
            f"train.npz {train.classes} and {train.images.shape[1:]}; pack them together",
        )
    return datasets
