import io
import os
import re
import shutil
import struct
import tracemalloc
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from gravlens_jax import npz
from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError
from gravlens_jax.npz import is_copy, load_arrays, open_npz, unpack_npz, write_npz
from gravlens_jax.pixels import read_rows

RNG = np.random.default_rng(0)
IMAGES, LABELS = np.ones((3, 4, 4), np.float32), np.array([0, 1, 2])
ARRAYS = {"images": IMAGES, "labels": LABELS}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def load_all(path):
    return load_arrays(path, "arrays", "uif")


def save(path, images):
    labels = np.arange(len(images)) % 3
    write_npz(path, np.array_split(images, 2), images.shape, images.dtype, labels, CLASSES, {"source": "test"})
    return path


def npy(array=None, shape=None, dtype="<f4", data=b""):
    """Returns the bytes of an array, or of a header and any data after it."""
    file = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.write(data)
    return file.getvalue()


def members(path, compression=STORED, **replaced):
    """Writes a valid file, in which some members may be other bytes; the sizes are 32 bits in its headers."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in ({name: npy(array) for name, array in ARRAYS.items()} | replaced).items():
            archive.writestr(f"{name}.npy", data)
    return path


def edit(path, which, offset, value):
    """Overwrites bytes of the entry of the member number `which` in the directory of the archive."""
    data = bytearray(path.read_bytes())
    at = [match.start() for match in re.finditer(b"PK\1\2", data)][which] + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def refuse(reader, path, message, most=2**23):
    """Asserts one InputError that names the file and the reason, little memory, and no other files."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert not list(path.parent.glob("*.unpacked.npz")) and not list(path.parent.glob(".*tmp"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_images_survive_a_round_trip_through_the_memory_map(tmp_path, dtype):
    images = (RNG.random((5, 6, 4)) * 100).astype(dtype)
    dataset = open_npz(save(tmp_path / "a.npz", images))
    assert isinstance(dataset.images, np.memmap) and not dataset.images.flags.writeable
    np.testing.assert_array_equal(dataset.images, images)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1] and dataset.labels.dtype == np.int32
    assert dataset.images.dtype == dtype and dataset.classes == CLASSES and dataset.info == {"source": "test"}
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], images)
        assert archive["classes"].tolist() == list(CLASSES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_are_read_and_compressed_ones_unpacked_once_with_a_message(tmp_path, capsys, save):
    images, compressed = RNG.random((5, 1, 6, 4)), save is np.savez_compressed
    save(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2, 0, 1]))
    for _ in range(2):
        dataset = open_npz(tmp_path / "a.npz")
        np.testing.assert_array_equal(dataset.images, images[:, 0])
        assert dataset.classes == CLASSES and isinstance(dataset.images, np.memmap)
    assert capsys.readouterr().err.count("unpacking it once to") == compressed
    (tmp_path / "a.npz").rename(tmp_path / "a.NPZ")
    assert [file.name for file in tmp_path.iterdir() if is_copy(file)] == ["a.unpacked.npz"] * compressed


def test_files_written_to_a_pipe_are_read(tmp_path):
    class Pipe(io.BytesIO):
        def tell(self):
            raise OSError("a pipe has no position")  # so that sizes follow the data

    np.savez(pipe := Pipe(), **ARRAYS)
    (tmp_path / "a.npz").write_bytes(pipe.getvalue())
    assert read_rows(open_npz(tmp_path / "a.npz").images, slice(None)).shape == IMAGES.shape


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_without_labels_serves_prediction_only(tmp_path, save):
    save(tmp_path / "a.npz", images=RNG.random((2, 6, 4)))
    for _ in range(2):
        assert len(open_npz(tmp_path / "a.npz", need_labels=False).images) == 2
        with pytest.raises(InputError, match=r"a\.npz: has no 'labels', only images"):
            open_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("bad", [np.eye(3), LABELS * 1.0, LABELS.astype(str), LABELS[:2], LABELS + 7])
