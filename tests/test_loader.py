import itertools
from dataclasses import replace

import numpy as np
import pytest

from gravlens_jax import CLASSES, InputError, loader
from gravlens_jax.lensing.images import labels_of, render_deflections, simulate_images
from gravlens_jax.lensing.render import Grid
from gravlens_jax.loader import DeviceData, FileData, Plan, eval_batches, prefetch, train_batches
from gravlens_jax.npz import Dataset
from gravlens_jax.sharding import data_mesh
from gravlens_jax.stream import StreamData
from helpers import TINY_PRIORS, refuse

GRID = Grid(6, 1.2)  # of the deflection maps


def make_dataset(n):
    """Returns images of which every pixel is the number of the image."""
    images = np.arange(n, dtype=np.uint16)[:, None, None] * np.ones((24, 24), np.uint16)
    return Dataset(images, labels_of(n), CLASSES, {})


def render_maps(rows):
    """Returns maps of which every value is the number of the image."""
    return np.broadcast_to(np.float32(rows)[:, None, None, None], (len(rows), 6, 6, 2))


def make_data(kind, size=14, batch_size=4, devices=2, maps=True):
    if kind is StreamData:
        return StreamData(size, TINY_PRIORS, 0, batch_size, 5, data_mesh(devices), GRID if maps else None)
    return kind(make_dataset(size), batch_size, 3, data_mesh(devices), render_maps if maps else None)


def single_steps(batches):
    """Returns the batch of each step, as NumPy arrays."""
    found = []
    for steps, batch in batches:
        rows = batch.pop("rows", [slice(None)])
        assert steps == len(rows) <= loader.STEPS_PER_CALL
        found += [{name: np.asarray(array)[step_rows] for name, array in batch.items()} for step_rows in rows]
    return found


def numbers(batches):
    return [batch["images"][:, 0, 0].tolist() for batch in single_steps(batches)]


def assert_same(ours, theirs, rounding=False):
    """Batches are equal, or with `rounding` a few pixels differ by one count."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, array in a.items():
            difference = np.abs(array.astype(np.float32) - b[name])
            atol, most = {"images": (1, 1e-2), "deflections": (1e-5, 1)}.get(name, (0, 0)) if rounding else (0, 0)
            assert difference.max() <= atol and difference.mean() <= most, name


@pytest.mark.parametrize("kind", [FileData, DeviceData, StreamData])
def test_full_batches_continue_from_any_step_on_any_number_of_devices(kind, monkeypatch):
    expected = {"images": ((4, 24, 24), np.uint16), "labels": ((4,), np.int32)}
    expected |= {"deflections": ((4, 6, 6, 2), np.float32)}
    monkeypatch.setattr(loader, "STEPS_PER_CALL", 2)
    data = make_data(kind)
    whole = single_steps(data.batches(1))
    assert data.size == 14 and len(whole) == 14 // 4
    for batch in whole:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
    assert_same(single_steps(make_data(kind, devices=1).batches(1)), whole, rounding=kind is StreamData)
    for skip in range(len(whole)):
        assert_same(single_steps(data.batches(1, skip)), whole[skip:])
    assert all(batch.keys() == {"images", "labels"} for batch in single_steps(make_data(kind, maps=False).batches(1)))


@pytest.mark.parametrize("kind", [FileData, DeviceData])
def test_batches_of_a_file_are_in_the_order_of_seed_and_epoch(kind):
    data = make_data(kind, 10)
    assert numbers(data.batches(1)) == [[4, 1, 2, 8], [5, 0, 7, 9]]  # fixed: runs stay resumable across versions
    assert numbers(data.batches(0)) != numbers(data.batches(1)) != numbers(replace(data, seed=4).batches(1))
    for batch in single_steps(data.batches(1)):
        np.testing.assert_array_equal(batch["labels"], batch["images"][:, 0, 0] % 3)
        np.testing.assert_array_equal(batch["deflections"][:, 5, 0, 1], batch["images"][:, 0, 0])


def test_stream_batches_are_the_simulated_images_in_order():
    images, data = np.concatenate(list(simulate_images(24, 5, 0, TINY_PRIORS))), make_data(StreamData)
    batches = single_steps([*data.batches(0), *data.batches(1)])  # epoch 1 begins with what epoch 0 leaves over
    expected = {"images": images, "labels": labels_of(24)}
    expected["deflections"] = np.asarray(render_deflections(0, 5, 0, n=24, priors=TINY_PRIORS, grid=GRID))
    steps = [{name: array[first : first + 4] for name, array in expected.items()} for first in range(0, 24, 4)]
    assert_same(batches, steps, rounding=True)
    assert data.render._cache_size() == 1
    (_, found), (_, stored) = (next(some.batches(0)) for some in (data, make_data(FileData)))
    assert found["images"].sharding == stored["images"].sharding


@pytest.mark.parametrize("n, batch_size", [(8, 4), (9, 4), (1, 4), (3, 2)])
def test_evaluation_counts_every_example_once(n, batch_size):
    batches = list(eval_batches(make_dataset(n), batch_size, data_mesh()))
    assert {batch["images"].shape for batch in batches} == {(batch_size, 24, 24)}
    seen = np.concatenate([np.asarray(batch["images"])[np.asarray(batch["mask"]), 0, 0] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(n))


@pytest.mark.parametrize("easy", [False, True])
def test_batches_of_a_run_continue_from_any_step(easy):
    train, easy_data, plan = make_data(FileData, 6, 2), make_data(FileData, 5, 2), Plan(2 * easy, 3, 2)

    def run(start):
        batches = train_batches(train, easy_data if easy else None, plan, start)
        return [(step, numbers([(1, batch)])) for step, batch in batches]

    whole = run(0)
    assert [step for step, _ in whole] == list(range(1, plan.total_steps + 1))
    for start in range(plan.total_steps + 1):
        assert run(start) == whole[start:]


def test_prefetch_reads_a_few_items_ahead_in_order_and_raises_the_errors_of_its_thread():
    def broken():
        yield 1
        raise InputError("broken")

    assert next(prefetch(itertools.count(1))) == 1
    assert list(prefetch(range(1, 20))) == list(range(1, 20))
    refuse("broken", list, prefetch(broken()))
