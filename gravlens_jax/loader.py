"""Batches of a run: a pure function of config and step, read ahead in a thread.

Training images are `FileData`, `DeviceData` or `stream.StreamData`. Each has `size`, the images of an epoch, and
`batches(epoch, skip)`, which yields (number of steps, batch for `train_steps`) without the first `skip` steps.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gravlens_jax.npz import Dataset, read_rows
from gravlens_jax.sharding import local_rows, replicate, shard_batch, shard_rows
from gravlens_jax.train_step import Batch

STEPS_PER_CALL = 64  # of `DeviceData`; also those of which the deflection maps are rendered together


class Plan(NamedTuple):
    """The steps of a run: a pass over the easy images, then epochs over the training images."""

    easy_steps: int
    steps_per_epoch: int
    epochs: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.first_step(self.epochs)

    def first_step(self, epoch: int) -> int:
        """Returns the number of steps before epoch 0, 1, ...; the easy images are epoch -1."""
        return self.easy_steps + epoch * self.steps_per_epoch if epoch >= 0 else 0

    def epoch_after(self, step: int) -> int:
        """Returns the epoch that the step after `step` belongs to."""
        return -1 if step < self.easy_steps else (step - self.easy_steps) // self.steps_per_epoch

    def name_epoch(self, step: int) -> str:
        """Returns the name of the epoch that `step` steps end or are in, such as epoch 1/3."""
        epoch = self.epoch_after(step - 1) + 1
        return f"epoch {epoch}/{self.epochs}" if epoch else "easy images"

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the pass over the easy images, is complete after `step` steps."""
        return step == self.first_step(self.epoch_after(step))


def train_batches(train: Any, easy: Any, plan: Plan, start: int) -> Iterator[tuple[int, Batch]]:
    """Yields (steps done after it, batch) of training images, easy ones first, from step `start` to the run's end."""
    step = start
    while step < plan.total_steps:
        epoch = plan.epoch_after(step)
        data, index = (easy, 0) if epoch < 0 else (train, epoch)
        for steps, batch in data.batches(index, step - plan.first_step(epoch)):
            step += steps
            yield step, batch


def epoch_rows(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the rows of the full batches of an epoch in random order, int32 (steps, batch_size)."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[: n // batch_size * batch_size].astype(np.int32).reshape(-1, batch_size)


def prefetch(items: Iterable, depth: int = 2) -> Iterator:
    """Yields the same items, computed up to `depth` ahead in a thread."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(next, iterator, None) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield item


@dataclass(frozen=True)
class FileData:
    """Images of a memory-mapped file, read when they are needed; each process reads its own rows."""

    dataset: Dataset
    batch_size: int  # over all devices
    seed: int  # of the order
    mesh: Mesh
    # rows int (k,) -> deflection maps float32 (k, cells, cells, 2): see `lensing.render.deflection_map`
    render_maps: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Images of an epoch."""
        return self.dataset.size

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yields one step at a time: see the module."""
        rows = local_rows(epoch_rows(self.size, self.batch_size, self.seed, epoch)[skip:])
        for batch in prefetch(self._read_batches(rows)):
            yield 1, shard_batch(batch, self.mesh)

    def _read_batches(self, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(rows), STEPS_PER_CALL):
            group = rows[first : first + STEPS_PER_CALL]
            maps = {name: np.split(x, len(group)) for name, x in self._maps(group.ravel()).items()}
            for i, batch_rows in enumerate(group):
                yield _read(self.dataset, batch_rows) | {name: x[i] for name, x in maps.items()}

    def _maps(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"deflections": self.render_maps(rows)} if self.render_maps else {}


class DeviceData(FileData):
    """The same batches from a copy of all images in each device's memory; many steps per call."""

    @cached_property
    def _held(self) -> Batch:
        rows = np.arange(self.size)
        return replicate(_read(self.dataset, rows) | self._maps(rows), self.mesh)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yields many steps at a time: see the module."""
        rows = epoch_rows(self.size, self.batch_size, self.seed, epoch)[skip:]
        for group in np.array_split(rows, -(-len(rows) // STEPS_PER_CALL)):
            yield len(group), self._held | {"rows": shard_rows(group, self.mesh)}


def _read(dataset: Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"images": read_rows(dataset.images, rows), "labels": dataset.labels[rows]}


def eval_batches(dataset: Dataset, batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Yields all images in order. `mask`, bool (batch,), is False for padding of the last batch."""
    n = dataset.size
    rows = local_rows(np.arange(-(-n // batch_size) * batch_size).reshape(-1, batch_size))
    for batch in prefetch(_read(dataset, np.minimum(group, n - 1)) | {"mask": group < n} for group in rows):
        yield shard_batch(batch, mesh)