def test_labels_that_are_not_needed_are_ignored(tmp_path, save, bad):
    save(tmp_path / "a.npz", images=IMAGES, labels=bad, classes=LABELS, info=LABELS)
    for _ in range(2):
        assert open_npz(tmp_path / "a.npz", need_labels=False).labels.tolist() == [0, 0, 0]
        with pytest.raises(InputError, match=r"a\.npz: (labels|classes)"):
            open_npz(tmp_path / "a.npz")
    save(tmp_path / "a.npz", **ARRAYS)
    assert open_npz(tmp_path / "a.npz", need_labels=False).size == 3
    assert open_npz(tmp_path / "a.npz").labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", ["X y", "x_train y_train", "data labels", "data target", "arr_0 arr_1", "images Y"])
def test_arrays_may_have_other_usual_names_and_those_left_out_are_named(tmp_path, capsys, save, names):
    images, labels = names.split()
    others = {"x_test": IMAGES, "parameters/shear": LABELS, "info": np.array("{}")}
    save(tmp_path / "a.npz", **{images: IMAGES[..., None], labels: LABELS}, **others)
    dataset = open_npz(tmp_path / "a.npz")
    assert dataset.images.shape == (3, 4, 4) and dataset.labels.tolist() == [0, 1, 2]
    expected = f"a.npz: images are {images!r}, labels are {labels!r}; left out: x_test\n"
    assert capsys.readouterr().err.count(expected) == 1
    save(tmp_path / "b.npz", **{images: IMAGES})
    assert open_npz(tmp_path / "b.npz", need_labels=False).size == 3
    with pytest.raises(InputError, match=r"b\.npz: has no '(labels|y_train|arr_1)', only"):
        open_npz(tmp_path / "b.npz")


