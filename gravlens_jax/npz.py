"""The file format: uncompressed .npz, written as a stream and read by memory map.

An .npz of this project holds images (n, height, width), labels int32 (n,), classes (names of the labels), info (JSON
text: the origin of the images) and, of simulated images, parameters/<name> of the lenses. Files are untrusted input:
sizes are checked before memory is allocated, and nothing is unpickled. `folders` reads files of other forms.
"""

import io
import json
import math
import mmap
import os
import shlex
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gravlens_jax.errors import InputError, check, parse_json
from gravlens_jax.files import is_visible, replacing

CHUNK_BYTES = 2**25  # read at a time
HEADER_BYTES = 2**14  # NumPy accepts headers of up to 10,000
MEMORY_BYTES = 2**26  # limit for arrays that are larger than their file
KINDS = {"f": "floating-point numbers", "ui": "integers", "uif": "real numbers", "U": "text"}
PARAMETERS = "parameters/"  # begins the names of arrays of lens parameters
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, OSError, RuntimeError, ValueError, OverflowError, EOFError)
FORTRAN = "is in Fortran order; save it again with numpy.ascontiguousarray"

Members = dict[str, zipfile.ZipInfo]  # of an .npz, by their names without .npy


class Header(NamedTuple):  # of an .npy; its shape agrees with the number of bytes
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int  # of the first element, from the start of the header


@dataclass(frozen=True)
class MappedImages:
    """Images in a file, not read yet: `read_rows`, or an index, maps the file and reads some of them.

    Pixels of 8 or 16 bits are as stored; images of more bits are scaled to [0, 1], float32, see `scale`.
    """

    path: Path
    offset: int  # bytes before the first image
    dtype: np.dtype
    shape: tuple[int, ...]  # (n, height, width)
    identity: tuple[int, ...]  # of the file when it was opened: see `_identity`

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, tuple):
            raise IndexError("images in a file have one index: their rows")
        chosen = np.arange(len(self))[rows]
        return read_rows(self, chosen.ravel()).reshape(*chosen.shape, *self.shape[1:])


class Dataset(NamedTuple):
    """Labelled images."""

    images: np.ndarray | MappedImages  # (n, height, width), uint8 to float64; see `read_rows`
    labels: np.ndarray  # int32 (n,)
    classes: tuple[str, ...]
    info: dict
    lens_params: dict[str, np.ndarray] | None = None  # name -> float32 (n, ...), of simulated images

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width."""
        _, height, width = self.images.shape
        return height, width


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
    """Streams images into an uncompressed .npz, atomically; its folder is created if needed.

    `chunks` are arrays (k, height, width), together of `shape` (n, height, width), and stored as `dtype`; `labels`, int
    (n,), index `classes` (None: for prediction only); `info` is a JSON object; `arrays`, name -> array, are added.
    """
    path = Path(path).absolute()
    small = {"info": np.array(json.dumps(info))} | (arrays or {})
    if labels is not None:
        small |= {"labels": np.asarray(labels, np.int32), "classes": np.array(classes, str)}
    with replacing(path) as temporary:
        needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
        check(needed <= free, f"{path} needs {needed:,} bytes, {free:,} are free; free space or choose another folder")
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


def open_npz(path: str | Path, need_labels: bool = True) -> Dataset:
    """Opens an .npz of this project; of its images only the header is read.

    Without `need_labels`, labels, classes, info and lens parameters are not read; they are 0, (), {} and None.
    InputError if the file is missing, damaged, of another form, or has labels outside of its classes.
    """
    path = Path(path).absolute()
    with open_archive(path) as (archive, members):
        command = shlex.join(["python", "scripts/pack.py", str(path), f"packed/{path.name}"])
        command += " --classes ..." * ("classes" not in members and len(members) > 1)
        has = f"{path} has {', '.join(sorted(members)) or 'nothing':.200}; expected"
        form = "uncompressed images, and labels with the names of their classes"
        check(is_packed(members, need_labels), f"{has} {form}; convert it: {command}")
        images = _locate_images(archive, members["images"])
        if not need_labels:
            return Dataset(images, np.zeros(len(images), np.int32), (), {})
        kinds = {name: "f" for name in members if name.startswith(PARAMETERS)}
        arrays = read_members(archive, members, {"labels": "ui", "classes": "U", "info": "U"} | kinds)
    classes = tuple(arrays["classes"].ravel().tolist())
    info = parse_json(arrays["info"].item(), f"{path}: info") if arrays.get("info", np.zeros(0)).size == 1 else {}
    lens_params = {name.removeprefix(PARAMETERS): arrays[name] for name in kinds}
    for name, array in lens_params.items():
        check(array.shape[:1] == (len(images),), f"{path}: {len(images)} images but {name} of shape {array.shape}")
    labels = check_labels(arrays["labels"], len(images), classes, path)
    return Dataset(images, labels, classes, info, lens_params or None)


def check_labels(labels: np.ndarray, n: int, classes: tuple[str, ...], path: Path) -> np.ndarray:
    """Returns the labels as int32; InputError unless they are one of `classes` for each of `n` images."""
    check(labels.shape == (n,), f"{path}: {n} images but labels of shape {labels.shape}")
    low, high, expected = labels.min(), labels.max(), f"expected 0 to {len(classes) - 1} for {', '.join(classes)}"
    check(low >= 0 and high < len(classes), f"{path}: labels run from {low} to {high}, {expected}")
    return labels.astype(np.int32)


def is_packed(members: Members, need_labels: bool) -> bool:
    """Returns whether an .npz has this project's form: uncompressed `images`, and if needed `labels` and `classes`."""
    stored = "images" in members and members["images"].compress_type == zipfile.ZIP_STORED
    return stored and (not need_labels or {"labels", "classes"} <= members.keys())


