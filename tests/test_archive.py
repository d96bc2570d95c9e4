import io
import json
import shutil
import struct
import sys
import tracemalloc
import types
import zipfile
import zlib

import numpy as np
import pytest

from gravlens_jax import archive, npz, weights
from gravlens_jax.config import InputError
from gravlens_jax.folders import load_image
from gravlens_jax.npz import open_npz, unpack_npz, write_npz
from gravlens_jax.torch_weights import load_state_dict

ARRAYS = {"images": np.ones((3, 4, 4), np.float32), "labels": np.array([0, 1, 2])}
READERS = [open_npz, weights.load_network, load_state_dict]
DIRECTORY, LOCAL = b"PK\x01\x02", b"PK\x03\x04"  # the signatures of a member's entries


def npy(array=None, shape=None, dtype="<f4", data=b"", version=(1, 0)):
    """Returns the bytes of an array, or of a header that announces one and whatever data follow."""
    file = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(file, array, version)
    else:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)
    return file.getvalue()


def write(path, members, compression=zipfile.ZIP_STORED):
    """Writes members (name, bytes); unlike savez, without force_zip64, so that all sizes are in the headers proper."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def valid(path, compression=zipfile.ZIP_STORED, **replaced):
    contents = {name: npy(array) for name, array in ARRAYS.items()} | replaced
    return write(path, [(f"{name}.npy", data) for name, data in contents.items()], compression)


def edit(path, signature, which, offset, value):
    """Overwrites bytes of the entry number `which` with that signature."""
    data, at = bytearray(path.read_bytes()), -1
    for _ in range(which + 1):
        at = data.index(signature, at + 1)
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)


def refuse(reader, path, message, most=2**23):
    """Asserts one InputError that names the file and the reason, without memory being taken."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert not list(path.parent.glob("*.unpacked.npz")) and not list(path.parent.glob(".*tmp"))


def test_the_edited_files_are_good_before_they_are_edited(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        np.testing.assert_array_equal(open_npz(valid(tmp_path / f"{compression}.npz", compression)).images, 1)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["/etc/images.npy", "../images.npy", "a/../../b.npy", "\\a.npy", "..\\a.npy", "C:a.npy"]
)
def test_names_outside_of_the_archive_are_refused(tmp_path, reader, name):
    path = write(tmp_path / "a.npz", [("images.npy", npy(ARRAYS["images"])), (name, npy(ARRAYS["labels"]))])
    refuse(reader, path, "is a name outside of the archive")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["images.npy", "images"])
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_names_are_refused(tmp_path, reader, name):
    path = write(tmp_path / "a.npz", [("images.npy", npy(ARRAYS["images"])), (name, npy(ARRAYS["images"]))])
    refuse(reader, path, "two members have the same name")