def test_members_of_the_system_are_ignored(tmp_path):
    path = members(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("__MACOSX/._images.npy", "._labels.npy", ".DS_Store"):
            archive.writestr(name, b"\0\5\26\7")
    assert open_npz(path).size == 3 and load_all(path).keys() == ARRAYS.keys()


@pytest.mark.parametrize("variable", ["cache", ""])
def test_a_file_on_a_read_only_disk_is_unpacked_in_the_cache_folder(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(os, "access", lambda path, mode: tmp_path / "data" not in (path, *path.parents))
    monkeypatch.setenv("XDG_CACHE_HOME", variable and str(tmp_path / variable))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    path = members(tmp_path / "data/a.npz", DEFLATED)
    folder = tmp_path / (variable or "home/.cache") / "gravlens_jax/unpacked"
    for _ in range(2):
        (copy,) = {Path(open_npz(path).images.filename), *folder.glob("*")}
        assert re.fullmatch(r"[0-9a-f]{16}-a\.unpacked\.npz", copy.name) and list(path.parent.iterdir()) == [path]


def test_unpack_npz_overwrites_neither_files_nor_class_names(tmp_path):
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    np.savez_compressed(a, images=RNG.random((2, 6, 4)), labels=np.array([0, 1]))
    assert unpack_npz(a, b, ("x", "y")) == b and open_npz(b).classes == ("x", "y")
    with pytest.raises(InputError, match=r"b\.npz exists; give the name of a new file"):
        unpack_npz(a, b, ("y", "x"))
    with pytest.raises(InputError, match="names its classes itself, x, y; leave --classes y,x out"):
        unpack_npz(b, c, ("y", "x"))
    assert open_npz(unpack_npz(b, c)).classes == ("x", "y") and not is_copy(c)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": IMAGES, "labels": np.array([0, 1, 3])}, "labels run from 0 to 3, expected 0 to 2"),
        ({"images": IMAGES, "labels": np.array([-1, 1, 2])}, "labels run from -1"),
        ({"images": IMAGES, "labels": np.array([0, 1, 2**32])}, "labels run from 0 to 4294967296"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, "3 images but labels of shape"),
        ({"images": IMAGES, "labels": LABELS * 1.0}, "labels.npy has dtype float64, expected integers"),
        ({"images": IMAGES[0], "labels": LABELS}, r"1 images but labels of shape \(3,\)"),
        ({"images": IMAGES.astype(np.longdouble), "labels": LABELS}, "expected at most 64 bits a pixel"),
        ({"images": IMAGES.astype(complex), "labels": LABELS}, "dtype complex128"),
        ({"images": np.asfortranarray(IMAGES), "labels": LABELS}, "Fortran order"),
        ({"labels": LABELS}, "has no 'images', only labels"),
        (ARRAYS | {"info": np.array("[]")}, "info is not a JSON object"),
        (ARRAYS | {"info": np.array("[" * 10**5)}, "info is not readable JSON"),
        (ARRAYS | {"info": np.array(["{}", "{}"])}, "can only convert an array of size 1"),
        (ARRAYS | {"info": np.array(1)}, "info.npy has dtype int64, expected text"),
        (ARRAYS | {"classes": np.array([2**21] * 3, ">u4").view(">U1")}, "code point not in range"),
        (ARRAYS | {"classes": np.array([0xD800] * 3, "<u4").view("<U1")}, "surrogate|code point not in range"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    refuse(open_npz, tmp_path / "a.npz", message, most=2**25)


def test_python_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for save, name in ((np.savez, "images"), (np.savez_compressed, "images"), (np.savez, "labels")):
        save(tmp_path / "a.npz", **ARRAYS | {name: np.array([Bomb(), None, None])})
        for reader in (open_npz, load_all):
            refuse(reader, tmp_path / "a.npz", rf"{name}\.npy holds Python objects")
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_is_missing_or_truncated_anywhere_is_refused(tmp_path):
    refuse(open_npz, tmp_path / "a.npz", r"a\.npz: no such file")
    whole = save(tmp_path / "a.npz", np.ones((5, 6, 4))).read_bytes()
    for size in [0, 1, 30, *range(100, len(whole), 97)]:
        (tmp_path / "b.npz").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"b\.npz"):
            open_npz(tmp_path / "b.npz")


@pytest.mark.parametrize("reader", [open_npz, load_all])
@pytest.mark.parametrize(
    "which, offset, value, message",
    [
        (1, 8, b"\1", "encrypted"),
        (1, 10, struct.pack("<H", zipfile.ZIP_LZMA), "neither stored nor deflated"),
        (1, 16, b"\1\2\3\4", "Bad CRC-32"),
        (0, 20, struct.pack("<LL", 2**31, 2**31), "truncated|Overlapped"),
        (0, 24, struct.pack("<L", 10**9), "announces"),
        (1, 42, struct.pack("<L", 0), "differ"),  # begins where images.npy does
    ],
)
def test_damaged_archives_are_refused(tmp_path, reader, which, offset, value, message):
    refuse(reader, edit(members(tmp_path / "a.npz"), which, offset, value), message)


def test_images_that_reach_beyond_their_part_of_the_file_are_refused(tmp_path):
    path = members(tmp_path / "a.npz", images=npy(shape=(3, 99, 99), data=bytes(2**16)))
    size = struct.pack("<L", len(npy(np.zeros((3, 99, 99), np.float32))))
    refuse(open_npz, edit(path, 0, 20, size + size), "images.npy is incomplete|Overlapped")


def test_duplicate_names_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("images.npy", "images"):
            archive.writestr(name, npy(ARRAYS["images"]))
    for reader in (open_npz, load_all):
        refuse(reader, tmp_path / "a.npz", "two members have the same name")


@pytest.mark.parametrize("reader", [open_npz, load_all])
@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, "<f4") for shape in ((10**12, 150, 150), (-3, -4, 4), (0, 4, 4), (2**62, 4, 1), (1,) * 65)]
    + [((3, 4, 4), dtype) for dtype in ("<U0", "|V4", ("<f4", (10**8,)), [("a", "<f4")])],
)
def test_absurd_shapes_and_types_are_refused(tmp_path, reader, shape, dtype):
    path = members(tmp_path / "a.npz", DEFLATED, images=npy(shape=shape, dtype=dtype, data=bytes(192)))
    refuse(reader, path, "images.npy (announces shape|has dtype)")