def load_arrays(path: Path, expected: str, kinds: str) -> dict[str, np.ndarray]:
    """Reads all arrays of a small .npz, name -> array; InputError if it is missing, damaged or too large.

    `expected` describes the file in errors; `kinds` are the accepted dtype kinds, such as "fU".
    """
    with open_archive(path, expected) as (archive, members):
        return read_members(archive, members, dict.fromkeys(members, kinds))


@contextmanager
def open_archive(
    path: Path, expected: str = "an .npz made by scripts/pack.py or scripts/simulate.py"
) -> Iterator[tuple[zipfile.ZipFile, Members]]:
    """Yields an .npz and its members; errors of damaged files become InputError."""
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


def read_members(
    archive: zipfile.ZipFile, members: Members, kinds: dict[str, str], memory_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Reads the members named in `kinds`, name -> accepted dtype kinds; first checks all their headers.

    InputError if they are larger than `memory_bytes`, by default MEMORY_BYTES, and than the file.
    """
    infos = {name: info for name, info in members.items() if name in kinds}
    for name, info in infos.items():
        with archive.open(info) as file:
            read_header(file, info.file_size, kinds[name], f"{archive.filename}: {info.filename}")
    most = max(memory_bytes or MEMORY_BYTES, os.path.getsize(str(archive.filename)))
    total = sum(info.file_size for info in infos.values())
    size = f"{total:,} bytes, expected at most {most:,}"
    check(total <= most, f"{archive.filename}: {', '.join(infos):.80} unpack to {size}")
    arrays = {}
    for name, info in infos.items():
        with archive.open(info) as file:
            array = arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind == "U":  # Python crashes on invalid code points; decoding them raises ValueError
            array.astype(array.dtype.newbyteorder("<")).tobytes().decode("utf-32-le")
    return arrays


def read_header(file: IO[bytes], size: int, kinds: str, where: str) -> Header:
    """Reads the header of an .npy of `size` bytes, whose dtype kind must be in `kinds`; `where` names it in errors."""
    head = io.BytesIO(file.read(HEADER_BYTES))
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(head)](head)
    except Exception as error:  # NumPy evaluates the header as a Python literal, which may fail in many ways
        raise InputError(f"{where} is not an array of numbers or text ({error!r:.200})") from error
    allowed = "(but scripts/pack.py reads [image, mass] of .npy files)"
    check(not dtype.hasobject, f"{where} holds Python objects, which are never unpickled {allowed}")
    right = dtype.kind in kinds and dtype.itemsize > 0
    check(right, f"{where} has dtype {dtype}, expected {KINDS.get(kinds, 'numbers or text')}")
    check(kinds != "uif" or dtype.itemsize <= 8, f"{where}: images are {dtype}, expected at most 64 bits a pixel")
    possible = len(shape) <= 32 and all(0 < length < 2**31 for length in shape)
    announced = f"{where} announces shape {shape!s:.80} of {dtype}, but header and data have {size} bytes"
    check(possible and head.tell() + math.prod(shape) * dtype.itemsize == size, f"{announced}; make it again")
    return Header(shape, fortran_order, dtype, head.tell())


def read_image_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    """Reads the header of images in an .npz, see `read_header`; its shape becomes (n, height, width)."""
    where = f"{archive.filename}: {info.filename}"
    with archive.open(info) as member:
        header = read_header(member, info.file_size, "uif", where)
    shape = header.shape
    right = 2 <= len(shape) <= 4 and (len(shape) < 4 or 1 in (shape[1], shape[3]))
    expected = "(height, width) or (n, height, width), perhaps with an axis of length 1 for the channel"
    check(right, f"{where}: images have shape {shape}, expected {expected}")
    if len(shape) == 4:
        shape = (shape[0], *shape[2:]) if shape[1] == 1 else shape[:3]
    elif len(shape) == 2 or shape[2] == 1:
        shape = (1, *shape[:2])
    return header._replace(shape=shape)


def map_images(file: IO[bytes], dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> MappedImages:
    """Returns images (n, height, width) of an open file, from byte `offset` on, without reading them."""
    return MappedImages(Path(file.name).absolute(), offset, dtype, shape, _identity(file))


def _locate_images(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> MappedImages:
    """Finds the images of an archive; their data must lie between the start of the file and its directory."""
    where, header = f"{archive.filename}: {info.filename}", read_image_header(archive, info)
    check(not header.fortran_order, f"{where} {FORTRAN}")
    file: Any = archive.fp
    file.seek(info.header_offset)
    name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))
    start = info.header_offset + 30 + name_bytes + extra_bytes
    check(start + info.file_size <= archive.start_dir, f"{where} is incomplete; make it again")
    return map_images(file, header.dtype, start + header.offset, header.shape)


def read_rows(images: np.ndarray | MappedImages, rows: np.ndarray | slice) -> np.ndarray:
    """Returns images[rows] as a new array in native byte order: 8 and 16 bits a pixel as they are, others by `scale`.

    All pixels of the project are read here. A file is mapped again for each call, because the pages of a map count as
    memory of the process while the map lives. `images` are (n, height, width), from `open_npz` or in memory, `rows` int
    (k,) or a slice. InputError if an image has NaN or infinite pixels, or the file was truncated or replaced since.
    """
    rows = np.arange(*rows.indices(len(images))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(images):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(images)} images")
    pixels = _map_again(images, rows) if isinstance(images, MappedImages) else images
    short = images.dtype.itemsize <= 2
    batch = np.empty((len(rows), *images.shape[1:]), images.dtype.newbyteorder("=") if short else np.float32)
    for image, row in zip(batch, rows.tolist(), strict=True):
        image[...] = pixels[row] if short else scale(pixels[row])
        if image.dtype == np.float16:  # NumPy's isfinite is slow for it; the exponent of infinity and NaN is all ones
            finite = (image.view(np.uint16) & 0x7C00).max() < 0x7C00
        else:
            finite = image.dtype.kind != "f" or np.isfinite(image).all()
        if not finite:
            file = f"{images.path}: " if isinstance(images, MappedImages) else ""
            raise InputError(f"{file}images[{row}] has NaN or infinite pixels; fix or remove this image")
    return batch


def scale(image: np.ndarray) -> np.ndarray:
    """Returns an image (height, width), of any real dtype, scaled to [0, 1] by its own minimum and maximum, in float32.

    Computed in float64 unless it is float32 already, so that neither a large offset nor a range beyond float32 loses
    precision. A constant image becomes 0; one with NaN or infinite pixels has NaN.
    """
    with np.errstate(invalid="ignore"):
        image = image.astype(np.float32 if image.dtype == np.float32 else np.float64)
        image /= 2  # so that its range is finite
        image -= image.min()
        image /= image.max() or 1
        return image.astype(np.float32, copy=False)


def check_pixels(images: np.ndarray | MappedImages) -> None:
    """Reads all images with `read_rows`, which raises InputError for pixels that are not finite."""
    count = max(1, CHUNK_BYTES // (math.prod(images.shape[1:]) * images.dtype.itemsize))
    for start in range(0, len(images), count) if images.dtype.kind == "f" else ():
        read_rows(images, slice(start, start + count))


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    """Returns numbers that change when the file is replaced or written to."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _map_again(images: MappedImages, rows: np.ndarray) -> np.ndarray:
    """Returns the images in a new map of the file, unless it has changed: reading a truncated file would be fatal."""
    try:
        with open(images.path, "rb") as file:
            same = _identity(file) == images.identity
            check(same, f"{images.path} has changed since it was opened (truncated or replaced); start again")
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{images.path} cannot be read any more ({error.strerror}); start again") from error
    row_bytes = math.prod(images.shape[1:]) * images.dtype.itemsize
    for first in (images.offset + rows * row_bytes).tolist():  # read from the disk all at once, not page by page
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, page, first - page + row_bytes)
    return np.ndarray(images.shape, images.dtype, pages, images.offset)
