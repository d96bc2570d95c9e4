"""Arrays in files from anywhere: what a file announces is checked before memory is taken for it; none is unpickled."""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

import numpy as np

from gravlens_jax.config import InputError, check

MEMORY_BYTES = 2**26  # that arrays may take which are larger than their file
HEADER_BYTES = 2**14  # NumPy accepts headers of up to 10,000
KINDS = {"f": "floating-point numbers", "ui": "integers", "uif": "real numbers", "U": "text"}
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, ValueError, OverflowError, EOFError)


class Header(NamedTuple):
    """What an array announces, and its bytes agree with."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # of the first element, after the start of the header


@contextmanager
def open_archive(path: Path, expected: str) -> Iterator[zipfile.ZipFile]:
    """Opens an .npz of sound structure; what goes wrong, here or while it is read, becomes InputError."""
    check(path.is_file(), f"{path}: no such file; expected {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            check(len(members(archive)) == len(infos), f"{path}: two members have the same name")
            end = 0
            for info in infos:
                where, place = f"{path}: {info.filename!r}", PureWindowsPath(info.filename)  # knows / \ and C:
                check(not place.anchor and ".." not in place.parts, f"{where} is a name outside of the archive")
                check(info.compress_type in (0, zipfile.ZIP_DEFLATED), f"{where} is neither stored nor deflated")
                check(not info.flag_bits & 0x41, f"{where} is encrypted")
                check(info.header_offset >= end, f"{where} overlaps another member")
                end = data_start(archive, info) + info.compress_size
            check(end <= archive.start_dir, f"{path}: its members reach beyond their part of the file")
            yield archive
    except InputError:
        raise
    except (OSError, *DAMAGED) as error:
        raise InputError(f"{path}: not a readable .npz ({error}); expected {expected}") from error


def members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the members by name, without .npy."""
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def data_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Returns where in the file a member's bytes start; its local header must repeat what the directory says."""
    archive.open(info).close()  # compares signature and name
    assert archive.fp is not None  # it is open
    archive.fp.seek(info.header_offset)
    flags, method, crc, packed, size, name_bytes, extra_bytes = struct.unpack("<6xHH4xLLLHH", archive.fp.read(30))
    extra = archive.fp.read(name_bytes + extra_bytes)[name_bytes:]
    if packed == size == 2**32 - 1 and struct.pack("<QQ", info.file_size, info.compress_size) in extra:
        packed, size = info.compress_size, info.file_size
    same = (crc, packed, size) == (info.CRC, info.compress_size, info.file_size) or flags & 8  # 8: they follow the data
    same = same and (info.compress_type == zipfile.ZIP_DEFLATED or info.compress_size == info.file_size)
    same = same and (flags, method) == (info.flag_bits, info.compress_type)
    check(bool(same), f"{archive.filename}: {info.filename!r} is described in two places that disagree; make it again")
    return info.header_offset + 30 + name_bytes + extra_bytes


def read_header(file: IO[bytes], size: int, kinds: str, where: str) -> Header:
    """Reads the header of an array, one of KINDS, that is announced to end `size` bytes after the file's position."""
    head = io.BytesIO(file.read(HEADER_BYTES))
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(head)](head)
    except Exception as error:  # the header is a Python literal, and there are many ways not to be one
        raise InputError(f"{where} is not an array of numbers or text ({error!r:.200})") from error
    check(not dtype.hasobject, f"{where} holds Python objects, which are never unpickled")
    check(dtype.kind in kinds and dtype.itemsize > 0, f"{where} has dtype {dtype}, expected {KINDS[kinds]}")
    check(
        len(shape) <= 4
        and all(0 < length < 2**31 for length in shape)
        and head.tell() + math.prod(shape) * dtype.itemsize == size,
        f"{where} announces shape {shape!s:.80} of {dtype}, but header and data have {size} bytes; make it again",
    )
    return Header(shape, dtype, fortran_order, head.tell())


def member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str) -> Header:
    """Reads the header of a member."""
    with archive.open(info) as file:
        return read_header(file, info.file_size, kinds, f"{archive.filename}: {info.filename}")


def read_members(archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], kinds: str) -> dict[str, np.ndarray]:
    """Reads whole members, name -> array; if one is not of `kinds`, or all are too large together, reads none."""
    for info in infos.values():
        member_header(archive, info, kinds)
    assert archive.filename is not None  # it is a file
    total, most = sum(i.file_size for i in infos.values()), max(MEMORY_BYTES, os.path.getsize(archive.filename))
    check(total <= most, f"{archive.filename}: {', '.join(infos):.80} unpack to {total:,} bytes, expected {most:,}")
    arrays = {}
    for name, info in infos.items():
        with archive.open(info) as file:
            array = arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        if kinds == "U":  # Python's strings crash on code points that do not exist; this raises ValueError
            array.astype(array.dtype.newbyteorder("<")).tobytes().decode("utf-32-le")
    return arrays
