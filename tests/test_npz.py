import io
import os
import zipfile

import numpy as np
import pytest

from gravlens_jax.config import CLASSES, InputError
from gravlens_jax.npz import is_copy, open_npz, unpack_npz, write_npz

RNG = np.random.default_rng(0)


def save(path, n=5, dtype=np.float32, classes=CLASSES):
    images = (RNG.random((n, 6, 4)) * 100).astype(dtype)
    labels = np.arange(n) % 3
    write_npz(path, iter(np.array_split(images, 2)), images.shape, images.dtype, labels, classes, {"source": "test"})
    return images, labels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
def test_round_trip_through_the_memory_map(tmp_path, dtype):
    images, labels = save(tmp_path / "a.npz", dtype=dtype)
    dataset = open_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.images, images)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.images.dtype == dtype and dataset.labels.dtype == np.int32
    assert dataset.classes == CLASSES and dataset.info == {"source": "test"}


def test_images_are_mapped_not_copied(tmp_path):
    save(tmp_path / "a.npz")
    images = open_npz(tmp_path / "a.npz").images
    assert isinstance(images, np.memmap) and not images.flags.writeable


def test_numpy_reads_what_we_write(tmp_path):
    images, labels = save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], images)
        np.testing.assert_array_equal(archive["labels"], labels)
        assert archive["classes"].tolist() == list(CLASSES)


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 1, 6, 4)])
def test_we_read_what_numpy_writes(tmp_path, shape):
    images = RNG.random(shape)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2, 0, 1]))
    dataset = open_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.images, images.reshape(5, 6, 4))
    assert dataset.classes == CLASSES and isinstance(dataset.images, np.memmap)


def test_a_compressed_file_is_unpacked_once_and_says_so(tmp_path, capsys):
    images = RNG.random((5, 6, 4)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2, 0, 1]))
    dataset = open_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.images, images)
    message = capsys.readouterr().err
    assert "unpacking it once to" in message and "a.unpacked.npz" in message
    open_npz(tmp_path / "a.npz")
    assert capsys.readouterr().err == ""
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npz", "a.unpacked.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_without_labels_serves_prediction_only(tmp_path, save):
    save(tmp_path / "a.npz", images=RNG.random((2, 6, 4)))
    for _ in range(2):
        assert len(open_npz(tmp_path / "a.npz", need_labels=False).images) == 2
        with pytest.raises(InputError, match=r"has no 'labels', only (classes, )?images"):
            open_npz(tmp_path / "a.npz")


def test_a_copy_is_made_for_the_asking_never_over_another_file_or_other_names(tmp_path):
    labels = np.array([0, 1])
    np.savez_compressed(tmp_path / "a.npz", images=RNG.random((2, 6, 4)), labels=labels)
    assert unpack_npz(tmp_path / "a.npz", tmp_path / "b.npz", ("x", "y")) == tmp_path / "b.npz"
    assert open_npz(tmp_path / "b.npz").classes == ("x", "y")
    with pytest.raises(InputError, match=r"b\.npz exists; give the name of a new file"):
        unpack_npz(tmp_path / "a.npz", tmp_path / "b.npz", ("y", "x"))
    with pytest.raises(InputError, match="names its classes itself, x, y; leave --classes y,x out"):
        unpack_npz(tmp_path / "b.npz", tmp_path / "c.npz", ("y", "x"))
    unpack_npz(tmp_path / "b.npz", tmp_path / "c.npz")
    assert open_npz(tmp_path / "c.npz").classes == ("x", "y") and not is_copy(tmp_path / "c.npz")
    open_npz(tmp_path / "a.npz")
    assert [f.name for f in sorted(tmp_path.iterdir()) if is_copy(f)] == ["a.unpacked.npz"]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((3, 4, 4)), "labels": np.array([0, 1, 3])}, "labels run from 0 to 3, expected 0 to 2"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.array([-1, 1, 2])}, "labels run from -1"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.array([0, 1])}, "3 images but labels of shape"),
        (
            {"images": np.zeros((3, 4, 4)), "labels": np.array([0.0, 1, 2])},
            "labels.npy has dtype float64, expected integers",
        ),
        ({"images": np.zeros((3, 4)), "labels": np.array([0, 1, 2])}, r"shape \(3, 4\), expected \(n, height"),
        (
            {"images": np.zeros((3, 4, 4), np.longdouble), "labels": np.array([0, 1, 2])},
            "expected at most 64 bits a pixel",
        ),
        ({"images": np.zeros((3, 4, 4), complex), "labels": np.array([0, 1, 2])}, "dtype complex128"),
        ({"images": np.asfortranarray(np.zeros((3, 4, 4))), "labels": np.array([0, 1, 2])}, "Fortran order"),
        ({"labels": np.array([0, 1, 2])}, "has no 'images', only labels"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_npz(tmp_path / "a.npz")


def test_python_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for save_archive in (np.savez, np.savez_compressed):
        save_archive(tmp_path / "a.npz", images=np.array([Bomb(), None]), labels=np.array([0, 1]))
        with pytest.raises(InputError, match=r"images\.npy holds Python objects"):
            open_npz(tmp_path / "a.npz")
    save_archive(tmp_path / "b.npz", images=np.zeros((1, 4, 4)), labels=np.array([Bomb()]))
    with pytest.raises(InputError, match=r"labels\.npy holds Python objects"):
        open_npz(tmp_path / "b.npz")
    assert not (tmp_path / "exploded").exists()


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for size in [0, 1, 30, *range(100, len(whole), 97)]:
        (tmp_path / "b.npz").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"b\.npz"):
            open_npz(tmp_path / "b.npz")


def test_a_header_that_announces_more_than_the_file_holds_is_refused(tmp_path):
    member = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 150, 150)}
    np.lib.format.write_array_header_1_0(member, header)
    labels = io.BytesIO()
    np.save(labels, np.array([0]))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", member.getvalue() + bytes(64))
        archive.writestr("labels.npy", labels.getvalue())
    with pytest.raises(InputError, match="announces"):
        open_npz(tmp_path / "a.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.npz: no such file"):
        open_npz(tmp_path / "absent.npz")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    images, _ = save(tmp_path / "a.npz")

    def chunks():
        yield images[:2]
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; what was there before is"):
        write_npz(tmp_path / "a.npz", chunks(), images.shape, images.dtype, np.zeros(5), CLASSES, {})
    np.testing.assert_array_equal(open_npz(tmp_path / "a.npz").images, images)
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]
