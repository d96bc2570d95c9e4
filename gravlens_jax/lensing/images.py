"""Sets of simulated images with photon noise, in balanced classes, on all CPU cores or on an accelerator.

Image i of a split is a function of (seed, split, i) alone. Images of the preset `ct1` are a re-simulation of the public
ML4SCI DeepLense "Common Test I" images, from published papers, public code and fits to public images.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.config import CLASSES
from gravlens_jax.errors import check
from gravlens_jax.lensing.noise import poisson
from gravlens_jax.lensing.priors import Priors
from gravlens_jax.lensing.render import Grid, LensParams, deflection_map, render_lenses, sample_lens

SIMULATOR_VERSION = 3  # raised with every change of the images that a seed gives
MAX_COUNTS = 60_000  # images are stored as uint16
BLOCK = 512  # lenses per compiled call of `simulate_parameters` and `deflection_maps`
CPU_BLOCK, ACCELERATOR_BLOCK = 4, 128  # images of one class per compiled call


def lens_key(seed: int, split: int, index: int | jax.Array) -> jax.Array:
    """Returns the random key of image `index` of a split: `sample_lens` draws the lens from it."""
    key = jax.random.key(seed, impl="threefry2x32")  # whatever JAX's default is
    return jax.random.fold_in(jax.random.fold_in(key, split), index)


def labels_of(n: int) -> np.ndarray:
    """Returns int32 (n,), labels of images 0, 1, ...: image i has class i mod 3, so every part is balanced."""
    return np.arange(n, dtype=np.int32) % len(CLASSES)


def render_block(seed, split, indices, *, priors: Priors, substructure: str) -> tuple[jax.Array, jax.Array]:
    """Returns images `indices` of a split, all of one class, with photon noise, and their largest expected counts.

    `indices` are int32 (n,); values depend on n in the last bit, so callers keep it constant. Images are uint16 (n,
    num_pixels, num_pixels), at most MAX_COUNTS; the largest counts float32 (), NaN if a lens cannot be rendered.
    """
    # Two programs, because on a CPU XLA would compute the light again in each loop of the noise.
    expected = _render_expected(seed, split, indices, priors=priors, substructure=substructure)
    return _draw_counts(seed, split, indices, expected, least=priors.photons * priors.sky)


@partial(jax.jit, static_argnames=("priors", "substructure"))
def _render_expected(seed, split, indices, *, priors: Priors, substructure: str) -> jax.Array:
    return render_lenses(_sample_block(seed, split, indices, priors=priors, substructure=substructure), priors)


@partial(jax.jit, static_argnames="least")
def _draw_counts(seed, split, indices, expected, *, least: float) -> tuple[jax.Array, jax.Array]:
    keys = jax.vmap(lambda index: jax.random.fold_in(lens_key(seed, split, index), 1))(indices)
    most = jnp.where(jnp.isfinite(expected).all(), expected.max(), jnp.nan)  # compiled maxima may drop NaN
    return jnp.minimum(poisson(keys, expected, least), MAX_COUNTS).astype(jnp.uint16), most


def _in_turn(make: Callable[[str, jax.Array], jax.Array], first: jax.Array, n: int) -> jax.Array:
    """Returns make(substructure, indices) of `n` consecutive images from `first` on, in their order."""
    num_classes = len(CLASSES)
    images = first + jnp.arange(n, dtype=jnp.int32)
    made = []
    for label, substructure in enumerate(CLASSES):
        start = first + (label - first) % num_classes
        indices = start + num_classes * jnp.arange(-(-n // num_classes), dtype=jnp.int32)
        made.append(make(substructure, indices))
    return jnp.stack(made)[images % num_classes, (images - first) // num_classes]


@partial(jax.jit, static_argnames=("n", "priors", "grid"))
def render_deflections(first, seed, split, *, n: int, priors: Priors, grid: Grid) -> jax.Array:
    """Returns the `deflection_map` of `n` images of a split from `first` on: float32 (n, cells, cells, 2), arcsec."""
    sample = partial(_sample_block, seed, split, priors=priors)
    return _in_turn(lambda name, rows: _map_block(sample(rows, substructure=name), priors=priors, grid=grid), first, n)


def render_batch(first, seed, split, *, priors: Priors, batch_size: int) -> dict[str, jax.Array]:
    """Returns a training batch of consecutive images, noise included, rendered on the device; for use inside jit.

    `images`, uint16 (batch_size, num_pixels, num_pixels), are those of `simulate_images` from index `first` on, to
    rounding; counts over MAX_COUNTS are cut off. `labels` are int32 (batch_size,).
    """
    render = partial(render_block, seed, split, priors=priors)
    images = _in_turn(lambda name, rows: render(rows, substructure=name)[0], first, batch_size)
    return {"images": images, "labels": (first + jnp.arange(batch_size, dtype=jnp.int32)) % len(CLASSES)}


def simulate_images(
    n: int, seed: int, split: int, priors: Priors, classes: tuple[str, ...] = CLASSES
) -> Iterator[np.ndarray]:
    """Yields `n` images in order, in chunks of uint16 photon counts (chunk, height, width).

    The public images are such counts, scaled to [0, 1] one by one. On a CPU all cores work, each on its own chunks.
    `seed` and `split` are not negative; different splits never share an image. `classes` are the substructures of
    images 0, 1, ... in turn. InputError for n < 1, or if a lens cannot be rendered or has too many counts.
    """
    check(n >= 1, f"n={n}: expected at least 1 image")
    block = _block_size()
    chunk, workers = len(classes) * block, _workers()

    def make(begin):
        images = np.empty((min(chunk, n - begin), priors.num_pixels, priors.num_pixels), np.uint16)
        for label, name in enumerate(classes):
            # Always a whole block, so that the bits of an image never depend on the number of images.
            indices = begin + label + len(classes) * np.arange(block, dtype=np.int32)
            with jax.enable_x64(False):  # its 64-bit loop counters would change the last bit of some pixels
                rendered, largest = render_block(seed, split, indices, priors=priors, substructure=name)
            most = float(largest)
            heavy = "its substructure is heavier than the prior `mass`, or a prior is beyond what can be rendered"
            check(not np.isnan(most), f"a {name} lens cannot be rendered: {heavy}")
            many = f"a pixel has {most:.0f} counts, with noise perhaps over {MAX_COUNTS}; lower the prior `photons`"
            check(most + 6 * most**0.5 < MAX_COUNTS, many)
            used = indices < n
            images[indices[used] - begin] = np.asarray(rendered)[used]
        return images

    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(make, begin) for begin in range(0, n, chunk))  # submitted when taken
        pending = deque(islice(futures, 2 * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(islice(futures, 1))


def render_images(lens_params: Mapping[str, Any], priors: Priors) -> np.ndarray:
    """Returns the expected counts of any number of lenses, float32 (n, num_pixels, num_pixels).

    The same as `render_lenses` to rounding, but not for use inside jit: on a CPU all cores work. `lens_params` are as
    of `sample_lens`, each with a leading axis of length n; `priors` are the camera and the source's fixed profile.
    """
    shape = np.shape(lens_params["z_lens"])
    check(len(shape) == 1, f"lens_params of shape {shape} are not those of n lenses; for one, call render_lens")
    check(shape[0] >= 1, "lens_params hold no lens")

    with ThreadPoolExecutor(_workers()) as pool:
        blocks = pool.map(lambda x: np.asarray(_render(x, priors=priors)), in_blocks(lens_params, _block_size()))
        return np.concatenate(list(blocks))[: shape[0]]


_render = jax.jit(render_lenses, static_argnames="priors")


def in_blocks(lens_params: Mapping[str, Any], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the parameters of `size` lenses each, the last one repeated: one compiled program renders all blocks."""
    n = len(lens_params["z_lens"])
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        yield {name: np.asarray(values)[rows] for name, values in lens_params.items()}