@pytest.mark.parametrize("reader", READERS)
def test_overlapping_members_are_refused(tmp_path, reader):
    path = valid(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as file:
        labels = file.getinfo("labels.npy").header_offset
    # images.npy then has the place, the name and the bytes of labels.npy, or reaches into it
    edit(path, DIRECTORY, 0, 42, struct.pack("<L", labels))
    refuse(reader, path, "differ|Overlapped")
    path = valid(tmp_path / "a.npz")
    for signature, offset in ((DIRECTORY, 20), (LOCAL, 18)):
        edit(path, signature, 0, offset, struct.pack("<LL", 400, 400))
    refuse(reader, path, "'labels.npy' overlaps another member|Overlapped")  # newer zipfiles notice it themselves


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("offset", [10**6, 2**32 - 2])
def test_members_beyond_the_file_are_refused(tmp_path, reader, offset):
    path = valid(tmp_path / "a.npz")
    edit(path, DIRECTORY, 1, 42, struct.pack("<L", offset))
    refuse(reader, path, "Truncated file header")
    path = valid(tmp_path / "a.npz")
    for signature, at in ((DIRECTORY, 20), (LOCAL, 18)):
        edit(path, signature, 1, at, struct.pack("<LL", offset, offset))
    refuse(reader, path, "its members reach beyond their part of the file|Overlapped")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("flag", [1, 0x41])
def test_encrypted_members_are_refused(tmp_path, reader, flag):
    path = valid(tmp_path / "a.npz")
    for signature, offset in ((DIRECTORY, 8), (LOCAL, 6)):
        edit(path, signature, 1, offset, struct.pack("<H", flag))
    refuse(reader, path, "'labels.npy' is encrypted")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_than_numpy_s_is_refused(tmp_path, reader, compression):
    refuse(reader, valid(tmp_path / "a.npz", compression), "is neither stored nor deflated")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("offset, value", [(6, b"\1"), (8, b"\x08"), (14, b"\0\1\2\3"), (18, b"\x42"), (22, b"\x42")])
def test_a_local_header_that_disagrees_with_the_directory_is_refused(tmp_path, reader, offset, value):
    path = valid(tmp_path / "a.npz")
    edit(path, LOCAL, 1, offset, value)
    refuse(reader, path, "'labels.npy' is described in two places that disagree")


@pytest.mark.parametrize("reader", READERS)
def test_a_stored_member_of_two_sizes_is_refused(tmp_path, reader):
    path = valid(tmp_path / "a.npz")
    for signature, offset in ((DIRECTORY, 24), (LOCAL, 22)):
        edit(path, signature, 0, offset, struct.pack("<L", 10**9))
    refuse(reader, path, "'images.npy' is described in two places that disagree")


def test_a_file_written_to_a_pipe_is_read(tmp_path):
    class Pipe(io.RawIOBase):  # cannot seek: sizes follow the data
        data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as file:
        for name, array in ARRAYS.items():
            file.writestr(f"{name}.npy", npy(array))
    (tmp_path / "a.npz").write_bytes(pipe.data)
    np.testing.assert_array_equal(open_npz(tmp_path / "a.npz").images, 1)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((10**12, 150, 150), "<f4"),
        ((-3, 4, 4), "<f4"),
        ((-3, -4, 4), "<f4"),
        ((0, 4, 4), "<f4"),
        ((0, 10**30, 4), "<f4"),
        ((2**62, 4, 1), "<f4"),  # 2^66 bytes: 0 in 64 bits
        ((2**32, 2**32, 3), "<f4"),
        ((1,) * 65, "<f4"),
        ((10**12, 4, 4), "<U0"),
        ((3, 4, 4), ("<f4", (10**8,))),
        ((3, 4, 4), [("a", "<f4")]),
        ((3, 4, 4), "|V4"),
    ],
)
def test_absurd_shapes_and_types_are_refused(tmp_path, compression, shape, dtype):
    images = npy(shape=shape, dtype=dtype, data=bytes(192))
    path = valid(tmp_path / "a.npz", compression, images=images)
    refuse(open_npz, path, "images.npy (announces shape|has dtype)")
    refuse(load_state_dict, path, "images.npy (announces shape|has dtype)")
    (tmp_path / "a.npy").write_bytes(images)
    refuse(load_image, tmp_path / "a.npy", "a.npy (announces shape|has dtype)")


@pytest.mark.parametrize(
    "header",
    [
        b"-" * 9000 + b"1",
        b"(" * 9000,
        b"{'shape': 1}",
        b"[]",
        b"\xff",
        b"'\\d'",
        b"{'descr': '<f4', 1: 2, 'shape': ()}",
    ],
)
def test_headers_that_are_none_are_refused(tmp_path, header):
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    refuse(open_npz, valid(tmp_path / "a.npz", images=data), "images.npy is not an array")


@pytest.mark.parametrize("name", ["images", "labels", "classes", "info"])
def test_a_header_of_gigabytes_is_not_unpacked(tmp_path, name):
    data = b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**27) + bytes(2**27)
    path = valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **{name: data})
    refuse(unpack_npz, path, f"{name}.npy is not an array")


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (), (2**31 - 1,)])
def test_labels_of_another_number_are_refused_before_they_are_read(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("read"))
    labels = npy(shape=shape, dtype="|u1", data=bytes(int(np.prod(shape)) if len(shape) != 1 else min(shape[0], 9)))
    path = valid(tmp_path / "a.npz", labels=labels)
    refuse(open_npz, path, r"3 images but labels of shape|labels.npy announces shape \(2147483647,\)")


@pytest.mark.parametrize("name, dtype", [("classes", "<U1"), ("info", "<U33554432")])
def test_small_members_that_unpack_to_much_are_refused_unread(tmp_path, name, dtype):
    shape = (2**25,) if name == "classes" else ()
    path = valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **{name: npy(shape=shape, dtype=dtype, data=bytes(2**27))})
    refuse(unpack_npz, path, f"{name} unpack to 134,217,[0-9]+ bytes, expected 67,108,864")


def test_arrays_that_together_unpack_to_much_are_refused_unread(tmp_path):
    zeros = npy(np.zeros(2**22))  # half of what is allowed
    path = write(tmp_path / "a.npz", [(f"{i}.npy", zeros) for i in range(3)], zipfile.ZIP_DEFLATED)
    refuse(load_state_dict, path, "0, 1, 2 unpack to 100,663,680 bytes")


def bomb(path, name, announced, real, crc_of):
    """Writes a valid file in which the member `name` announces less than its deflated data hold."""
    valid(path, zipfile.ZIP_DEFLATED, **{name: real})
    with zipfile.ZipFile(path) as file:
        which = file.namelist().index(f"{name}.npy")
    for signature, offset in ((DIRECTORY, 16), (LOCAL, 14)):
        edit(path, signature, which, offset, struct.pack("<L", zlib.crc32(crc_of)))
        edit(path, signature, which, offset + 8, struct.pack("<L", announced))


