"""Training images that are simulated during training, each used once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gravlens_jax.lensing.images import labels_of, render_batch, render_deflections, simulate_images
from gravlens_jax.lensing.priors import Priors
from gravlens_jax.lensing.render import Grid
from gravlens_jax.loader import Batch
from gravlens_jax.sharding import local_rows, shard_batch


@dataclass(frozen=True)
class StreamData:
    """Simulated images: epoch 0, 1, ... are the images 0, 1, 2, ... of `lensing.simulate_images`.

    On CPUs all cores simulate ahead; each accelerator renders its own share of a batch, with noise.
    """

    size: int  # images of an epoch
    priors: Priors
    split: int  # see `simulate_images`
    batch_size: int  # over all devices
    seed: int  # of the images
    mesh: Mesh
    grid: Grid | None  # of deflection maps, see `render_deflections`; None: no maps

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yields one step at a time: see `loader`."""
        steps = self.size // self.batch_size
        first, stop = ((epoch * steps + step) * self.batch_size for step in (skip, steps))
        if jax.default_backend() == "cpu":
            batches = self._on_host(first, stop)
        else:
            batches = (self.render(start, self.seed, self.split) for start in range(first, stop, self.batch_size))
        for batch in batches:
            yield 1, batch

    def _on_host(self, first: int, stop: int) -> Iterator[Batch]:
        local = local_rows(np.arange(self.batch_size)[None])[0]  # each process simulates all and keeps its share
        ready = np.empty((0, self.priors.num_pixels, self.priors.num_pixels), np.uint16)
        chunks = simulate_images(stop - first, self.seed, self.split, self.priors, start=first)
        for start in range(first, stop, self.batch_size):
            while len(ready) < self.batch_size:
                ready = np.concatenate([ready, next(chunks)])
            batch = {"images": ready[: self.batch_size], "labels": labels_of(self.batch_size, start)}
            ready = ready[self.batch_size :]
            batch |= self._maps(start, self.seed, self.split, self.batch_size)
            yield shard_batch({name: np.asarray(x)[local] for name, x in batch.items()}, self.mesh)

    def _maps(self, first, seed, split, n: int) -> dict[str, Any]:
        if self.grid is None:
            return {}
        return {"deflections": render_deflections(first, seed, split, n=n, priors=self.priors, grid=self.grid)}

    @cached_property
    def render(self):
        """The jitted (first, seed, split) -> batch, of which each device renders its share."""
        share = self.batch_size // self.mesh.size

        def render_share(first, seed, split):
            start = first + share * jax.lax.axis_index("data")
            batch = render_batch(start, seed, split, priors=self.priors, batch_size=share)
            return batch | self._maps(start, seed, split, share)

        # check_vma=False: that check of shard_map refuses the conditional in `profiles.deflect_points`.
        whole, shares = PartitionSpec(), PartitionSpec("data")
        return jax.jit(jax.shard_map(render_share, mesh=self.mesh, in_specs=whole, out_specs=shares, check_vma=False))
