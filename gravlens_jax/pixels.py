"""Pixels on disk: headers of arrays, images in a file as a numpy memory map, and the one function that reads them."""

import io
import math
import mmap
import os
from typing import IO, Any, NamedTuple

import numpy as np

from gravlens_jax.errors import InputError, check

CHUNK_BYTES = 2**25  # read at a time
HEADER_BYTES = 2**14  # NumPy accepts headers of up to 10,000
KINDS = {"f": "floating-point numbers", "ui": "integers", "uif": "real numbers", "U": "text"}


class Header(NamedTuple):  # of an .npy; its shape agrees with the number of bytes
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int  # of the first element, from the start of the header


class MappedImages(np.memmap):
    """Images in a file, as a read-only memory map, or a view of some of them. Read them with `read_rows`."""

    identity: tuple[int, ...] = ()  # of the file when it was opened
    whole: np.ndarray  # all images in the file

    def __array_finalize__(self, array: Any) -> None:
        super().__array_finalize__(array)
        if self.filename is not None:  # it shares the memory of `array`
            self.identity, self.whole = array.identity, array.whole

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array)[()]  # results of arithmetic are in memory, and scalars if they have no axes

    def name(self, row: int) -> str:
        """Returns the name of an image for error messages, with its row in the file."""
        distance = self.ctypes.data + row * self.strides[0] - self.whole.ctypes.data
        return f"{self.filename}: images[{distance // self.whole.strides[0]}]"


def read_header(file: IO[bytes], size: int, kinds: str, where: str) -> Header:
    """Reads the header of an .npy of `size` bytes, whose dtype must be one of KINDS; `where` is its name in errors."""
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
    check(
        len(shape) <= 32
        and all(0 < length < 2**31 for length in shape)
        and head.tell() + math.prod(shape) * dtype.itemsize == size,
        f"{where} announces shape {shape!s:.80} of {dtype}, but header and data have {size} bytes; make it again",
    )
    return Header(shape, fortran_order, dtype, head.tell())


def read_image_header(file: IO[bytes], size: int, where: str) -> Header:
    """Reads the header of an .npy of images, see `read_header`; its shape becomes (n, height, width)."""
    header = read_header(file, size, "uif", where)
    check(header.dtype.itemsize <= 8, f"{where}: images are {header.dtype}, expected at most 64 bits a pixel")
    return header._replace(shape=as_stack(header.shape, where))


def as_stack(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Returns (n, height, width) for the shape of one or more images, which may have an axis for one channel."""
    expected = "(height, width) or (n, height, width), perhaps with an axis of length 1 for the channel"
    check(2 <= len(shape) <= 4 and 0 not in shape, f"{where}: images have shape {shape}, expected {expected}")
    if len(shape) == 4:
        check(1 in (shape[1], shape[3]), f"{where}: images have shape {shape}, expected {expected}")
        return (shape[0], *shape[2:]) if shape[1] == 1 else shape[:3]
    return shape if len(shape) == 3 and shape[2] > 1 else (1, *shape[:2])


def map_images(file: IO[bytes], dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> MappedImages:
    """Returns images (n, height, width) of an open file, from byte `offset` on, without reading them."""
    images = MappedImages(file, dtype, "r", offset, shape)
    images.identity, images.whole = _identity(file), np.asarray(images)
    return images


def read_rows(images: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """Returns images[rows] as a new array in native byte order: 8 and 16 bits a pixel as they are, others by `scale`.

    All pixels of the project are read here. A file is mapped again for each call, because the pages of a map count as
    memory of the process while the map lives.

    Args:
      images: (n, height, width), from `open_npz`, a view of those, or in memory.
      rows: int (k,), or a slice.

    Raises:
      InputError: an image has NaN or infinite pixels; or the file was truncated or replaced since it was opened.
    """
    rows = np.arange(len(images))[rows]
    mapped = images if isinstance(images, MappedImages) and images.identity else None
    source = np.asarray(images) if mapped is None else _map_again(mapped, rows)
    short = images.dtype.itemsize <= 2
    batch = np.empty((len(rows), *images.shape[1:]), images.dtype.newbyteorder("=") if short else np.float32)
    for image, row in zip(batch, rows.tolist(), strict=True):
        image[...] = source[row] if short else scale(source[row])
        if not _all_finite(image):
            name = f"images[{row}]" if mapped is None else mapped.name(row)
            raise InputError(f"{name} has NaN or infinite pixels; fix or remove this image")
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


def check_pixels(images: np.ndarray) -> None:
    """Reads all images with `read_rows`, which raises InputError for pixels that are not finite."""
    if images.dtype.kind != "f":
        return
    count = max(1, CHUNK_BYTES * len(images) // max(1, images.nbytes))
    for start in range(0, len(images), count):
        read_rows(images, slice(start, start + count))


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    """Returns numbers that change when the file is replaced or written to."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _map_again(images: MappedImages, rows: np.ndarray) -> np.ndarray:
    """Returns the images in a new map of the file, or a view as it is; reading a truncated file would be fatal."""
    path = str(images.filename)
    try:
        with open(path, "rb") as file:
            same = _identity(file) == images.identity
            check(same, f"{path} is not the file that was opened any more (truncated or replaced); start again")
            if images.__array_interface__ != images.whole.__array_interface__:
                return np.asarray(images)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path} cannot be read any more ({error.strerror}); start again") from error
    row_bytes = images.strides[0]
    for first in (images.offset + rows * row_bytes).tolist():  # read from the disk all at once, not page by page
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, page, first - page + row_bytes)
    return np.ndarray(images.shape, images.dtype, pages, images.offset)


def _all_finite(image: np.ndarray) -> bool:
    """Returns whether all pixels are finite."""
    if image.dtype == np.float16:  # NumPy's isfinite is slow for it; the exponent of infinity and NaN is all ones
        return int((image.view(np.uint16) & 0x7C00).max()) < 0x7C00
    return image.dtype.kind != "f" or bool(np.isfinite(image).all())