@pytest.mark.parametrize("name", ["images", "labels", "classes"])
def test_no_more_is_unpacked_than_announced(tmp_path, name):
    contents = npy(ARRAYS.get(name, np.array(["no", "sphere", "vort"])))
    real = contents + bytes(2**27)
    bomb(tmp_path / "a.npz", name, len(contents), real, crc_of=real)
    refuse(open_npz, tmp_path / "a.npz", rf"Bad CRC-32 for file '{name}\.npy'", most=2**24)
    bomb(tmp_path / "a.npz", name, len(contents), real, crc_of=contents)
    tracemalloc.start()
    np.testing.assert_array_equal(open_npz(tmp_path / "a.npz").images, 1)  # the rest does not exist for us
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_images_that_unpack_to_less_than_announced_are_refused(tmp_path):
    images = npy(shape=(10**4, 16, 4), data=bytes(256))
    valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=images, labels=npy(np.zeros(10**4, int)))
    for signature, offset in ((DIRECTORY, 24), (LOCAL, 22)):
        edit(tmp_path / "a.npz", signature, 0, offset, struct.pack("<L", len(images) - 256 + 10**4 * 256))
    refuse(open_npz, tmp_path / "a.npz", r"a\.npz")


def test_images_compressed_beyond_belief_are_refused(tmp_path):
    for shape in ((1, 2**12, 2**12), (2**8, 2**9, 2**8)):  # one image too large for memory; all too large for the file
        images = npy(shape=shape, data=bytes(2**26 if shape[0] == 1 else 2**27))
        path = valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, images=images, labels=npy(np.zeros(shape[0], int)))
        refuse(open_npz, path, r"would unpack to images \([0-9, ]+\) of float32, more than images can be compressed")


def test_images_that_do_not_fit_on_the_disk_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=191))
    with pytest.raises(InputError, match=r"a\.unpacked\.npz needs 192 bytes, 191 are free; free space"):
        open_npz(valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="needs 192 bytes, 191 are free"):
        write_npz(tmp_path / "b.npz", iter(()), (3, 4, 4), np.float32, np.zeros(3), ("a",), {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_labels_are_compared_with_the_classes_before_they_are_narrowed(tmp_path):
    path = valid(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, labels=npy(np.array([0, 1, 2**32])))
    refuse(open_npz, path, "labels run from 0 to 4294967296")


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("info", np.array("[]"), "info is not an object of JSON"),
        ("info", np.array("[" * 10**5), "info is not readable JSON"),
        ("info", np.array("{'a': 1}"), "info is not readable JSON"),
        ("info", np.array(["{}", "{}"]), "can only convert an array of size 1"),
        ("info", np.array(1), "info.npy has dtype int64, expected text"),
        ("classes", np.array([0, 1, 2]), "classes.npy has dtype int64, expected text"),
        ("classes", np.array([2**21] * 3, "<u4").view("<U1"), "code point not in range"),
        ("classes", np.array([2**21] * 3, ">u4").view(">U1"), "code point not in range"),
        ("classes", np.array([0xD800] * 3, "<u4").view("<U1"), "surrogate|code point not in range"),
    ],
)
def test_texts_that_are_none_are_refused(tmp_path, name, array, message):
    refuse(open_npz, valid(tmp_path / "a.npz", **{name: npy(array)}), message, most=2**25)


@pytest.mark.parametrize("order", ["C", "F"])
def test_both_orders_of_arrays_are_read(tmp_path, order):
    array = np.asarray(np.arange(24.0).reshape(2, 3, 4), order=order)
    np.savez(tmp_path / "a.npz", a=array)
    np.testing.assert_array_equal(load_state_dict(tmp_path / "a.npz")["a"], array)
    np.save(tmp_path / "a.npy", array[0])
    np.testing.assert_array_equal(load_image(tmp_path / "a.npy"), array[0])


def test_text_where_a_network_has_numbers_is_refused(tmp_path):
    about = {"model": {}, "input": {}, "classes": ["a"], "image_shape": [1, 1]}
    np.savez(tmp_path / "a.npz", about=np.array(json.dumps(about)), a=np.array("text"))
    refuse(weights.load_network, tmp_path / "a.npz", "a.npy has dtype <U4, expected floating-point numbers")


@pytest.mark.parametrize("version, message", [("2.9.1+cpu", "torch 2.9.1.cpu may run code"), ("2.10.0", "unsafe")])
def test_torch_loads_weights_only_and_only_where_that_is_safe(tmp_path, monkeypatch, version, message):
    def load(path, map_location, weights_only):
        assert weights_only
        raise RuntimeError("unsafe")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version, load=load))
    (tmp_path / "a.pth").touch()
    with pytest.raises(InputError, match=message):
        load_state_dict(tmp_path / "a.pth")


def test_limits_leave_room_for_real_data():
    assert archive.MEMORY_BYTES >= 8 * 8_000_000  # labels of eight million images
    assert npz.MAX_RATIO >= 100  # images that are nearly all black
