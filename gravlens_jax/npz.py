"""The file format: uncompressed .npz, written as a stream and read by memory map.

An .npz of this project holds images (n, height, width), labels int32 (n,), classes (names of the labels) and info (JSON
text: the source of the images). Files may come from anywhere: sizes are checked before memory is allocated, and nothing
is unpickled.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError, check, parse_json
from gravlens_jax.pixels import CHUNK_BYTES, Header, map_images, read_header, read_image_header
from gravlens_jax.run_dir import cache_folder, temporary_name, writing

COPY = ".unpacked.npz"  # ends the name of an unpacked copy
EXPECTED = "an .npz made by scripts/pack.py or scripts/simulate.py"
LABELS = ("labels", "label", "y", "targets", "target")
PAIRS = [(images, labels) for images in ("images", "image", "x", "data") for labels in LABELS]
PAIRS += [("x_train", "y_train"), ("arr_0", "arr_1")]  # names of the two arrays, in lower case
MAX_RATIO = 200  # of unpacked to compressed images; photon counts have about 3, a decompression bomb 1000
MEMORY_BYTES = 2**26  # limit for arrays that are larger than their file
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, OSError, RuntimeError, ValueError, OverflowError, EOFError)


class Dataset(NamedTuple):
    """Labelled images; `images` is usually a view of a memory-mapped file."""

    images: np.ndarray  # (n, height, width), uint8 to float64
    labels: np.ndarray  # int32 (n,)
    classes: tuple[str, ...]
    info: dict
    deflections: np.ndarray | None = None  # by the substructure, float32 (n, cells, cells, 2); of simulated images

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
    """Streams images into an uncompressed .npz, atomically.

    Args:
      path: where to write; its folder is created if needed.
      chunks: arrays (k, height, width) that follow each other in `shape`'s first axis.
      shape: (n, height, width) of all images together.
      dtype: of the stored images.
      labels: int (n,); None for a file that serves prediction only.
      classes: the names of labels 0, 1, ...
      info: a JSON object.
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

    A compressed file is unpacked once, to `<name>.unpacked.npz` beside it or, on a read-only disk, in the user's cache
    folder. The arrays may have other usual names, see PAIRS. A file without `classes` is assumed to label no, sphere,
    vort as 0, 1, 2.

    Args:
      path: the file.
      need_labels: whether labels, classes and info are read; otherwise they are 0, no, sphere, vort and {}.

    Raises:
      InputError: the file is missing, damaged, has no images or labels, labels outside its classes, or more
        than 64 bits a pixel.
    """
    path = Path(path).resolve()
    with _open_archive(path, EXPECTED) as (archive, members):
        name, _ = _find_names(members)
        if name not in members or members[name].compress_type == zipfile.ZIP_STORED:
            images, header, labels, classes, info = _read_small(archive, members, need_labels)
            return Dataset(_map_images(archive, images, header), labels, classes, info)
    return open_npz(unpack_npz(path, need_labels=need_labels), need_labels)


def is_copy(path: Path) -> bool:
    """Returns whether `open_npz` made this file from a compressed one beside it."""
    originals = (path.with_name(path.name.removesuffix(COPY) + suffix) for suffix in (".npz", ".NPZ"))
    return path.name.endswith(COPY) and any(original.exists() for original in originals)


def unpack_npz(
    path: Path,
    out: Path | None = None,
    classes: tuple[str, ...] | Mapping[str, str] | None = None,
    need_labels: bool = True,
) -> Path:
    """Copies a compressed .npz to an uncompressed one in this project's format, once; returns the copy's path.

    Args:
      path: an .npz that `open_npz` reads.
      out: the copy, a new file; if not given see `open_npz`, and a copy that is newer than `path` is used again.
      classes: names of the labels, or name -> name in the file, which renames; if not given those that the file itself
        names, or no, sphere, vort.
      need_labels: as in `open_npz`; otherwise the copy has no labels either.

    Raises:
      InputError: as `open_npz`; the file names other classes than `classes`; `out` exists.
    """
    path = Path(path).resolve()
    if out is None:
        beside, cached = copies = _copies(path)
        for copy in copies:
            if copy.exists() and copy.stat().st_mtime >= path.stat().st_mtime:
                with _open_archive(copy, EXPECTED) as (_, members):
                    if "labels" in members or not need_labels:
                        return copy
        out = beside if os.access(path.parent, os.W_OK) else cached
    else:
        check(not out.exists(), f"{out} exists; give the name of a new file")
    with _open_archive(path, EXPECTED) as (archive, members):
        images, header, labels, names, _ = _read_small(archive, members, need_labels, tuple(classes or CLASSES))
        text = ", ".join(names)
        if classes and "classes" in members:
            pairs = classes if isinstance(classes, Mapping) else {name: name for name in classes}
            new = {theirs: own for own, theirs in pairs.items()}
            same = tuple(new) == names or (sorted(new) == sorted(names) and any(a != b for a, b in new.items()))
            check(same, f"{path} names its classes itself, {text}; leave --classes {','.join(new)} out, or rename each")
            names = tuple(new[name] for name in names)
        if images.compress_type != zipfile.ZIP_STORED:
            print(f"{path} is compressed and cannot be memory-mapped: unpacking it once to {out}", file=sys.stderr)
        if need_labels and "classes" not in members:
            print(f"{path.name} does not name its classes: labels 0, 1, ... are taken as {text}", file=sys.stderr)
        chunks, known = _unpack(archive, images, header), labels if need_labels else None
        write_npz(out, chunks, header.shape, header.dtype, known, names, {"source": path.name})
    return out


def load_arrays(path: Path, expected: str, kinds: str) -> dict[str, np.ndarray]:
    """Reads all arrays of a small .npz, name -> array; InputError if it is missing, damaged or too large.

    `expected` describes the file in errors; `kinds`, one of `pixels.KINDS`, are the dtypes that are not an InputError.
    """
    with _open_archive(path, expected) as (archive, members):
        return _read_members(archive, members, dict.fromkeys(members, kinds))


def _map_images(archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: Header) -> np.ndarray:
    """Maps the stored images of an archive; their data must lie between the start of the file and its directory."""
    file = archive.fp
    assert file is not None  # it is open
    file.seek(info.header_offset)
    name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))
    start = info.header_offset + 30 + name_bytes + extra_bytes
    check(
        start + info.file_size <= archive.start_dir, f"{archive.filename}: {info.filename} is incomplete; make it again"
    )
    return map_images(file, header.dtype, start + header.offset, header.shape)


def is_visible(name: str) -> bool:
    """Returns whether no part of a path is hidden (.DS_Store, ._1.npy) or made by a system (__MACOSX): not images."""
    return not any(part.startswith((".", "__")) for part in name.split("/"))


@contextmanager
def _open_archive(path: Path, expected: str) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Yields an .npz and its members by name, without .npy; errors of damaged files become InputError."""
    check(path.is_file(), f"{path}: no such file; expected {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            visible = [info for info in archive.infolist() if is_visible(info.filename)]
            members = {info.filename.removesuffix(".npy"): info for info in visible}
            check(len(members) == len(visible), f"{path}: two members have the same name")
            known = all(info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in members.values())
            check(known, f"{path}: a member is neither stored nor deflated")
            yield archive, members
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: not a readable .npz ({str(error) or 'truncated'}); expected {expected}") from error


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str) -> Header:
    with archive.open(info) as file:
        return read_header(file, info.file_size, kinds, f"{archive.filename}: {info.filename}")


