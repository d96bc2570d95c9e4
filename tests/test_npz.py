"""The file format, reading by memory map, and attacks by .npz files; test_fuzz has damaged files of all kinds."""

import io
import os
import re
import shlex
import shutil
import struct
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from gravlens_jax import CLASSES, InputError, npz
from gravlens_jax.folders import load_npz
from gravlens_jax.npz import check_pixels, load_arrays, open_npz, read_rows, scale, write_npz
from helpers import limited_memory, refuse, save_npz
from pack import convert

RNG = np.random.default_rng(0)
IMAGES, LABELS = np.ones((3, 4, 4), np.float32), np.arange(3)
ARRAYS = {"images": IMAGES, "labels": LABELS, "classes": np.array(CLASSES)}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
READERS = {
    "open_npz": open_npz,
    "load_npz": load_npz,
    "load_arrays": lambda path: load_arrays(path, "arrays", "uifU"),
    "convert": lambda path: convert(path, path.with_name("out.npz")),
}


def npy(shape, data=bytes(192), dtype="<f4"):
    """Returns the bytes of an .npy with this header."""
    file, header = io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def write_members(path, reader="open_npz", **replaced):
    """Writes a valid file, with compressed images for load_npz; some members may be other arrays or bytes."""
    images = DEFLATED if reader == "load_npz" else STORED
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (ARRAYS | replaced).items():
            np.save(file := io.BytesIO(), data)
            data = data if isinstance(data, bytes) else file.getvalue()
            archive.writestr(f"{name}.npy", data, images if name == "images" else DEFLATED)
    return path


def edit(path, which, offset, value):
    """Overwrites bytes of the entry of the member number `which` in the directory of the archive."""
    data = bytearray(path.read_bytes())
    at = [match.start() for match in re.finditer(b"PK\1\2", data)][which] + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def refuse_file(reader, path, message):
    """Asserts one InputError that names the file and the reason, little memory, and no other files."""
    files = sorted(path.parent.iterdir())
    with limited_memory(2**22), pytest.raises(InputError, match=message) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value) and sorted(path.parent.iterdir()) == files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_images_survive_a_round_trip_and_are_indexed_like_an_array(tmp_path, dtype):
    path, images, labels = tmp_path / "new/a.npz", (RNG.random((5, 6, 4)) * 100).astype(dtype), [0, 1, 2, 0, 1]
    arguments = images.shape, images.dtype, np.array(labels), CLASSES, {"a": "b"}, {"parameters/shear": np.ones((5, 2))}
    write_npz(path, np.array_split(images, 2), *arguments)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], images)
        assert archive["classes"].tolist() == list(CLASSES)
    dataset = open_npz(path)
    assert (dataset.size, dataset.image_shape, dataset.classes, dataset.info) == (5, (6, 4), CLASSES, {"a": "b"})
    assert dataset.labels.dtype == np.int32 and dataset.labels.tolist() == labels
    assert dataset.lens_params.keys() == {"shear"} and dataset.lens_params["shear"].shape == (5, 2)
    mapped, expected = dataset.images, images if images.itemsize <= 2 else np.stack([scale(image) for image in images])
    assert (len(mapped), mapped.shape, mapped.dtype) == (5, images.shape, images.dtype)
    for rows in (3, -1, np.int64(2), np.s_[:], np.s_[1:6:2], np.s_[::-1], np.s_[:0], [3, -1], np.eye(2, 5, dtype=int)):
        np.testing.assert_array_equal(mapped[rows], expected[rows])
    for rows in (5, -6, [0, 5], np.s_[:, 1], np.s_[..., None]):
        with pytest.raises(IndexError):
            mapped[rows]


def test_arrays_of_numpy_in_any_order_beside_members_of_the_system_are_read(tmp_path):
    path, arrays = tmp_path / "a.npz", ARRAYS | {"images": IMAGES[:, None], "F/order": np.asfortranarray(np.eye(4)[:3])}
    pipe = io.BytesIO()
    pipe.tell = Mock(side_effect=OSError)  # as of a pipe, so that sizes follow the data
    np.savez(pipe, **arrays)
    path.write_bytes(pipe.getvalue())
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("__MACOSX/._images.npy", "._labels.npy", ".DS_Store"):
            archive.writestr(name, b"\0\5\26\7")
    assert open_npz(path).images.shape == (3, 4, 4) and open_npz(path).info == {}
    found = READERS["load_arrays"](path)
    assert found.keys() == arrays.keys() and all((found[name] == array).all() for name, array in arrays.items())