def _block_size() -> int:
    return CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 3 * cores  # with one thread per core, cores idle while threads wait for each other's computations


def simulate_parameters(n: int, seed: int, split: int, priors: Priors) -> dict[str, np.ndarray]:
    """Returns the parameters of the lenses that `simulate_images` shows: float32 (n, ...) for each name.

    The names are those of `sample_lens`; a parameter that a class does not have is NaN there.
    """
    arrays: dict[str, np.ndarray] = {}
    for label, substructure in enumerate(CLASSES):
        indices = np.arange(label, n, len(CLASSES))
        for start in range(0, len(indices), BLOCK):
            block = indices[start : start + BLOCK]
            sampled = _sample_block(seed, split, np.resize(block, BLOCK), priors=priors, substructure=substructure)
            for name, values in sampled.items():
                array = arrays.setdefault(name, np.full((n, *values.shape[1:]), np.nan, np.float32))
                array[block] = values[: len(block)]
    return arrays


@partial(jax.jit, static_argnames=("priors", "substructure"))
def _sample_block(seed, split, indices, *, priors: Priors, substructure: str) -> LensParams:
    return jax.vmap(lambda index: sample_lens(lens_key(seed, split, index), priors, substructure))(indices)


def without_nan(lens_params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns parameters of lenses of all classes that can be rendered together: NaN becomes no mass, at the centre."""
    fill = {"vortex_length": np.float32(1)}
    return {name: np.where(np.isnan(x), fill.get(name, np.float32(0)), x) for name, x in lens_params.items()}


def deflection_maps(lens_params: dict[str, np.ndarray], priors: Priors, grid: Grid) -> np.ndarray:
    """Returns `deflection_map` of the lenses of `simulate_parameters`, float32 (n, cells, cells, 2), arcsec."""
    blocks = in_blocks(without_nan(lens_params), BLOCK)
    maps = [np.asarray(_map_block(lenses, priors=priors, grid=grid)) for lenses in blocks]
    return np.concatenate(maps)[: len(lens_params["z_lens"])]


@partial(jax.jit, static_argnames=("priors", "grid"))
def _map_block(lens_params, *, priors: Priors, grid: Grid) -> jax.Array:
    return jax.vmap(partial(deflection_map, priors=priors, grid=grid))(lens_params)
