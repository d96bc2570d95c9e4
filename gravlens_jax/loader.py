"""Batches of a run: a pure function of config and step, read ahead in a thread.

A source yields the batches of an epoch from any step on. There are three: `FileSource`, `DeviceSource` and
`StreamSource`.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gravlens_jax.lensing.images import labels_of, render_batch, render_deflections, simulate_images
from gravlens_jax.lensing.priors import Priors
from gravlens_jax.npz import Dataset
from gravlens_jax.pixels import read_rows
from gravlens_jax.sharding import local_rows, replicate, shard_batch, shard_rows
from gravlens_jax.train_step import Batch

STEPS_PER_CALL = 64  # of `DeviceSource`


class Source(Protocol):
    """Training images as batches on the devices."""

    @property
    def size(self) -> int:
        """Images of an epoch."""

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yields (number of steps, batch for `train_step.train_steps`) of an epoch, without its first `skip` steps."""


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

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the pass over the easy images, is complete after `step` steps."""
        return step == self.first_step(self.epoch_after(step))


def train_batches(train: Source, easy: Source | None, plan: Plan, start: int) -> Iterator[tuple[int, Batch]]:
    """Yields (steps done after it, batch) from step `start` to the end of the run."""
    step = start
    while step < plan.total_steps:
        epoch = plan.epoch_after(step)
        source, index = (easy, 0) if easy is not None and epoch < 0 else (train, epoch)
        for steps, batch in source.batches(index, step - plan.first_step(epoch)):
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
class FileSource:
    """Images of a memory-mapped file, read when they are needed; each process reads its own rows."""

    dataset: Dataset
    batch_size: int  # over all devices
    seed: int  # of the order
    mesh: Mesh

    @property
    def size(self) -> int:
        """Images of an epoch."""
        return self.dataset.size

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """See `Source`."""
        rows = local_rows(epoch_rows(self.size, self.batch_size, self.seed, epoch)[skip:])
        for batch in prefetch(map(partial(_read, self.dataset), rows)):
            yield 1, shard_batch(batch, self.mesh)


class DeviceSource(FileSource):
    """The same batches from a copy of all images in each device's memory; many steps per call."""

    @cached_property
    def _held(self) -> Batch:
        return replicate(_read(self.dataset, np.arange(self.size)), self.mesh)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """See `Source`."""
        rows = epoch_rows(self.size, self.batch_size, self.seed, epoch)[skip:]
        for some in np.array_split(rows, -(-len(rows) // STEPS_PER_CALL)):
            yield len(some), self._held | {"rows": shard_rows(some, self.mesh)}


@dataclass(frozen=True)
class StreamSource:
    """Simulated images, each used once: epoch 0, 1, ... are the images 0, 1, 2, ... of `lensing.simulate_images`.

    On CPUs all cores simulate ahead; each accelerator renders its own share of a batch, with noise.
    """

    size: int  # images of an epoch
    priors: Priors
    split: int  # see `simulate_images`
    batch_size: int  # over all devices
    seed: int  # of the images
    mesh: Mesh
    grid: tuple[int, float] | None  # cells and width of the maps of deflections, see `render_deflections`

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """See `Source`."""
        steps = self.size // self.batch_size
        first, stop = ((epoch * steps + step) * self.batch_size for step in (skip, steps))
        simulate = self._on_host if jax.default_backend() == "cpu" else self._on_devices
        for batch in simulate(first, stop):
            yield 1, batch

    def _on_host(self, first: int, stop: int) -> Iterator[Batch]:
        own = local_rows(np.arange(self.batch_size)[None])[0]  # each process simulates all and keeps its share
        ready = np.empty((0, self.priors.num_pixels, self.priors.num_pixels), np.uint16)
        chunks = simulate_images(stop - first, self.seed, self.split, self.priors, start=first)
        for start in range(first, stop, self.batch_size):
            while len(ready) < self.batch_size:
                ready = np.concatenate([ready, next(chunks)])
            batch = {"images": ready[own], "labels": labels_of(self.batch_size, start)[own]}
            ready = ready[self.batch_size :]
            if self.grid:
                batch["deflections"] = np.asarray(self._deflections(start, self.seed, self.split, self.batch_size))[own]
            yield shard_batch(batch, self.mesh)

    def _on_devices(self, first: int, stop: int) -> Iterator[Batch]:
        for start in range(first, stop, self.batch_size):
            yield self.render(start, self.seed, self.split)

    def _deflections(self, first, seed, split, n: int) -> jax.Array:
        assert self.grid is not None
        return render_deflections(first, seed, split, n=n, priors=self.priors, grid=self.grid)

    @cached_property
    def render(self):
        """The jitted (first, seed, split) -> batch, of which each device renders its share."""
        share = self.batch_size // self.mesh.size

        def render_share(first, seed, split):
            own = first + share * jax.lax.axis_index("data")
            batch = render_batch(own, seed, split, priors=self.priors, batch_size=share)
            if self.grid:
                batch["deflections"] = self._deflections(own, seed, split, share)
            return batch

        # check_vma=False: jax.random.poisson has loops that the check of shard_map does not support.
        whole, shares = PartitionSpec(), PartitionSpec("data")
        return jax.jit(jax.shard_map(render_share, mesh=self.mesh, in_specs=whole, out_specs=shares, check_vma=False))


def _read(dataset: Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    batch = {"images": read_rows(dataset.images, rows), "labels": dataset.labels[rows]}
    return batch if dataset.deflections is None else batch | {"deflections": dataset.deflections[rows]}


def eval_batches(dataset: Dataset, batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Yields all images in order; the last batch repeats the last image, with `mask`, bool (batch,), False there."""
    n = dataset.size
    rows = local_rows(np.arange(-(-n // batch_size) * batch_size).reshape(-1, batch_size))
    for batch in prefetch(_read(dataset, np.minimum(some, n - 1)) | {"mask": some < n} for some in rows):
        yield shard_batch(batch, mesh)
