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


def labels_of(n: int, start: int = 0) -> np.ndarray:
    """Returns int32 (n,), labels of images `start` and on: image i has class i mod 3, so every part is balanced."""
    return np.arange(start, start + n, dtype=np.int32) % len(CLASSES)


def render_block(seed, split, indices, *, priors: Priors, substructure: str) -> tuple[jax.Array, jax.Array]:
    """Returns images `indices` of a split, all of one class, with photon noise, and their largest expected counts.

    Args:
      seed, split, priors: as in `simulate_images`.
      indices: int32 (n,). Values depend on n in the last bit, so callers keep it constant.
      substructure: "no", "sphere" or "vort".

    Returns:
      uint16 (n, num_pixels, num_pixels), counts of at most MAX_COUNTS; float32 (), NaN if a lens cannot be rendered.
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
    """Returns the `deflection_map` of `n` consecutive images of a split: float32 (n, cells, cells, 2), arcsec.

    Args:
      first: index of the first image.
      seed, split, priors: as in `simulate_images`.
      grid: the cells of the maps.
    """

    def make(substructure, indices):
        lenses = _sample_block(seed, split, indices, priors=priors, substructure=substructure)
        return jax.vmap(partial(deflection_map, priors=priors, grid=grid))(lenses)

    return _in_turn(make, first, n)


def render_batch(first, seed, split, *, priors: Priors, batch_size: int) -> dict[str, jax.Array]:
    """Returns a training batch of consecutive images, noise included, rendered on the device; for use inside jit.

    The images are those of `simulate_images`, to rounding. Counts over 60,000 are cut off.

    Args:
      first: index of the first image.
      seed, split, priors: as in `simulate_images`.
      batch_size: number of images.

    Returns:
      images: uint16 (batch_size, num_pixels, num_pixels).
      labels: int32 (batch_size,).
    """

    def make(substructure, indices):
        return render_block(seed, split, indices, priors=priors, substructure=substructure)[0]

    labels = (first + jnp.arange(batch_size, dtype=jnp.int32)) % len(CLASSES)
    return {"images": _in_turn(make, first, batch_size), "labels": labels}


def _simulate_chunk(
    start: int, stop: int, block: int, seed: int, split: int, priors: Priors, classes: tuple[str, ...]
) -> np.ndarray:
    """Returns images start to stop, at most `block` of each class: uint16 (n, height, width)."""
    images = np.empty((stop - start, priors.num_pixels, priors.num_pixels), np.uint16)
    for label, name in enumerate(classes):
        # Always a whole block, so that the bits of an image never depend on the number of images.
        indices = start + label + len(classes) * np.arange(block, dtype=np.int32)
        with jax.enable_x64(False):  # its 64-bit loop counters would change the last bit of some pixels
            rendered, most = render_block(seed, split, indices, priors=priors, substructure=name)
        check_counts(float(most), name)
        used = indices < stop
        images[indices[used] - start] = np.asarray(rendered)[used]
    return images


def check_counts(most: float, substructure: str) -> None:
    """Raises InputError if the largest expected counts of some images are no number, or too large to store."""
    heavy = "its substructure is heavier than the prior `mass`, or a prior is out of the range that can be rendered"
    check(not np.isnan(most), f"a {substructure} lens cannot be rendered: {heavy}")
    check(
        most + 6 * most**0.5 < MAX_COUNTS,
        f"a pixel has {most:.0f} counts, more than {MAX_COUNTS}; lower the prior `photons`",
    )


def simulate_images(
    n: int, seed: int, split: int, priors: Priors, classes: tuple[str, ...] = CLASSES, start: int = 0
) -> Iterator[np.ndarray]:
    """Yields `n` images in order, from image `start` on, in chunks of uint16 photon counts (chunk, height, width).

    The public images are such counts, scaled to [0, 1] one by one. On a CPU all cores work, each on its own chunks.

    Args:
      n: number of images, at least 1.
      seed: non-negative.
      split: non-negative; different splits never share an image.
      priors: the population.
      classes: the substructures of images 0, 1, ... in turn.
      start: index of the first image.
    """
    check(n >= 1, f"n={n}: expected at least 1 image")
    block = _block_size()
    chunk = len(classes) * block
    make = partial(_simulate_chunk, block=block, seed=seed, split=split, priors=priors, classes=classes)
    workers = _workers()
    stop, left_out = start + n, start % chunk  # chunks always begin at multiples of their size
    begins = range(start - left_out, stop, chunk)
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(make, begin, min(begin + chunk, stop)) for begin in begins)  # submitted when taken
        pending = deque(islice(futures, 2 * workers))
        while pending:
            yield pending.popleft().result()[left_out:]
            left_out = 0
            pending.extend(islice(futures, 1))


def render_images(lens_params: Mapping[str, Any], priors: Priors) -> np.ndarray:
    """Returns the expected counts of any number of lenses, float32 (n, num_pixels, num_pixels).

    The same as `render_lenses` to rounding, but not for use inside jit: on a CPU all cores work.

    Args:
      lens_params: as of `sample_lens`, each with a leading axis of length n.
      priors: the camera and the source's fixed profile.
    """
    shape, block = np.shape(lens_params["z_lens"]), _block_size()
    check(len(shape) == 1, f"lens_params of shape {shape} are not those of n lenses; for one, call render_lens")
    n = shape[0]
    check(n >= 1, "lens_params hold no lens")

    def render(start):
        rows = np.minimum(np.arange(start, start + block), n - 1)  # always a whole block: one compiled program
        lenses = {name: np.asarray(values)[rows] for name, values in lens_params.items()}
        return np.asarray(_render(lenses, priors=priors))

    with ThreadPoolExecutor(_workers()) as pool:
        return np.concatenate(list(pool.map(render, range(0, n, block))))[:n]


_render = jax.jit(render_lenses, static_argnames="priors")


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
    return {
        name: np.where(np.isnan(values), np.float32(name == "vortex_length"), values)
        for name, values in lens_params.items()
    }


def deflection_maps(lens_params: dict[str, np.ndarray], priors: Priors, grid: Grid) -> np.ndarray:
    """Returns `deflection_map` of lenses of any class, float32 (n, cells, cells, 2), arcsec.

    Args:
      lens_params: as `simulate_parameters` returns them.
      priors: the population.
      grid: the cells of the maps.
    """
    n = len(lens_params["z_lens"])
    maps = np.empty((n, grid.cells, grid.cells, 2), np.float32)
    for start in range(0, n, BLOCK):
        rows = np.minimum(np.arange(start, start + BLOCK), n - 1)  # always a whole block: one compiled program
        lenses = without_nan({name: values[rows] for name, values in lens_params.items()})
        maps[start : start + BLOCK] = _map_block(lenses, priors=priors, grid=grid)[: n - start]
    return maps


@partial(jax.jit, static_argnames=("priors", "grid"))
def _map_block(lens_params, *, priors: Priors, grid: Grid) -> jax.Array:
    return jax.vmap(partial(deflection_map, priors=priors, grid=grid))(lens_params)