@pytest.mark.parametrize("names", ["images labels classes", "images labels", "images", "x y classes"])
def test_open_npz_refuses_other_forms_unread_with_the_command_that_converts_them(tmp_path, run_here, names):
    path, images = tmp_path / "my file.npz", np.ones((3, 1024, 1024), np.uint16)
    np.savez_compressed(path, **dict(zip(names.split(), (images, LABELS, np.array(CLASSES)), strict=False)))
    refuse_file("open_npz", path, r"has \w.*; expected uncompressed images, and labels .*convert it: ")
    with pytest.raises(InputError) as caught:
        open_npz(path, need_labels=False)
    command = str(caught.value).partition("convert it: ")[2]
    assert command.startswith("python scripts/pack.py '/") and ("--classes" in command) == (names == "images labels")
    run_here(tmp_path, "pack.py", *shlex.split(command.replace("...", ",".join(CLASSES)))[2:])
    dataset = open_npz(tmp_path / "packed/my file.npz", need_labels=names != "images")
    assert dataset.images.shape == images.shape
    assert names == "images" or (dataset.labels.tolist() == [0, 1, 2] and dataset.classes == CLASSES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("bad", [np.eye(3), LABELS * 1.0, LABELS.astype(str), LABELS[:2], LABELS + 7])
def test_labels_are_not_read_if_only_images_are_needed(tmp_path, save, bad):
    save(tmp_path / "a.npz", images=IMAGES, labels=bad, classes=LABELS, info=LABELS)
    dataset = load_npz(tmp_path / "a.npz", need_labels=False)
    assert len(dataset.images) == 3 and dataset.labels.tolist() == [0, 0, 0] and dataset[2:] == ((), {}, None)
    refuse(r"a\.npz.*(labels|classes)", load_npz, tmp_path / "a.npz")


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"labels": np.array([0, -1, 3])}, "labels run from -1 to 3, expected 0 to 2 for no, sphere, vort"),
        ({"labels": np.array([0, 1, 2**32])}, "labels run from 0 to 4294967296"),
        ({"labels": LABELS[:, None]}, "3 images but labels of shape"),
        ({"images": IMAGES.astype(np.longdouble)}, "expected at most 64 bits a pixel"),
        ({"classes": np.array([0xD800] * 3, "<u4").view("<U1")}, "surrogate|code point not in range"),
        (
            {"images": np.asfortranarray(np.eye(4)[:3])},
            "is in Fortran order; save it again with numpy.ascontiguousarray",
        ),
        ({"info": np.array("[" * 10**5)}, "info is not readable JSON"),
        ({"parameters/shear": np.ones(2)}, r"3 images but shear of shape \(2,\)"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, monkeypatch, replaced, message):
    monkeypatch.setattr(npz, "MEMORY_BYTES", 2**21)
    refuse_file("open_npz", write_members(tmp_path / "a.npz", **replaced), message)
    if replaced.keys() <= ARRAYS.keys() and "Fortran" not in message:  # load_npz reads neither info nor parameters
        refuse_file("load_npz", write_members(tmp_path / "a.npz", "load_npz", **replaced), message)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