def _read_members(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], kinds: dict[str, str]
) -> dict[str, np.ndarray]:
    """Reads the members named in `kinds`, name -> kinds of dtype that are accepted; first checks all their headers."""
    infos = {name: info for name, info in members.items() if name in kinds}
    for name, info in infos.items():
        _member_header(archive, info, kinds[name])
    total, most = sum(i.file_size for i in infos.values()), max(MEMORY_BYTES, os.path.getsize(str(archive.filename)))
    check(total <= most, f"{archive.filename}: {', '.join(infos):.80} unpack to {total:,} bytes, expected {most:,}")
    arrays = {}
    for name, info in infos.items():
        with archive.open(info) as file:
            array = arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind == "U":  # Python crashes on invalid code points; decoding them raises ValueError
            array.astype(array.dtype.newbyteorder("<")).tobytes().decode("utf-32-le")
    return arrays


def _copies(path: Path) -> tuple[Path, Path]:
    """Returns the possible uncompressed copies of a file: beside it and in the cache folder."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return path.with_suffix(COPY), cache_folder() / "unpacked" / f"{digest}-{path.stem}{COPY}"


def _find_names(members: dict[str, zipfile.ZipInfo]) -> tuple[str, str]:
    """Returns the names of the arrays of images and of labels, which may be missing: the first complete of PAIRS."""
    names = {name.lower(): name for name in members}
    known = [pair for pair in PAIRS if pair[0] in names]
    images, labels = min(known, key=lambda pair: pair[1] not in names, default=PAIRS[0])
    return names.get(images, images), names.get(labels, labels)


def _read_small(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], need_labels: bool, classes: tuple[str, ...] = CLASSES
) -> tuple[zipfile.ZipInfo, Header, np.ndarray, tuple[str, ...], dict]:
    """Reads all but the images: their member, and header with shape (n, height, width); labels, classes and info."""
    path, names = archive.filename, _find_names(members)
    for name in names if need_labels else names[:1]:
        check(name in members, f"{path}: has no {name!r}, only {', '.join(sorted(members)) or 'nothing':.200}")
    if names != PAIRS[0]:
        used = f"{path}: images are {names[0]!r}" + f", labels are {names[1]!r}" * need_labels
        own = {*names, "classes", "info"}
        others = sorted(name for name in members if name not in own and not name.startswith("parameters/"))
        print(used + f"; left out: {', '.join(others):.400}" * bool(others), file=sys.stderr)
    images = members[names[0]]
    with archive.open(images) as file:
        header = read_image_header(file, images.file_size, f"{path}: {images.filename}")
    n = header.shape[0]
    check(not header.fortran_order, f"{path}: images are in Fortran order, expected C order")
    if not need_labels:
        return images, header, np.zeros(n, np.int32), classes, {}
    arrays = _read_members(archive, members, {names[1]: "ui", "classes": "U", "info": "U"})
    labels = arrays[names[1]]
    check(labels.shape == (n,), f"{path}: {n} images but labels of shape {labels.shape}")
    if "classes" in arrays:
        classes = tuple(arrays["classes"].ravel().tolist())
    info = parse_json(arrays["info"].item(), f"{path}: info") if "info" in arrays else {}
    check(isinstance(info, dict), f"{path}: info is not a JSON object")
    low, high = labels.min(), labels.max()
    check(
        low >= 0 and high < len(classes),
        f"{path}: labels run from {low} to {high}, expected 0 to {len(classes) - 1} for {', '.join(classes)}",
    )
    return images, header, labels.astype(np.int32), classes, info


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: Header) -> Iterator[np.ndarray]:
    """Yields the images in chunks, unless they are a decompression bomb."""
    n, *shape = header.shape
    image_bytes = math.prod(shape) * header.dtype.itemsize
    check(
        image_bytes <= CHUNK_BYTES and info.file_size <= max(MEMORY_BYTES, MAX_RATIO * info.compress_size),
        f"{archive.filename}: {info.compress_size:,} bytes would unpack to images {header.shape} of {header.dtype}, "
        f"more than images can be compressed; if you trust the file, save it with numpy.savez",
    )
    rows = CHUNK_BYTES // image_bytes
    with archive.open(info) as file:
        file.read(header.offset)
        for start in range(0, n, rows):
            count = min(rows, n - start)
            yield np.frombuffer(file.read(count * image_bytes), header.dtype).reshape(count, *shape)
