"""The file format: uncompressed .npz, written as a stream and read by memory map.

An .npz of this project holds images (n, height, width), labels int32 (n,), classes (names of the labels) and info (JSON
text: where the images come from).
"""

import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gravlens_jax.archive import MEMORY_BYTES, Header, data_start, member_header, members, open_archive, read_members
from gravlens_jax.config import CLASSES, check, parse_json
from gravlens_jax.files import temporary_name, writing

CHUNK_BYTES = 32 * 2**20  # unpacked at a time
COPY = ".unpacked.npz"  # what its name ends in
MAX_RATIO = 200  # of unpacked to compressed images; photon counts have about 3, an archive made to fill disks 1000
EXPECTED = "an .npz made by scripts/pack.py or scripts/simulate.py"


def native(images: np.ndarray) -> np.ndarray:
    """Returns the same pixels in this machine's byte order, which JAX wants; those of FITS files are big-endian."""
    return np.asarray(images, images.dtype.newbyteorder("="))


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
    shape: tuple[int, ...],
    dtype: np.dtype,
    labels: np.ndarray | None,
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
      labels: int (n,); None for a file that serves prediction only.
      classes: the names of labels 0, 1, ...
      info: what JSON can hold.
      arrays: more to store, name -> array.
    """
    path = Path(path).resolve()
    temporary = temporary_name(path)
    small = {"classes": np.array(classes), "info": np.array(json.dumps(info))} | (arrays or {})
    if labels is not None:
        small["labels"] = np.asarray(labels, np.int32)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
        check(needed <= free, f"{path} needs {needed:,} bytes, {free:,} are free; free space or choose another folder")
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
      InputError: the file is missing, damaged, has no images or labels, labels outside its classes, or more
        than 64 bits a pixel.
    """
    path = Path(path).resolve()
    with open_archive(path, EXPECTED) as archive:
        stat, info = path.stat(), members(archive).get("images")
        if info is None or info.compress_type == zipfile.ZIP_STORED:
            header, labels, classes, about = _read_small(archive, need_labels)
            offset = data_start(archive, members(archive)["images"]) + header.offset
            images = np.memmap(path, header.dtype, "r", offset, header.shape)
            images.stat = stat  # type: ignore[attr-defined]  # for `data.take_rows`
            return Dataset(images, labels, classes, about)
    return open_npz(unpack_npz(path, need_labels=need_labels), need_labels)


def _read_small(
    archive: zipfile.ZipFile, need_labels: bool = True, classes: tuple[str, ...] = CLASSES
) -> tuple[Header, np.ndarray, tuple[str, ...], dict]:
    """Reads all but the images: their header, with shape (n, height, width); labels, classes and info."""
    path, infos = archive.filename, members(archive)
    for name in ("images", "labels") if need_labels else ("images",):
        check(name in infos, f"{path}: has no {name!r}, only {', '.join(sorted(infos)) or 'nothing':.200}")
    header = member_header(archive, infos["images"], "uif")
    shape, info = header.shape, {}
    fits = len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)
    check(fits, f"{path}: images have shape {shape}, expected (n, height, width)")
    check(header.dtype.itemsize <= 8, f"{path}: images are {header.dtype}, expected at most 64 bits a pixel")
    check(not header.fortran_order, f"{path}: images are in Fortran order, expected C order")
    if "labels" in infos:
        announced = member_header(archive, infos["labels"], "ui").shape
        check(announced == shape[:1], f"{path}: {shape[0]} images but labels of shape {announced}")
        labels = read_members(archive, {"labels": infos["labels"]}, "ui")["labels"]
    else:
        labels = np.zeros(shape[0], np.int32)
    texts = read_members(archive, {name: infos[name] for name in ("classes", "info") if name in infos}, "U")
    if "classes" in texts:
        classes = tuple(texts["classes"].ravel().tolist())
    if "info" in texts:
        info = parse_json(texts["info"].item(), f"{path}: info")
    check(isinstance(info, dict), f"{path}: info is not an object of JSON")
    low, high = labels.min(), labels.max()
    check(
        low >= 0 and high < len(classes),
        f"{path}: labels run from {low} to {high}, expected 0 to {len(classes) - 1} for {', '.join(classes)}",
    )
    return header._replace(shape=(shape[0], *shape[-2:])), labels.astype(np.int32), classes, info


def is_copy(path: Path) -> bool:
    """Whether a file is the copy that `open_npz` has made of a compressed one beside it."""
    return path.name.endswith(COPY) and path.with_name(path.name.removesuffix(COPY) + ".npz").exists()


def unpack_npz(
    path: Path, out: Path | None = None, classes: tuple[str, ...] | None = None, need_labels: bool = True
) -> Path:
    """Copies a compressed .npz to an uncompressed one in this project's format, once; returns the copy's path.

    Args:
      path: an .npz with images (n, height, width) or (n, 1, height, width) and labels (n,).
      out: the copy, a new file; if not given `<name>.unpacked.npz` beside `path`, reused if newer than `path`.
      classes: names of the labels; if not given those that the file itself names, or no, sphere, vort.
      need_labels: whether a file without labels is an error; otherwise its copy has none either.

    Raises:
      InputError: as `open_npz`; the file names other classes than `classes`; `out` exists.
    """
    path = Path(path).resolve()
    if out is None:
        out = path.with_suffix(COPY)
        if out.exists() and out.stat().st_mtime >= path.stat().st_mtime:
            return out
    else:
        check(not out.exists(), f"{out} exists; give the name of a new file")
    with open_archive(path, EXPECTED) as archive:
        (shape, dtype, _, offset), labels, names, _ = _read_small(archive, need_labels, classes or CLASSES)
        check(
            classes in (None, names),
            f"{path} names its classes itself, {', '.join(names)}; leave --classes {','.join(classes or ())} out",
        )
        image_bytes, info = math.prod(shape[1:]) * dtype.itemsize, members(archive)["images"]
        check(
            image_bytes <= CHUNK_BYTES and info.file_size <= max(MEMORY_BYTES, MAX_RATIO * info.compress_size),
            f"{path}: {info.compress_size:,} bytes would unpack to images {shape} of {dtype}, more than images can be "
            f"compressed; if you trust the file, save it with numpy.savez",
        )
        if info.compress_type != zipfile.ZIP_STORED:
            print(f"{path} cannot be memory-mapped as it is: unpacking it once to {out}", file=sys.stderr)
        if "classes" not in members(archive):
            text = f"{path.name} does not name its classes: labels 0, 1, ... are taken as {', '.join(names)}"
            print(text, file=sys.stderr)
        rows = CHUNK_BYTES // image_bytes
        with archive.open(info) as file:
            file.read(offset)

            def chunks():
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    yield np.frombuffer(file.read(count * image_bytes), dtype).reshape(count, *shape[1:])

            known = labels if "labels" in members(archive) else None
            write_npz(out, chunks(), shape, dtype, known, names, {"source": path.name})
    return out