ABSURD_IMAGES = [  # test_fuzz has more
    *map(npy, [(10**12, 150, 150), (-3, -4, 4), (0, 4, 4), (2**62, 4, 1), (1,) * 65]),
    *(npy((3, 4, 4), dtype=dtype) for dtype in ("<U0", ("<f4", (10**8,)), [("a", "<f4")])),
    *(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text for text in (b"-" * 9000 + b"1", b"(" * 999)),
    b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**23) + bytes(2**23),
]
BOMB = r"unpack to 8,\d\d\d,\d\d\d bytes, expected at most 2,097,152"
INCOMPLETE = "incomplete|Overlapped|Bad CRC|EOF|truncated|announces|cannot reshape|convert it"
ATTACKS = [  # members, an edit of the directory of the archive or None, message
    ({}, (1, 8, b"\1"), "encrypted"),
    ({}, (1, 10, struct.pack("<H", zipfile.ZIP_LZMA)), "neither stored nor deflated"),
    ({}, (0, 20, struct.pack("<LL", 2**31, 2**31)), INCOMPLETE),
    ({}, (0, 24, struct.pack("<L", 10**9)), "announces"),
    ({}, (1, 42, bytes(4)), "differ"),  # begins where the images do
    ({"labels": npy((3,), LABELS.tobytes() + bytes(2**23), "<i8")}, (1, 24, struct.pack("<L", 152)), "Bad CRC-32"),
    ({"labelz": LABELS}, (3, 46, b"labels"), "two members have the same name"),
    *(({name: np.array([Evil(), None, None])}, None, f"{name}(.npy)? holds Python objects") for name in ARRAYS),
    *(({"images": data}, None, "images(.npy)? (announces shape|has dtype|is not an array)") for data in ABSURD_IMAGES),
    ({"classes": npy((2**21,), bytes(2**23), "<U1")}, None, BOMB),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("replaced, change, message", ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_are_refused_and_nothing_executed(tmp_path, monkeypatch, reader, replaced, change, message):
    monkeypatch.setattr(npz, "MEMORY_BYTES", 2**21)
    monkeypatch.chdir(tmp_path)
    path = write_members(tmp_path / "a.npz", reader, **replaced)
    refuse_file(reader, edit(path, *change) if change else path, message)


def test_file_for_which_there_is_no_space_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=191)))
    refuse(r"a\.npz needs 192 bytes, 191 are free; free space", save_npz, tmp_path / "a.npz", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype, low, high",
    [
        *((dtype, 0, 160) for dtype in ("u1", ">u2", ">f2", ">f4", "<f8", ">f8", "i4", "u8")),
        *(("f8", 0, 1e-300), ("f8", 1e9, 1e9 + 1), ("f8", -1.7e308, 1.7e308), ("f4", 0, 1e-39), ("f4", -3e38, 3e38)),
        *(("f4", 100, 1e5), ("i8", 2**52, 2**52 + 10**6), ("u4", 0, 2**32 - 1)),
    ],
)
def test_images_of_8_and_16_bits_are_read_as_stored_and_others_scaled_to_0_1(tmp_path, dtype, low, high):
    unit = RNG.permuted(np.tile(np.arange(20) % 17 / 16, (7, 1)), axis=1).reshape(7, 4, 5)
    images = (low * (1 - unit) + high * unit).astype(dtype)
    short, atol = images.itemsize <= 2, 1e-5 if "f4" in dtype else 2e-6
    views = np.repeat(images, 2, 0)[::2], np.asfortranarray(images), images[::-1][::-1]
    for given in (open_npz(save_npz(tmp_path / "a.npz", images)).images, images, *views):
        for rows in (np.array([3, 0, 3]), slice(1, 3), slice(0)):
            batch = read_rows(given, rows)
            np.testing.assert_allclose(batch, images[rows] if short else unit[rows], atol=atol)
            assert batch.dtype.isnative and batch.dtype == (dtype.strip("<>") if short else "f4")
            assert type(batch) is np.ndarray and batch.flags.owndata and batch.flags.carray
    assert not scale(np.full((4, 5), high, dtype)).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda path, images: os.truncate(path, 50_000),
        lambda path, images: os.replace(save_npz(path.with_name("b.npz"), images), path),
        lambda path, images: os.utime(path, ns=(0, 0)),
        lambda path, images: path.unlink(),
    ],
)
def test_file_that_changes_after_it_was_opened_is_an_error(tmp_path, change):
    images = np.zeros((5, 100, 100), np.uint16)
    path = save_npz(tmp_path / "a.npz", images)
    mapped = open_npz(path).images
    change(path, images)
    for read in (lambda: read_rows(mapped, np.array([0, 3])), lambda: mapped[2]):
        refuse(r"a\.npz (has changed since it was opened|cannot be read).*start again", read)
    check_pixels(mapped)  # integers are finite and not read


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_pages_of_a_file_do_not_stay_in_memory(tmp_path):
    def resident():
        return int(re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    images = np.zeros((128, 512, 512), np.float16)
    mapped = open_npz(save_npz(tmp_path / "a.npz", images)).images
    before = resident()
    for rows in np.random.default_rng(0).permutation(128).reshape(-1, 4):
        read_rows(mapped, rows)
    with limited_memory(images.nbytes * 0.6):
        check_pixels(mapped)
    assert resident() - before < images.nbytes / 4


def test_rows_beyond_2_gib_are_read_by_indices_of_32_bits(tmp_path):
    with open(tmp_path / "a", "wb+") as file:
        file.truncate(3000 * 900**2)  # a sparse file
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
        file.flush()
        images = npz.map_images(file, np.dtype("u1"), 0, (3000, 900, 900))
    assert read_rows(images, np.array([0, 2999], np.int32)).max((1, 2)).tolist() == [0, 7]
