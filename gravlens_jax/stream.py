"""Training images without end, simulated as they are needed: none is stored, and none is seen twice.

A stream of a seed and a split is the images 0, 1, 2, ... that a file of `simulate_dataset` would begin with. Batch i of
an epoch is a function of (seed, split, epoch, i), so a run goes on exactly where it stopped.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gravlens_jax.config import CLASSES, FILES
from gravlens_jax.mesh import local_rows, shard_batch
from gravlens_jax.priors import Priors
from gravlens_jax.simulate import labels_of, render_block, simulate_images


class Stream(NamedTuple):
    """Fresh images of a population, in the place of a `Dataset`."""

    size: int  # images that make an epoch
    seed: int
    split: str  # "train" or "easy"
    priors: Priors
    classes: tuple[str, ...] = CLASSES

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.priors.num_pixels, self.priors.num_pixels


def stream_batches(
    stream: Stream, batch_size: int, epoch: int, devices: Mesh, skip: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields the batches of an epoch on the devices: images uint16 (batch, height, width), labels int32 (batch,).

    On CPUs all cores simulate ahead; each accelerator renders its own share and draws the noise.

    Args:
      stream: the images.
      batch_size: over all devices.
      epoch: 0, 1, ...
      devices: to train on.
      skip: batches of the epoch to leave out, those already trained on.
    """
    steps = stream.size // batch_size
    first, last = (epoch * steps + skip) * batch_size, (epoch + 1) * steps * batch_size
    if jax.default_backend() != "cpu":
        render, split = _renderer(devices, batch_size // devices.size, stream.priors), FILES.index(stream.split)
        for start in range(first, last, batch_size):
            yield render(start, stream.seed, split)
        return
    own = local_rows(np.arange(batch_size)[None])[0]  # every process simulates the whole batch and keeps its share
    ready = np.empty((0, *stream.image_shape), np.uint16)
    chunks = simulate_images(last - first, stream.seed, stream.split, stream.priors, start=first)
    for start in range(first, last, batch_size):
        while len(ready) < batch_size:
            ready = np.concatenate([ready, next(chunks)])
        batch = {"images": ready[own], "labels": labels_of(batch_size, start)[own]}
        ready = ready[batch_size:]
        yield shard_batch(batch, devices)


@cache
def _renderer(devices: Mesh, share: int, priors: Priors) -> Callable[..., dict[str, jax.Array]]:
    """Returns (first, seed, split) -> a batch, of which each device renders `share` images and keeps them."""

    def render_share(first, seed, split):
        own = first + share * jax.lax.axis_index("data")
        return _render_batch(own, seed, split, priors=priors, batch_size=share)

    whole, shares = PartitionSpec(), PartitionSpec("data")
    # jax.random.poisson has loops that shard_map's check does not understand.
    return jax.jit(jax.shard_map(render_share, mesh=devices, in_specs=whole, out_specs=shares, check_vma=False))


def _render_batch(first, seed, split, *, priors: Priors, batch_size: int) -> dict[str, jax.Array]:
    """Images first, first + 1, ... with their noise: rendered class by class, then put in order."""
    indices = first + jnp.arange(batch_size)
    labels = indices % len(CLASSES)
    each = -(-batch_size // len(CLASSES))
    rendered = []
    for label, substructure in enumerate(CLASSES):
        own = first + (label - first) % len(CLASSES) + len(CLASSES) * jnp.arange(each)
        rendered.append(render_block(seed, split, own, priors=priors, substructure=substructure, noise=True))
    return {"images": jnp.stack(rendered)[labels, (indices - first) // len(CLASSES)], "labels": labels}
