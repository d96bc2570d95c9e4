"""Simulated lens images: parameters drawn from priors, lensed light, photon noise, balanced classes.

The preset `ct1` re-simulates the public ML4SCI DeepLense "Common Test I" images from published papers, public code and
fits to public images; it is never that data set itself. Image i of a split is a function of (seed, split, i) alone.

    key = jax.random.key(0)
    p = sample_lens(key, PRESETS["ct1"], "vort")        # the parameters of one lens
    counts = render_lens(p, PRESETS["ct1"])             # its expected photon counts, differentiable in p
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from math import pi
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax import lens
from gravlens_jax.config import CLASSES, SPLITS, SimulationConfig, check
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.priors import PRESETS, Priors

MAX_COUNTS = 60_000  # images are stored as uint16
CPU_BLOCK, ACCELERATOR_BLOCK = 4, 128  # images of one class per compiled call


def sample_lens(key: jax.Array, priors: Priors, substructure: str) -> dict[str, jax.Array]:
    """Draws the parameters of one lens from `priors`.

    Args:
      key: a `jax.random.key`.
      priors: the population.
      substructure: "no", "sphere" or "vort".

    Returns:
      float32 scalars z_lens, z_source, halo_mass, theta_E (of the main halo), shear, shear_angle, source_radius,
      source_axis_ratio, source_angle, and source (2,); for "sphere" also subhalo_centres (padding, 2) and
      subhalo_masses (padding,), 0 where there is none; for "vort" also vortex_mass, vortex_angle, vortex_length and
      vortex_centre (2,). Arcsec, radians, solar masses.
    """
    *most_keys, last_key = jax.random.split(key, 16)
    keys = iter(most_keys)

    def uniform(name, shape=(), key=None):
        low, high = getattr(priors, f"{name}_min"), getattr(priors, f"{name}_max")
        return jax.random.uniform(next(keys) if key is None else key, shape, jnp.float32, low, high)

    def angle(shape=()):
        return jax.random.uniform(next(keys), shape, jnp.float32, 0, 2 * pi)

    def polar(name, shape=()):
        radius, phi = uniform(name, shape), angle(shape)
        return jnp.stack([radius * jnp.cos(phi), radius * jnp.sin(phi)], axis=-1)

    p = {
        "z_lens": uniform("z_lens"),
        "z_source": uniform("z_source"),
        "shear": uniform("shear"),
        "shear_angle": uniform("shear_angle"),
        "source": uniform("source_offset", (2,)) if priors.source_in_square else polar("source_offset"),
        "source_axis_ratio": uniform("source_axis_ratio"),
        "source_angle": uniform("source_angle"),
        "source_radius": uniform("source_radius", key=last_key),
    }
    substructure_mass = jnp.float32(0)
    if substructure == "sphere":
        number = jax.random.poisson(next(keys), priors.subhalo_number)
        if not priors.subhalo_poisson:
            number = round(priors.subhalo_number)
        padding = priors.subhalo_padding
        power = 1 + priors.subhalo_slope  # the cumulative distribution is linear in mass^power
        low, high = priors.subhalo_mass_min**power, priors.subhalo_mass_max**power
        masses = (low + jax.random.uniform(next(keys), (padding,)) * (high - low)) ** (1 / power)
        p["subhalo_masses"] = jnp.where(jnp.arange(padding) < number, masses, 0)
        p["subhalo_centres"] = polar("subhalo_offset", (padding,))
        substructure_mass = p["subhalo_masses"].sum()
    elif substructure == "vort":
        p["vortex_mass"] = substructure_mass = priors.mass * uniform("vortex_mass_fraction")
        p["vortex_centre"] = priors.vortex_centre_sigma * jax.random.normal(next(keys), (2,))
        p["vortex_angle"] = angle()
        length = uniform("vortex_length")
        if priors.vortex_length_log:
            low, high = priors.vortex_length_min, priors.vortex_length_max
            length = low * (high / low) ** ((length - low) / (high - low))
        p["vortex_length"] = length
    p["halo_mass"] = priors.mass - substructure_mass * priors.mass_includes_substructure
    p["theta_E"] = jnp.sqrt(lens.einstein_radius_squared(p["halo_mass"], p["z_lens"], p["z_source"]))
    return p


def deflect_substructure(x: jax.Array, y: jax.Array, lens_params: dict[str, jax.Array]) -> lens.Pair:
    """Returns the deflection (arcsec) at `x`, `y` of the subhalos or the vortex alone; 0 for a lens without."""
    p = lens_params
    if "subhalo_masses" in p:
        strengths = lens.einstein_radius_squared(p["subhalo_masses"], p["z_lens"], p["z_source"])
        return lens.deflect_points(x, y, p["subhalo_centres"], strengths)
    if "vortex_mass" in p:
        strength = lens.einstein_radius_squared(p["vortex_mass"], p["z_lens"], p["z_source"])
        return lens.deflect_string(x, y, p["vortex_centre"], p["vortex_angle"], p["vortex_length"], strength)
    return jnp.zeros_like(x), jnp.zeros_like(y)


def render_lens(lens_params: dict[str, jax.Array], priors: Priors) -> jax.Array:
    """Returns the expected photon counts per pixel, float32 (num_pixels, num_pixels), sky included.

    Args:
      lens_params: as `sample_lens` returns them.
      priors: the camera and the source's fixed profile.
    """
    p = lens_params
    x, y = lens.pixel_grid(priors.num_pixels, priors.pixel_scale, priors.supersampling)
    if priors.lens_axis_ratio == 1:
        halo = lens.deflect_sis(x, y, p["theta_E"])
    else:
        halo = lens.deflect_sie(x, y, p["theta_E"], priors.lens_axis_ratio, 0.0)
    shear = lens.deflect_shear(x, y, p["shear"], p["shear_angle"])
    substructure = deflect_substructure(x, y, p)
    beta_x = x - halo[0] - shear[0] - substructure[0] - p["source"][0]
    beta_y = y - halo[1] - shear[1] - substructure[1] - p["source"][1]
    light = lens.sersic_light(
        beta_x, beta_y, priors.source_n, p["source_radius"], p["source_axis_ratio"], p["source_angle"]
    )
    image = lens.bin_pixels(light, priors.supersampling)
    image = lens.blur(image, priors.psf_sigma / priors.pixel_scale, priors.psf_pixels)
    return priors.photons * (image + priors.sky)


def _lens_key(seed: int, split: int, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split), index)


@partial(jax.jit, static_argnames=("priors", "substructure", "noise"))
def _render_block(seed, split, indices, *, priors: Priors, substructure: str, noise: bool) -> jax.Array:
    """Expected counts float32, or with `noise` Poisson variates of them uint16, (len(indices), height, width)."""

    def one(index):
        key = _lens_key(seed, split, index)
        expected = render_lens(sample_lens(key, priors, substructure), priors)
        if not noise:
            return expected
        counts = jax.random.poisson(jax.random.fold_in(key, 1), expected)
        return jnp.minimum(counts, MAX_COUNTS).astype(jnp.uint16)  # uint16 would wrap around; the caller refuses these

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
            _render_block(seed, split, indices, priors=priors, substructure=substructure, noise=on_device)
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


def labels_of(n: int) -> np.ndarray:
    """Returns int32 (n,): image i has class i mod 3, so any leading part of a set is balanced too."""
    return np.arange(n, dtype=np.int32) % len(CLASSES)


def simulate_images(
    n: int, seed: int, split: str, priors: Priors, classes: tuple[str, ...] = CLASSES
) -> Iterator[np.ndarray]:
    """Yields `n` images in order, in chunks of uint16 (chunk, num_pixels, num_pixels) photon counts.

    Counts are stored as they are: half the size of float32 and nothing lost; `augment.to_unit` scales each image to
    [0, 1], as the public images are. On a CPU every core works on a chunk of its own.

    Args:
      n: number of images, at least 1.
      seed: non-negative.
      split: "train", "val" or "test"; splits never share an image.
      priors: the population.
      classes: the substructures that images 0, 1, ... have in turn.
    """
    check(n >= 1, f"n={n}: expected at least 1 image")
    block = CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
    chunk = len(classes) * block
    make = partial(_simulate_chunk, block=block, seed=seed, split=SPLITS.index(split), priors=priors, classes=classes)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    starts = iter(range(0, n, chunk))
    with ThreadPoolExecutor(workers) as pool:

        def submit(count):
            return [pool.submit(make, start, min(start + chunk, n)) for start in islice(starts, count)]

        pending = submit(2 * workers)
        while pending:
            yield pending.pop(0).result()
            pending += submit(1)


def simulate_parameters(n: int, seed: int, split: str, priors: Priors) -> dict[str, np.ndarray]:
    """Returns the parameters of the lenses that `simulate_images` shows: float32 (n, ...) for each name.

    The names are those of `sample_lens`; a parameter that a class does not have is NaN there.
    """
    arrays = {}
    for label, substructure in enumerate(CLASSES):
        indices = jnp.arange(label, n, len(CLASSES))
        draw = jax.vmap(lambda i, s=substructure: sample_lens(_lens_key(seed, SPLITS.index(split), i), priors, s))
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
    """Simulates `out/{train,val,test}.npz`, those that are not there already; returns `out`.

    Args:
      out: folder; a file there that came from the same arguments is kept, any other is an error.
      config: preset, numbers of images and seed.
      progress: wraps the loop over chunks of images: (chunks, split, number of images) -> chunks.
      priors: the population, if it is not the preset itself.
      parameters: whether to store each lens's parameters too, as arrays "parameters/<name>".
    """
    priors = PRESETS[config.preset] if priors is None else priors
    source = {"preset": config.preset, "seed": config.seed, "parameters": parameters, "priors": asdict(priors)}
    info = {"simulated": source}
    todo = {}
    for split in SPLITS:
        path, n = Path(out) / f"{split}.npz", getattr(config, split)
        if not path.exists():
            todo |= {split: (path, n)} if n else {}
            continue
        found = open_npz(path)
        same = len(found.labels) == n and found.info == info
        check(same, f"{path} holds {len(found.labels)} other images; remove it or choose another folder")
    for split, (path, n) in todo.items():
        arrays = simulate_parameters(n, config.seed, split, priors) if parameters else {}
        arrays = {f"parameters/{name}": array for name, array in arrays.items()}
        chunks = progress(simulate_images(n, config.seed, split, priors), split, n)
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
        p = sample_lens(_lens_key(seed, SPLITS.index("train"), index), priors, substructure)
        deflections[index] = jnp.hypot(*deflect_substructure(x, y, p))
    shape = (columns, len(CLASSES), *images.shape[1:])
    return images.reshape(shape).swapaxes(0, 1), deflections.reshape(shape).swapaxes(0, 1)
