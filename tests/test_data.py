import os

import numpy as np
import pytest

from gravlens_jax.config import CLASSES, InputError
from gravlens_jax.data import (
    epoch_order,
    epoch_rows,
    eval_batches,
    eval_rows,
    load_splits,
    prefetch,
    take_rows,
    train_batches,
)
from gravlens_jax.npz import Dataset, open_npz, write_npz


def dataset(n):
    images = np.arange(n, dtype=np.uint16)[:, None, None] * np.ones((2, 3), np.uint16)
    return Dataset(images, np.arange(n, dtype=np.int32) % 3, CLASSES, {})


@pytest.mark.parametrize("n, batch_size", [(8, 4), (9, 4), (1, 4), (3, 3)])
def test_padded_batches_count_every_example_once(n, batch_size):
    batches = list(eval_batches(dataset(n), eval_rows(n, batch_size)))
    assert {batch["images"].shape for batch in batches} == {(batch_size, 2, 3)}
    seen = np.concatenate([batch["images"][batch["mask"], 0, 0] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(n))


def test_training_batches_follow_the_epoch_order_and_drop_the_rest():
    batches = list(train_batches(dataset(10), epoch_rows(10, 4, seed=5, epoch=2)))
    seen = np.concatenate([batch["images"][:, 0, 0] for batch in batches])
    np.testing.assert_array_equal(seen, epoch_order(10, 5, 2)[:8])
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in batches]), seen % 3)


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch():
    order = epoch_order(50, 0, 0)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(order, epoch_order(50, 0, 0))
    assert (order != epoch_order(50, 0, 1)).any() and (order != epoch_order(50, 1, 0)).any()
    assert epoch_order(10, 3, 1).tolist() == [4, 1, 2, 8, 5, 0, 7, 9, 6, 3]  # runs must stay resumable across versions


def test_batches_are_new_arrays():
    data = dataset(4)
    next(train_batches(data, epoch_rows(4, 4, 0, 0)))["images"][:] = 7
    assert data.images.max() == 3


def test_rows_of_a_mapped_file_and_of_a_part_of_it(tmp_path):
    images = np.arange(60, dtype=np.uint16).reshape(5, 4, 3)
    write_npz(tmp_path / "a.npz", [images], images.shape, images.dtype, np.zeros(5), CLASSES, {})
    mapped = open_npz(tmp_path / "a.npz").images
    for some in (mapped, mapped[1:], images):
        np.testing.assert_array_equal(take_rows(some, np.array([3, 0, 3])), np.asarray(some)[[3, 0, 3]])


def test_a_file_cut_short_after_opening(tmp_path):
    images = np.zeros((5, 100, 100), np.uint16)
    write_npz(tmp_path / "a.npz", [images], images.shape, images.dtype, np.zeros(5), CLASSES, {})
    mapped = open_npz(tmp_path / "a.npz").images
    os.truncate(tmp_path / "a.npz", 50_000)
    with pytest.raises(InputError, match="is not the file that was opened any more"):
        take_rows(mapped, np.array([0, 4]))
    mapped.stat = os.stat(tmp_path / "a.npz")  # as if it were cut while it is read
    with pytest.raises(InputError, match="ends before image 4"):
        take_rows(mapped, np.array([0, 4]))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_is_written_anew_after_opening(tmp_path, in_place):
    images = np.zeros((5, 4, 3), np.uint16)
    write_npz(tmp_path / "a.npz", [images], images.shape, images.dtype, np.zeros(5), CLASSES, {})
    mapped = open_npz(tmp_path / "a.npz").images
    if in_place:
        np.savez(tmp_path / "a.npz", images=images + 1, labels=np.zeros(5, int))
    else:
        write_npz(tmp_path / "a.npz", [images + 1], images.shape, images.dtype, np.zeros(5), CLASSES, {})
    with pytest.raises(InputError, match="is not the file that was opened any more; start again"):
        take_rows(mapped, np.array([0]))


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<f8"])
def test_batches_have_the_byte_order_of_this_machine(tmp_path, dtype):
    images = np.arange(24).reshape(2, 4, 3).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    for some in (open_npz(tmp_path / "a.npz").images, images):
        batch = take_rows(some, np.array([1, 0]))
        assert batch.dtype.isnative and batch.dtype.kind == images.dtype.kind
        np.testing.assert_array_equal(batch, images[::-1])


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetch(iter(range(1, 20)))) == list(range(1, 20))

    def broken():
        yield 1
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        list(prefetch(broken()))


def test_splits_must_belong_together(tmp_path):
    for split, size in (("train", 4), ("val", 5), ("test", 4)):
        images = np.zeros((3, size, size), np.uint8)
        write_npz(tmp_path / f"{split}.npz", [images], images.shape, images.dtype, np.arange(3), CLASSES, {})
    with pytest.raises(InputError, match=r"val\.npz has classes .* and images of \(5, 5\) pixels"):
        load_splits(tmp_path)
