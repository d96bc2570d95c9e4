"""Simulated sets of lens images: photon noise, balanced classes, all cores at work, files.

The preset `ct1` re-simulates the public ML4SCI DeepLense "Common Test I" images from published papers, public code and
fits to public images; it is never that data set itself. Image i of a split is a function of (seed, split, i) alone.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax import lens
from gravlens_jax.config import CLASSES, FILES, SimulationConfig, check
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.priors import PRESETS, Priors, make_easy
from gravlens_jax.render import deflect_substructure, render_lens, sample_lens

MAX_COUNTS = 60_000  # images are stored as uint16
CPU_BLOCK, ACCELERATOR_BLOCK = 4, 128  # images of one class per compiled call


def _lens_key(seed: int, split: int, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split), index)


@partial(jax.jit, static_argnames=("priors", "substructure", "noise"))
def render_block(seed, split, indices, *, priors: Priors, substructure: str, noise: bool) -> jax.Array:
    """Returns images `indices` of a split, all of one class, (len(indices), num_pixels, num_pixels).

    float32 expected counts, or with `noise` uint16 Poisson variates of them. For the rest see `simulate_images`.
    """

    def one(index):
        key = _lens_key(seed, split, index)
        expected = render_lens(sample_lens(key, priors, substructure), priors)
        if not noise:
            return expected
        counts = jax.random.poisson(jax.random.fold_in(key, 1), expected)
        # uint16 would wrap around; `simulate_images` refuses what reaches the limit.
        return jnp.minimum(counts, MAX_COUNTS).astype(jnp.uint16)

    return jax.vmap(one)(indices)


def _simulate_chunk(
    start: int, stop: int, block: int, seed: int, split: int, priors: Priors, classes: tuple[str, ...]
) -> np.ndarray:
    """Images start to stop, at most `block` of each class, with their photon noise, uint16."""
    images = np.empty((stop - start, priors.num_pixels, priors.num_pixels), np.uint16)
    # NumPy's Poisson variates are exact too and several times faster than JAX's on a CPU; elsewhere noise stays on the
    # device.
    on_device = jax.default_backend() != "cpu"
    for label, substructure in enumerate(classes):
        # Always a whole block, so that an image's bits never depend on how many others are asked for.
        indices = start + label + len(classes) * np.arange(block, dtype=np.int32)
        rendered = np.asarray(
            render_block(seed, split, indices, priors=priors, substructure=substructure, noise=on_device)
        )
        check(
            rendered.max() < MAX_COUNTS,
            f"a pixel has {rendered.max():.0f} counts, more than {MAX_COUNTS}; lower the prior `photons`",
        )
        for index, image in zip(indices.tolist(), rendered, strict=True):
            if index < stop:
                rng = np.random.default_rng([seed, split, index])
                images[index - start] = image if on_device else rng.poisson(image)
    return images


def labels_of(n: int, start: int = 0) -> np.ndarray:
    """Returns int32 (n,), of images `start` and on: image i has class i mod 3, so any part of a set is balanced."""
    return np.arange(start, start + n, dtype=np.int32) % len(CLASSES)


def simulate_images(
    n: int, seed: int, split: str, priors: Priors, classes: tuple[str, ...] = CLASSES, start: int = 0
) -> Iterator[np.ndarray]:
    """Yields `n` images in order, from image `start` on, in chunks of uint16 photon counts (chunk, height, width).

    Counts are stored as they are: half the size of float32 and nothing lost; `augment.to_unit` scales each image to
    [0, 1], as the public images are. On a CPU all cores work, on chunks of their own.

    Args:
      n: number of images, at least 1.
      seed: non-negative.
      split: "train", "val", "test" or "easy"; splits never share an image.
      priors: the population.
      classes: the substructures that images 0, 1, ... have in turn.
      start: index of the first image.
    """
    check(n >= 1, f"n={n}: expected at least 1 image")
    block = CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
    chunk = len(classes) * block
    make = partial(_simulate_chunk, block=block, seed=seed, split=FILES.index(split), priors=priors, classes=classes)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 3 * cores  # threads often wait for each other's rays: with one a core, cores stand idle
    stop, left_out = start + n, start % chunk  # chunks always begin at multiples of their size
    begins = iter(range(start - left_out, stop, chunk))
    with ThreadPoolExecutor(workers) as pool:

        def submit(count):
            return [pool.submit(make, begin, min(begin + chunk, stop)) for begin in islice(begins, count)]

        pending = submit(2 * workers)
        while pending:
            yield pending.pop(0).result()[left_out:]
            left_out = 0
            pending += submit(1)


def simulate_parameters(n: int, seed: int, split: str, priors: Priors) -> dict[str, np.ndarray]:
    """Returns the parameters of the lenses that `simulate_images` shows: float32 (n, ...) for each name.

    The names are those of `sample_lens`; a parameter that a class does not have is NaN there.
    """
    arrays: dict[str, np.ndarray] = {}
    for label, substructure in enumerate(CLASSES):
        indices = jnp.arange(label, n, len(CLASSES))
        draw = jax.vmap(lambda i, s=substructure: sample_lens(_lens_key(seed, FILES.index(split), i), priors, s))
        for name, values in jax.jit(draw)(indices).items():
            array = arrays.setdefault(name, np.full((n, *values.shape[1:]), np.nan, np.float32))
            array[label :: len(CLASSES)] = values
    return arrays


def simulate_dataset(
    out: Path,
    config: SimulationConfig,
    progress: Callable = lambda items, *_: items,
    priors: Priors | None = None,
    parameters: bool = False,
) -> Path:
    """Simulates `out/{easy,train,val,test}.npz`, those that are not there already; returns `out`.

    Args:
      out: folder; a file there that came from the same arguments is kept, any other is an error.
      config: preset, numbers of images and seed.
      progress: wraps the loop over chunks of images: (chunks, split, number of images) -> chunks.
      priors: the population, if it is not the preset itself; `easy` has the same with heavier substructure.
      parameters: whether to store each lens's parameters too, as arrays "parameters/<name>".
    """
    priors = PRESETS[config.preset] if priors is None else priors
    source = {"preset": config.preset, "seed": config.seed, "parameters": parameters}
    todo: dict[str, tuple[Path, int, Priors, dict]] = {}
    for split in FILES:
        path, n = Path(out) / f"{split}.npz", getattr(config, split)
        population = make_easy(priors) if split == "easy" and n else priors
        info = {"simulated": source | {"priors": asdict(population)}}
        if not path.exists():
            todo |= {split: (path, n, population, info)} if n else {}
            continue
        found = open_npz(path)
        same = len(found.labels) == n and found.info == info
        check(same, f"{path} holds {len(found.labels)} other images; remove it or choose another folder")
    for split, (path, n, population, info) in todo.items():
        arrays = simulate_parameters(n, config.seed, split, population) if parameters else {}
        arrays = {f"parameters/{name}": array for name, array in arrays.items()}
        chunks = progress(simulate_images(n, config.seed, split, population), split, n)
        shape = (n, priors.num_pixels, priors.num_pixels)
        write_npz(path, chunks, shape, np.dtype(np.uint16), labels_of(n), CLASSES, info, arrays)
    return Path(out)


def example_lenses(seed: int, priors: Priors, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns examples of each class and what their substructure does to light.

    Args:
      seed: of the training images that are shown.
      priors: the population.
      columns: examples of each class.

    Returns:
      images: uint16 (3, columns, num_pixels, num_pixels) photon counts.
      deflections: float32, same shape, length of the substructure's own deflection, arcsec; 0 for `no`.
    """
    n = len(CLASSES) * columns
    images = np.concatenate(list(simulate_images(n, seed, "train", priors)))
    x, y = lens.pixel_grid(priors.num_pixels, priors.pixel_scale)
    deflections = np.empty(images.shape, np.float32)
    for index in range(n):
        substructure = CLASSES[index % len(CLASSES)]
        p = sample_lens(_lens_key(seed, FILES.index("train"), index), priors, substructure)
        deflections[index] = jnp.hypot(*deflect_substructure(x, y, p))
    shape = (columns, len(CLASSES), *images.shape[1:])
    return images.reshape(shape).swapaxes(0, 1), deflections.reshape(shape).swapaxes(0, 1)
