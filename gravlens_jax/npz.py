"""The file format: uncompressed .npz, written as a stream and read by memory map. No file is ever unpickled.

An .npz of this project holds images (n, height, width), labels int32 (n,), classes (names of the labels) and info (JSON
text: where the images come from).
"""

import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gravlens_jax.config import CLASSES, InputError, check

CHUNK_BYTES = 32 * 2**20  # unpacked at a time
SMALL_MEMBERS = ("labels", "classes", "info")  # of an .npz, besides images


class Dataset(NamedTuple):
    """Labelled images; `images` is usually a view of a memory-mapped file."""

    images: np.ndarray  # (n, height, width), uint8 to float64
    labels: np.ndarray  # int32 (n,)
    classes: tuple[str, ...]
    info: dict

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1:]


def write_npz(
    path: Path,
    chunks: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    labels: np.ndarray,
    classes: tuple[str, ...],
    info: dict,
    arrays: dict[str, np.ndarray] | None = None,
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
      arrays: more to store, name -> array.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    small = {"labels": np.asarray(labels, np.int32), "classes": np.array(classes), "info": np.array(json.dumps(info))}
    small |= arrays or {}
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
        reason = error.strerror or error
        raise InputError(f"{path} could not be written: {reason}; free space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


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
    with _open_archive(path) as archive:
        members = _members(path, archive, ("images", "labels") if need_labels else ("images",))
        if members["images"].compress_type == zipfile.ZIP_STORED:
            images = _map_member(path, members["images"])
            small = {name: _read_member(archive, m) for name, m in members.items() if name in SMALL_MEMBERS}
            return _checked(path, images, **small)
    return open_npz(unpack_npz(path))


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an .npz; whatever the libraries make of a damaged one becomes InputError."""
    check(path.is_file(), f"{path}: no such file; expected an .npz made by scripts/pack.py or scripts/simulate.py")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"{path}: not a readable .npz ({error}); make it again") from error


def _members(path: Path, archive: zipfile.ZipFile, needed: tuple[str, ...]) -> dict[str, zipfile.ZipInfo]:
    members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
    for name in needed:
        check(name in members, f"{path}: has no {name!r}, only {', '.join(sorted(members)) or 'nothing'}")
    return members


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
        f"{path}: {member.filename} announces {shape} of {dtype} but holds {member.file_size} bytes; make it again",
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
        f"{path}: labels run from {low} to {high}, expected 0 to {len(classes) - 1} for {', '.join(classes)}",
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
    print(f"{path} cannot be memory-mapped as it is: unpacking it once to {out}", file=sys.stderr)
    with _open_archive(path) as archive:
        members = _members(path, archive, ("images", "labels"))
        labels = _read_member(archive, members["labels"])
        if "classes" in members:
            classes = tuple(map(str, _read_member(archive, members["classes"])))
        else:
            names = ", ".join(classes)
            print(f"{path.name} does not name its classes: labels 0, 1, ... are taken as {names}", file=sys.stderr)
        with archive.open(members["images"]) as member:
            shape, fortran_order, dtype = _read_npy_header(member)
            check(not dtype.hasobject, f"{path}: images.npy holds Python objects, which are never unpickled")
            check(dtype.kind in "uif" and not fortran_order, f"{path}: images.npy must be real numbers in C order")
            check(len(shape) == 3 or (len(shape) == 4 and shape[1] == 1), f"{path}: images have shape {shape}")
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
