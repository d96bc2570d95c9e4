import os
import re
from pathlib import Path

import numpy as np
import pytest

from gravlens_jax import pixels
from gravlens_jax.errors import InputError
from gravlens_jax.npz import open_npz
from gravlens_jax.pixels import check_pixels, read_rows
from test_npz import save

RNG = np.random.default_rng(0)


def test_read_rows_reads_files_views_and_arrays_alike(tmp_path):
    images = RNG.integers(0, 9, (7, 4, 3)).astype(np.uint16)
    mapped = open_npz(save(tmp_path / "a.npz", images)).images
    for view in (np.s_[:], np.s_[1:], np.s_[::2], np.s_[::-1], np.s_[:, 1:], np.s_[:, :, ::2]):
        for some in (images[view], mapped[view]):
            for rows in (np.array([3, 0, 3, -1]), slice(1, 3), slice(0)):
                batch = read_rows(some, rows)
                np.testing.assert_array_equal(batch, images[view][rows])
                assert type(batch) is np.ndarray and batch.flags.owndata and batch.flags.carray


@pytest.mark.parametrize("dtype, expected", [(">u2", "u2"), (">f4", "f4"), ("<f8", "f4"), (">f8", "f4"), (">f2", "f2")])
def test_read_rows_returns_native_byte_order_and_at_most_float32(tmp_path, dtype, expected):
    images = np.arange(24).reshape(2, 4, 3).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    for some in (open_npz(tmp_path / "a.npz").images, images):
        batch = read_rows(some, np.array([1, 0]))
        assert batch.dtype.isnative and batch.dtype == expected
        np.testing.assert_array_equal(batch, images[::-1])


@pytest.mark.parametrize("row", [0, 4, 8])
@pytest.mark.parametrize(
    "dtype, pixel, problem",
    [(dtype, pixel, "NaN or infinite") for dtype in ("f2", "f4", ">f8") for pixel in (np.nan, np.inf, -np.inf)]
    + [("f8", -1e39, "pixels beyond float32")],
)
def test_pixels_that_are_not_finite_are_named_by_file_and_image(tmp_path, dtype, pixel, problem, row):
    images = np.full((9, 3, 3), 6e4, dtype)
    images[row, 2, 1] = pixel
    mapped = open_npz(save(tmp_path / "a.npz", images)).images
    name = rf"images\[{row}\] has {problem}"
    for some, where in ((images, "^"), (mapped, r"a\.npz: "), (mapped[row // 2 :], r"a\.npz: ")):
        with pytest.raises(InputError, match=where + name):
            read_rows(some, slice(None))
        with pytest.raises(InputError, match=where + name):
            check_pixels(some)
    np.testing.assert_array_equal(read_rows(mapped, np.array([2, 6])), images[[2, 6]].astype(np.float32))


def test_check_pixels_reads_float_images_in_chunks(monkeypatch):
    read = []
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 30)
    monkeypatch.setattr(pixels, "read_rows", lambda images, rows: read.append(len(images[rows])))
    check_pixels(np.zeros((9, 2, 2), np.uint16))
    assert not read
    check_pixels(np.zeros((9, 2, 2), np.float16))
    assert read == [3, 3, 3]


@pytest.mark.parametrize("view", [np.s_[:], np.s_[1:], np.s_[2]])
@pytest.mark.parametrize("change", ["truncated", "replaced", "rewritten", "touched", "removed"])
def test_a_file_that_changes_after_it_was_opened_is_an_error(tmp_path, change, view):
    images = np.zeros((5, 100, 100), np.uint16)
    path = save(tmp_path / "a.npz", images)
    mapped = open_npz(path).images[view]
    if change == "truncated":
        os.truncate(path, 50_000)
    elif change == "replaced":
        os.replace(save(tmp_path / "b.npz", images), path)
    elif change == "rewritten":
        np.savez(path, images=images, labels=np.zeros(5, int))
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    with pytest.raises(
        InputError, match=r"a\.npz (is not the file that was opened|cannot be read) any more.*start again"
    ):
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
