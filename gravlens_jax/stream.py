"""Training images that are simulated during training, each used once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import Mesh, PartitionSpec

from gravlens_jax.lensing.images import render_batch, render_deflections
from gravlens_jax.lensing.priors import Priors
from gravlens_jax.lensing.render import Grid
from gravlens_jax.loader import Batch


@dataclass(frozen=True)
class StreamData:
    """Simulated images: epoch 0, 1, ... are the images 0, 1, 2, ... of `lensing.simulate_images`, to rounding.

    Each device renders its own share of a batch, with noise. A CPU uses one core for it.
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
        for step in range(epoch * steps + skip, (epoch + 1) * steps):
            yield 1, self.render(step * self.batch_size, self.seed, self.split)

    @cached_property
    def render(self):
        """The jitted (first, seed, split) -> batch, of which each device renders its share."""
        share = self.batch_size // self.mesh.size

        def render_share(first, seed, split):
            start = first + share * jax.lax.axis_index("data")
            batch = render_batch(start, seed, split, priors=self.priors, batch_size=share)
            if self.grid is not None:
                maps = render_deflections(start, seed, split, n=share, priors=self.priors, grid=self.grid)
                batch["deflections"] = maps
            return batch

        # check_vma=False: that check of shard_map refuses the conditional in `profiles.deflect_points`.
        whole, shares = PartitionSpec(), PartitionSpec("data")
        return jax.jit(jax.shard_map(render_share, mesh=self.mesh, in_specs=whole, out_specs=shares, check_vma=False))