@pytest.mark.parametrize("header", [b"-" * 9000 + b"1", b"(" * 999, b"{'shape': 1}", b"\xff", b"'\\d'", b"{1: 2}"])
def test_damaged_headers_are_refused(tmp_path, header):
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    refuse(open_npz, members(tmp_path / "a.npz", images=data), "images.npy is not an array")


@pytest.mark.parametrize(
    "reader, replaced, message",
    [
        (open_npz, {"images": b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**24) + bytes(2**24)}, "not an array"),
        (open_npz, {"classes": npy(shape=(2**22,), dtype="<U1", data=bytes(2**24))}, "labels, classes unpack to 16,"),
        (open_npz, {"info": npy(shape=(), dtype=f"<U{2**22}", data=bytes(2**24))}, "labels, info unpack to 16,"),
        (open_npz, {"images": npy(shape=(3, 2**10, 2**10), data=bytes(3 * 2**22))}, "more than images can be compres"),
        (load_all, {name: npy(np.zeros(2**18)) for name in "abc"}, "a, b, c unpack to 6,29[0-9,]+ bytes, expected 4,"),
    ],
)
def test_decompression_bombs_are_refused_unread(tmp_path, monkeypatch, reader, replaced, message):
    monkeypatch.setattr(npz, "MEMORY_BYTES", 2**22)
    refuse(reader, members(tmp_path / "a.npz", DEFLATED, **replaced), message, most=2**20)


def test_compressed_images_larger_than_a_chunk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "CHUNK_BYTES", 63)
    refuse(open_npz, members(tmp_path / "a.npz", DEFLATED), "more than images can be compressed")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_no_more_is_unpacked_than_announced(tmp_path, name):
    contents = npy(ARRAYS[name])
    real = contents + bytes(2**24)
    which = list(ARRAYS).index(name)
    path = edit(members(tmp_path / "a.npz", DEFLATED, **{name: real}), which, 24, struct.pack("<L", len(contents)))
    refuse(open_npz, path, rf"Bad CRC-32 for file '{name}\.npy'", most=2**22)
    edit(path, which, 16, struct.pack("<L", zlib.crc32(contents)))
    np.testing.assert_array_equal(open_npz(path).images, 1)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=191))
    with pytest.raises(InputError, match=r"a\.unpacked\.npz needs 192 bytes, 191 are free; free space"):
        open_npz(members(tmp_path / "a.npz", DEFLATED))
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    images = np.ones((5, 6, 4))
    path = save(tmp_path / "a.npz", images)

    def chunks():
        yield images[:2]
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; existing files are unchanged"):
        write_npz(path, chunks(), images.shape, images.dtype, np.zeros(5), CLASSES, {})
    np.testing.assert_array_equal(open_npz(path).images, images)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("order", ["C", "F"])
def test_load_arrays_reads_numbers_and_text(tmp_path, order):
    arrays = {"a/b": np.asarray(np.arange(24.0).reshape(2, 3, 4), order=order), "about": np.array("text")}
    np.savez(tmp_path / "a.npz", **arrays)
    read = load_arrays(tmp_path / "a.npz", "a network", "fU")
    assert read.keys() == arrays.keys() and read["about"].item() == "text"
    np.testing.assert_array_equal(read["a/b"], arrays["a/b"])
    refuse(load_all, tmp_path / "a.npz", "about.npy has dtype <U4, expected real numbers")
