import itertools

import numpy as np
import pytest

from gravlens_jax import loader, sharding
from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError
from gravlens_jax.loader import DeviceSource, FileSource, Plan, epoch_rows, eval_batches, prefetch, train_batches
from gravlens_jax.npz import Dataset


def make_dataset(n):
    images = np.arange(n, dtype=np.uint16)[:, None, None] * np.ones((2, 3), np.uint16)
    return Dataset(images, np.arange(n, dtype=np.int32) % 3, CLASSES, {})


def numbers(batches):
    """Returns the image numbers of batches as `FileSource` yields them."""
    return [np.asarray(batch["images"])[:, 0, 0].tolist() for _, batch in batches]


@pytest.mark.parametrize("n, batch_size", [(8, 4), (9, 4), (1, 4), (3, 2)])
def test_evaluation_counts_every_example_once(n, batch_size):
    batches = list(eval_batches(make_dataset(n), batch_size, sharding.data_mesh()))
    assert {batch["images"].shape for batch in batches} == {(batch_size, 2, 3)}
    seen = np.concatenate([np.asarray(batch["images"])[np.asarray(batch["mask"]), 0, 0] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(n))


def test_training_batches_are_full_and_in_the_order_of_seed_and_epoch():
    source = FileSource(make_dataset(10), 4, 3, sharding.data_mesh())
    assert numbers(source.batches(1)) == [[4, 1, 2, 8], [5, 0, 7, 9]]  # fixed: runs stay resumable across versions
    assert numbers(source.batches(1, skip=1)) == [[5, 0, 7, 9]]
    assert numbers(source.batches(0)) != numbers(source.batches(1))
    for _, batch in source.batches(1):
        np.testing.assert_array_equal(batch["labels"], np.asarray(batch["images"])[:, 0, 0] % 3)


def test_epoch_order_is_a_permutation_that_depends_on_the_seed():
    rows = epoch_rows(50, 10, 0, 0)
    assert rows.dtype == np.int32 and sorted(rows.ravel()) == list(range(50))
    assert (rows != epoch_rows(50, 10, 1, 0)).any()


@pytest.mark.parametrize("skip", [0, 1])
def test_device_data_are_the_batches_of_the_file(monkeypatch, skip):
    monkeypatch.setattr(loader, "STEPS_PER_CALL", 2)
    arguments = (make_dataset(14), 4, 3, sharding.data_mesh())
    expected, seen = numbers(FileSource(*arguments).batches(1, skip)), []
    for steps, batch in DeviceSource(*arguments).batches(1, skip):
        assert steps == len(batch["rows"]) <= 2
        seen += [np.asarray(batch["images"])[np.asarray(rows), 0, 0].tolist() for rows in batch["rows"]]
    assert seen == expected


def test_plan_knows_which_steps_belong_to_which_epoch():
    plan = Plan(easy_steps=2, steps_per_epoch=3, epochs=2)
    assert plan.total_steps == 8 and [plan.first_step(epoch) for epoch in (-1, 0, 1, 2)] == [0, 2, 5, 8]
    assert [plan.epoch_after(step) for step in range(9)] == [-1, -1, 0, 0, 0, 1, 1, 1, 2]
    assert [step for step in range(1, 9) if plan.ends_epoch(step)] == [2, 5, 8]
    assert Plan(0, 3, 1).epoch_after(0) == 0


@pytest.mark.parametrize("easy", [False, True])
def test_batches_of_a_run_continue_from_any_step(easy):
    mesh = sharding.data_mesh()
    easy_source = FileSource(make_dataset(5), 2, 0, mesh) if easy else None
    train, plan = FileSource(make_dataset(6), 2, 0, mesh), Plan(2 * easy, 3, 2)

    def run(start):
        return [
            (step, batch["images"][:, 0, 0].tolist()) for step, batch in train_batches(train, easy_source, plan, start)
        ]

    whole = run(0)
    assert [step for step, _ in whole] == list(range(1, plan.total_steps + 1))
    for start in range(plan.total_steps + 1):
        assert run(start) == whole[start:]


def test_prefetch_keeps_order_and_raises_the_errors_of_its_thread():
    assert list(prefetch(range(1, 20))) == list(range(1, 20))

    def broken():
        yield 1
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        list(prefetch(broken()))


def test_prefetch_reads_two_items_ahead():
    taken = []
    items = prefetch(taken.append(i) or i for i in itertools.count(1))
    assert next(items) == 1
    items.close()
    assert max(taken) <= 4
