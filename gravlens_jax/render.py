"""One lens: parameters drawn from priors, and the image that they make. Pure.

p = sample_lens(jax.random.key(0), PRESETS["ct1"], "vort")  # the parameters of one lens
counts = render_lens(p, PRESETS["ct1"])                     # its expected photon counts, differentiable in p
"""

from math import pi

import jax
import jax.numpy as jnp

from gravlens_jax import lens
from gravlens_jax.priors import Priors


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
        number: jax.Array | int = jax.random.poisson(next(keys), priors.subhalo_number)
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
