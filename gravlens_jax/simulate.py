"""Simulated lens images: priors, photon noise, balanced classes.

`ct1` re-simulates the public ML4SCI DeepLense "Common Test I" images from published papers, public code and fits to
public images; it is never that data set itself. Image i of a split is a function of (seed, split, i) alone.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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

BLOCK = 8  # images of one class per compiled call; fixed, so that an image never depends on how many are asked for
MAX_SUBHALOS = 64  # padding; a Poisson(25) draw exceeds it with probability 1e-11


@dataclass(frozen=True)
class Priors:
    """A population of lenses and the camera that sees it; the defaults are `ct1`. U[a, b] is a uniform prior.

    Quirks of the code that made the public images, kept on purpose: the angles of shear and source light were drawn
    from [0, 2 pi] and read as degrees (so every lens is stretched along x); Einstein radii use luminosity distances
    (see `lens.einstein_radius_squared`); the subhalo mass slope is -0.9 where the papers print -1.9 (with which
    subhalos would be invisible); the pixel scale is 0.05 where one paper prints 0.5; the papers' "length of the
    vortex" is its half-length.
    """

    num_pixels: int = 150
    pixel_scale: float = 0.05  # arcsec
    supersampling: int = 2  # sub-pixels per axis, averaged
    psf_sigma: float = 0.087  # arcsec, Gaussian
    psf_pixels: int = 11  # kernel width, odd
    photons: float = 100.0  # counts per unit of surface brightness
    sky: float = 0.1  # surface brightness: 10 sky counts per pixel
    mass: float = 1e12  # solar masses, main halo and substructure together
    z_lens: tuple[float, float] = (0.4, 0.6)  # U
    z_source: tuple[float, float] = (0.8, 1.2)  # U
    shear: tuple[float, float] = (0.0, 0.3)  # U
    shear_angle: tuple[float, float] = (0.0, 2 * pi * pi / 180)  # U, radians from +x; quirk: [0, 2 pi] degrees
    source_offset: tuple[float, float] = (0.0, 0.5)  # U, arcsec from the axis; not uniform in area
    source_n: float = 1.5  # Sersic index
    source_radius: float = 0.5  # arcsec, effective radius
    source_axis_ratio: tuple[float, float] = (0.4, 1.0)  # U
    source_angle: tuple[float, float] = (0.0, 2 * pi * pi / 180)  # U, radians; quirk: [0, 2 pi] degrees
    subhalo_number: float = 25.0  # Poisson mean
    subhalo_mass: tuple[float, float] = (1e6, 1e10)  # solar masses
    subhalo_slope: float = -0.9  # pdf proportional to mass^slope; quirk: the papers print -1.9
    subhalo_offset: tuple[float, float] = (0.0, 2.0)  # U, arcsec from the lens centre
    vortex_mass_fraction: tuple[float, float] = (0.030, 0.055)  # U, of `mass`
    vortex_length: tuple[float, float] = (1.0, 4.0)  # U, arcsec, end to end; quirk: the papers' U[0.5, 2] is half of it
    vortex_centre_sigma: float = 0.5  # arcsec, normal, each axis


PRESETS = {"ct1": Priors()}


def sample_lens(key: jax.Array, priors: Priors, substructure: str) -> dict[str, jax.Array]:
    """Draws the parameters of one lens from `priors`.

    Args:
      key: a `jax.random.key`.
      priors: the population.
      substructure: "no", "sphere" or "vort".

    Returns:
      float32 scalars z_lens, z_source, halo_mass, shear, shear_angle, source (2,), source_axis_ratio, source_angle;
      for "sphere" also subhalo_centres (64, 2) and subhalo_masses (64,), zero where there is none; for "vort" also
      vortex_mass, vortex_centre (2,), vortex_angle, vortex_length. Arcsec, radians, solar masses.
    """
    keys = iter(jax.random.split(key, 16))

    def uniform(bounds, shape=()):
        return jax.random.uniform(next(keys), shape, jnp.float32, bounds[0], bounds[1])

    def polar(bounds, shape=()):
        radius, angle = uniform(bounds, shape), uniform((0, 2 * pi), shape)
        return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)

    lens_params = {
        "z_lens": uniform(priors.z_lens),
        "z_source": uniform(priors.z_source),
        "shear": uniform(priors.shear),
        "shear_angle": uniform(priors.shear_angle),
        "source": polar(priors.source_offset),
        "source_axis_ratio": uniform(priors.source_axis_ratio),
        "source_angle": uniform(priors.source_angle),
    }
    substructure_mass = jnp.float32(0)
    if substructure == "sphere":
        number = jax.random.poisson(next(keys), priors.subhalo_number)
        power = 1 + priors.subhalo_slope  # the cumulative distribution is linear in mass^power
        low, high = (m**power for m in priors.subhalo_mass)
        masses = (low + uniform((0, 1), (MAX_SUBHALOS,)) * (high - low)) ** (1 / power)
        masses = jnp.where(jnp.arange(MAX_SUBHALOS) < number, masses, 0)
        lens_params |= {"subhalo_masses": masses, "subhalo_centres": polar(priors.subhalo_offset, (MAX_SUBHALOS,))}
        substructure_mass = masses.sum()
    elif substructure == "vort":
        substructure_mass = priors.mass * uniform(priors.vortex_mass_fraction)
        lens_params |= {
            "vortex_mass": substructure_mass,
            "vortex_centre": priors.vortex_centre_sigma * jax.random.normal(next(keys), (2,)),
            "vortex_angle": uniform((0, 2 * pi)),
            "vortex_length": uniform(priors.vortex_length),
        }
    return lens_params | {"halo_mass": priors.mass - substructure_mass}


def render_lens(lens_params: dict[str, jax.Array], priors: Priors) -> jax.Array:
    """Returns the expected photon counts per pixel, float32 (num_pixels, num_pixels), sky included.

    Args:
      lens_params: as `sample_lens` returns them.
      priors: the camera and the source's fixed profile.
    """
    p = lens_params
    x, y = lens.pixel_grid(priors.num_pixels, priors.pixel_scale, priors.supersampling)
    theta_E_squared = partial(lens.einstein_radius_squared, z_lens=p["z_lens"], z_source=p["z_source"])
    deflections = [
        lens.deflect_sis(x, y, jnp.sqrt(theta_E_squared(p["halo_mass"]))),
        lens.deflect_shear(x, y, p["shear"], p["shear_angle"]),
    ]
    if "subhalo_masses" in p:
        strengths = theta_E_squared(p["subhalo_masses"])
        deflections.append(lens.deflect_points(x, y, p["subhalo_centres"], strengths))
    if "vortex_mass" in p:
        strength = theta_E_squared(p["vortex_mass"])
        string = (p["vortex_centre"], p["vortex_angle"], p["vortex_length"])
        deflections.append(lens.deflect_string(x, y, *string, strength))
    beta_x = x - sum(alpha[0] for alpha in deflections) - p["source"][0]
    beta_y = y - sum(alpha[1] for alpha in deflections) - p["source"][1]
    light = lens.sersic_light(
        beta_x, beta_y, priors.source_n, priors.source_radius, p["source_axis_ratio"], p["source_angle"]
    )
    image = lens.bin_pixels(light, priors.supersampling)
    image = lens.blur(image, priors.psf_sigma / priors.pixel_scale, priors.psf_pixels)
    return priors.photons * (image + priors.sky)


@partial(jax.jit, static_argnames=("priors", "substructure"))
def _expected_block(seed, split, indices, *, priors: Priors, substructure: str) -> jax.Array:
    def one(index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), split), index)
        return render_lens(sample_lens(key, priors, substructure), priors)

    return jax.vmap(one)(indices)


def _block(start: int, n: int, seed: int, split: int, priors: Priors) -> np.ndarray:
    """Images start to start + 3 * BLOCK (or n) with their photon noise, uint16."""
    stop = min(start + len(CLASSES) * BLOCK, n)
    images = np.empty((stop - start, priors.num_pixels, priors.num_pixels), np.uint16)
    for label, substructure in enumerate(CLASSES):
        indices = start + label + len(CLASSES) * np.arange(BLOCK, dtype=np.int32)
        expected = np.asarray(_expected_block(seed, split, indices, priors=priors, substructure=substructure))
        for index, mean in zip(indices.tolist(), expected, strict=True):
            if index < stop:  # NumPy draws exact Poisson variates several times faster than jax.random on a CPU
                images[index - start] = np.random.default_rng([seed, split, index]).poisson(mean)
    return images


def labels_of(n: int) -> np.ndarray:
    """Returns int32 (n,): image i has class i mod 3, so any leading part of a set is balanced too."""
    return np.arange(n, dtype=np.int32) % len(CLASSES)


def simulate_images(n: int, seed: int, split: str, priors: Priors) -> Iterator[np.ndarray]:
    """Yields `n` images in order, in chunks of uint16 (chunk, num_pixels, num_pixels) photon counts.

    Lensing and noise of several chunks run side by side, one on each core.

    Args:
      n: number of images; image i has label i mod 3.
      seed: non-negative.
      split: "train", "val" or "test"; splits never share an image.
      priors: the population.
    """
    make = partial(_block, n=n, seed=seed, split=SPLITS.index(split), priors=priors)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    starts = iter(range(0, n, len(CLASSES) * BLOCK))
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(make, start) for start in islice(starts, 2 * workers)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(make, start) for start in islice(starts, 1)]


def simulate_dataset(out: Path, config: SimulationConfig, progress: Callable = lambda items, *_: items) -> Path:
    """Simulates `out/{train,val,test}.npz`, those that are not there already; returns `out`.

    Args:
      out: folder; a file there that came from the same priors, number and seed is kept, any other is an error.
      config: preset, numbers of images and seed.
      progress: wraps the loop over chunks of images: (chunks, split, number of images) -> chunks.
    """
    priors = PRESETS[config.preset]
    todo = {}
    for split in SPLITS:
        path, n = Path(out) / f"{split}.npz", getattr(config, split)
        info = {"simulated": {"preset": config.preset, "seed": config.seed, "priors": asdict(priors)}}
        if not path.exists():
            todo |= {split: (path, n, info)} if n else {}
            continue
        found = open_npz(path)
        same = len(found.labels) == n and found.info == json.loads(json.dumps(info))
        check(same, f"{path} holds {len(found.labels)} other images; remove it or choose another folder")
    for split, (path, n, info) in todo.items():
        shape = (n, priors.num_pixels, priors.num_pixels)
        chunks = progress(simulate_images(n, config.seed, split, priors), split, n)
        write_npz(path, chunks, shape, np.dtype(np.uint16), labels_of(n), CLASSES, info)
    return Path(out)
