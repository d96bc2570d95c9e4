import os
import re
from pathlib import Path

import numpy as np
import pytest

from gravlens_jax import pixels
from gravlens_jax.errors import InputError
from gravlens_jax.npz import open_npz
from gravlens_jax.pixels import check_pixels, read_rows, scale
from test_npz import save

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("view", [np.s_[:], np.s_[1:], np.s_[::2], np.s_[::-1], np.s_[:, 1:], np.s_[:, :, ::2]])
def test_read_rows_reads_files_views_and_arrays_alike(tmp_path, view):
    images = RNG.integers(0, 9, (7, 4, 3)).astype(np.uint16)
    for some in (images[view], open_npz(save(tmp_path / "a.npz", images)).images[view]):
        for rows in (np.array([3, 0, 3, -1]), slice(1, 3), slice(0)):
            batch = read_rows(some, rows)
            np.testing.assert_array_equal(batch, images[view][rows])
            assert type(batch) is np.ndarray and batch.flags.owndata and batch.flags.carray


@pytest.mark.parametrize("dtype", ["u1", ">u2", ">f2", ">f4", "<f8", ">f8", "i4", "u8"])
def test_images_of_8_and_16_bits_are_read_as_stored_and_others_scaled(tmp_path, dtype):
    images = np.arange(24).reshape(2, 4, 3).astype(dtype)
    short = images.itemsize <= 2
    for some in (open_npz(save(tmp_path / "a.npz", images)).images, images):
        batch = read_rows(some, np.array([1, 0]))
        assert batch.dtype.isnative and batch.dtype == (dtype.strip("<>") if short else "f4")
        np.testing.assert_allclose(batch, images[::-1] if short else [images[0] / 11] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype, low, high",
    [
        *(("f8", 0, 1e-300), ("f8", 1e9, 1e9 + 1), ("f8", -1.7e308, 1.7e308), ("f4", 0, 1e-39), ("f4", -3e38, 3e38)),
        *(("f4", 100, 1e5), ("i8", 2**52, 2**52 + 10**6), ("u4", 0, 2**32 - 1)),
    ],
)
def test_scaled_images_do_not_depend_on_unit_or_offset(dtype, low, high):
    expected = np.linspace(0, 1, 20).reshape(4, 5)
    image = (low * (1 - expected) + high * expected).astype(dtype)
    np.testing.assert_allclose(scale(image), expected, atol=2e-6 if dtype != "f4" else 1e-5)
    assert scale(image).dtype == np.float32 and not scale(np.full((4, 5), high, dtype)).any()


@pytest.mark.parametrize("row", [0, 4, 8])
@pytest.mark.parametrize("dtype, pixel", [("f2", np.nan), ("f4", np.inf), (">f8", -np.inf), ("f2", -np.inf)])
def test_pixels_that_are_not_finite_are_named_by_file_and_image(tmp_path, dtype, pixel, row):
    images = np.full((9, 3, 3), 6e4, dtype)
    images[row, 2, 1] = pixel
    mapped = open_npz(save(tmp_path / "a.npz", images)).images
    for some, where in ((images, "^"), (mapped, r"a\.npz: "), (mapped[row // 2 :], r"a\.npz: ")):
        for read in (lambda some: read_rows(some, slice(None)), check_pixels):
            with pytest.raises(InputError, match=rf"{where}images\[{row}\] has NaN or infinite pixels"):
                read(some)
    assert len(read_rows(mapped, np.array([2, 6]))) == 2


def test_check_pixels_reads_float_images_in_chunks(monkeypatch):
    read = []
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 30)
    monkeypatch.setattr(pixels, "read_rows", lambda images, rows: read.append(len(images[rows])))
    check_pixels(np.zeros((9, 2, 2), np.uint16))
    assert not read
    check_pixels(np.zeros((9, 2, 2), np.float16))
    assert read == [3, 3, 3]


@pytest.mark.parametrize("view", [np.s_[:], np.s_[2]])
@pytest.mark.parametrize(
    "change",
    [
        lambda path, images: os.truncate(path, 50_000),
        lambda path, images: os.replace(save(path.with_name("b.npz"), images), path),
        lambda path, images: np.savez(path, images=images, labels=np.zeros(5, int)),
        lambda path, images: os.utime(path, ns=(0, 0)),
        lambda path, images: path.unlink(),
    ],
    ids=["truncated", "replaced", "rewritten", "touched", "removed"],
)
def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path, change, view):
    images = np.zeros((5, 100, 100), np.uint16)
    path = save(tmp_path / "a.npz", images)
    mapped = open_npz(path).images[view]
    change(path, images)
    message = r"a\.npz (is not the file that was opened|cannot be read) any more.*start again"
    with pytest.raises(InputError, match=message):
        read_rows(mapped, np.array([0, 3]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_pages_of_a_file_do_not_stay_in_memory(tmp_path):
    def resident():
        return int(re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    mapped = open_npz(save(tmp_path / "a.npz", np.zeros((256, 512, 512), np.uint8))).images
    before = resident()
    for rows in np.random.default_rng(0).permutation(256).reshape(-1, 8):
        read_rows(mapped, rows)
    assert resident() - before < mapped.nbytes / 4
