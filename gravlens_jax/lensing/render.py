"""One lens: its parameters, drawn from priors, and its expected image. Pure functions.

p = sample_lens(jax.random.key(0), PRIORS["ct1"], "vort")  # the parameters of one lens
counts = render_lens(p, PRIORS["ct1"])                     # its expected photon counts, differentiable in p
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import pi
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gravlens_jax.config import CLASSES
from gravlens_jax.errors import check
from gravlens_jax.lensing import profiles
from gravlens_jax.lensing.noise import poisson
from gravlens_jax.lensing.priors import Priors

LensParams = dict[str, jax.Array]  # a result of `sample_lens`


class Grid(NamedTuple):
    """Cells of a `deflection_map`, around the lens's centre; row 0 is at +y."""

    cells: int  # height and width
    width: float  # of a cell, arcsec
    shift: float = 0.0  # of all cells toward -x and +y, arcsec


SOURCE = ("source", "source_radius", "source_axis_ratio", "source_angle")  # names of `render_lens`
SMOOTH = ("z_lens", "z_source", "theta_E", "shear", "shear_angle", *SOURCE)
SUBHALOS = ("subhalo_masses", "subhalo_centres")
VORTEX = ("vortex_mass", "vortex_angle", "vortex_length", "vortex_centre")
OPTIONAL = ("halo_mass", "lens_axis_ratio", "lens_angle", "lens_centre")
PAIRS = ("source", "vortex_centre", "lens_centre")  # of x and y


def sample_lens(key: jax.Array, priors: Priors, substructure: str) -> LensParams:
    """Returns the parameters of one lens, in arcsec, radians and solar masses; `substructure` is one of CLASSES.

    They are float32 scalars z_lens, z_source, halo_mass, theta_E (of the main halo), shear, shear_angle, source_radius,
    source_axis_ratio, source_angle, and source (2,); for "sphere" also subhalo_centres (padding, 2) and subhalo_masses
    (padding,), padded with 0; for "vort" also vortex_mass, vortex_angle, vortex_length and vortex_centre (2,).
    """
    check(substructure in CLASSES, f"substructure={substructure!r}: expected one of {', '.join(CLASSES)}")
    *most_keys, last_key = jax.random.split(key, 16)
    keys = iter(most_keys)
    p = {name: _uniform(next(keys), priors, name) for name in ("z_lens", "z_source", "shear", "shear_angle")}
    if priors.source_in_square:
        p["source"] = _uniform(next(keys), priors, "source_offset", (2,))
    else:
        p["source"] = _position(_uniform(next(keys), priors, "source_offset"), _angle(next(keys)))
    p |= {name: _uniform(next(keys), priors, name) for name in ("source_axis_ratio", "source_angle")}
    p["source_radius"] = _uniform(last_key, priors, "source_radius")
    substructure_mass = jnp.float32(0)
    if substructure == "sphere":
        p |= _sample_subhalos(keys, priors)
        substructure_mass = p["subhalo_masses"].sum()
    elif substructure == "vort":
        p |= _sample_vortex(keys, priors)
        substructure_mass = p["vortex_mass"]
    p["halo_mass"] = priors.mass - substructure_mass * priors.mass_includes_substructure
    p["theta_E"] = jnp.sqrt(profiles.einstein_radius_squared(p["halo_mass"], p["z_lens"], p["z_source"]))
    return p


def _uniform(key: jax.Array, priors: Priors, name: str, shape: tuple[int, ...] = ()) -> jax.Array:
    low, high = getattr(priors, f"{name}_min"), getattr(priors, f"{name}_max")
    return jax.random.uniform(key, shape, jnp.float32, low, high)


def _angle(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, 0, 2 * pi)


def _position(radius: jax.Array, angle: jax.Array) -> jax.Array:
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _sample_subhalos(keys: Iterator[jax.Array], priors: Priors) -> LensParams:
    number: jax.Array | int = poisson(next(keys)[None], jnp.float32([priors.subhalo_number]), priors.subhalo_number)[0]
    if not priors.subhalo_poisson:
        number = round(priors.subhalo_number)
    shape = (priors.subhalo_padding,)
    power = 1 + priors.subhalo_slope  # the cumulative distribution is linear in mass^power
    low, high = priors.subhalo_mass_min**power, priors.subhalo_mass_max**power
    masses = (low + jax.random.uniform(next(keys), shape, jnp.float32) * (high - low)) ** (1 / power)
    radius, angle = _uniform(next(keys), priors, "subhalo_offset", shape), _angle(next(keys), shape)
    return {
        "subhalo_masses": jnp.where(jnp.arange(priors.subhalo_padding) < number, masses, 0),
        "subhalo_centres": _position(radius, angle),
    }


def _sample_vortex(keys: Iterator[jax.Array], priors: Priors) -> LensParams:
    p = {
        "vortex_mass": priors.mass * _uniform(next(keys), priors, "vortex_mass_fraction"),
        "vortex_centre": priors.vortex_centre_sigma * jax.random.normal(next(keys), (2,), jnp.float32),
        "vortex_angle": _angle(next(keys)),
        "vortex_length": _uniform(next(keys), priors, "vortex_length"),
    }
    if priors.vortex_length_log:
        low, high = priors.vortex_length_min, priors.vortex_length_max
        p["vortex_length"] = low * (high / low) ** ((p["vortex_length"] - low) / (high - low))
    return p


def deflect_substructure(
    x: jax.Array, y: jax.Array, lens_params: LensParams, softening: float = profiles.SOFTENING
) -> profiles.Pair:
    """Returns the deflection (arcsec) by the subhalos and the vortex, `softening` of their point masses; 0 without."""
    p, alpha = lens_params, (jnp.zeros_like(x), jnp.zeros_like(y))
    if "subhalo_masses" in p:
        strengths = profiles.einstein_radius_squared(p["subhalo_masses"], p["z_lens"], p["z_source"])
        alpha = profiles.deflect_points(x, y, p["subhalo_centres"], strengths, softening)
    if "vortex_mass" in p:
        strength = profiles.einstein_radius_squared(p["vortex_mass"], p["z_lens"], p["z_source"])
        shape = (p["vortex_centre"], p["vortex_angle"], p["vortex_length"])
        string = profiles.deflect_string(x, y, *shape, strength, softening)
        alpha = alpha[0] + string[0], alpha[1] + string[1]
    return alpha


def deflection_map(lens_params: LensParams, priors: Priors, grid: Grid) -> jax.Array:
    """Returns the deflection minus that of a smooth lens of equal mass, on a coarse grid: float32 (cells, cells, 2).

    The smooth lens has the same redshifts and `priors.mass` in its main halo, so the map is 0 for a lens without
    substructure. (The preset "deeplensesim_i" adds the substructure to that mass: its maps are those of the
    substructure alone.) Arcsec; the last axis is x and y. Point masses are softened by 3/8 of a cell.
    """
    p = lens_params
    x, y = profiles.pixel_grid(grid.cells, grid.width, dtype=jnp.float32)
    x, y = x - grid.shift, y + grid.shift
    smooth = jnp.sqrt(profiles.einstein_radius_squared(priors.mass, p["z_lens"], p["z_source"]))
    halo = _deflect_halo(x, y, p["theta_E"] - smooth, p, priors)  # linear in theta_E
    substructure = deflect_substructure(x, y, p, softening=0.375 * grid.width)
    return jnp.stack([a + b for a, b in zip(halo, substructure, strict=True)], axis=-1)


def render_lens(lens_params: Mapping[str, Any], priors: Priors) -> jax.Array:
    """Returns the expected photon counts per pixel of one lens, float32 (num_pixels, num_pixels), sky included.

    For many `sphere` lenses on a CPU, `render_lenses` or `images.render_images` is faster than `jax.vmap` of this.

    Of `priors` only the camera and the source's fixed profile are used, and its `lens_axis_ratio` if the lens has none.
    `lens_params` are a result of `sample_lens`, or numbers and tuples under the same names; halo_mass is not used.
    Optional are lens_axis_ratio, lens_angle (radians) and lens_centre (2,), those of the main halo. Values that cannot
    be rendered give NaN. InputError for names that are missing or unknown, or arrays of other shapes.
    """
    p = _as_arrays(lens_params)
    # An odd number of sub-pixels would put a ray on the singular centre of the halo.
    supersampling = priors.supersampling + priors.num_pixels * priors.supersampling % 2
    field = priors.num_pixels + priors.psf_size - 1  # light from outside of the image reaches its border
    dtype = jnp.result_type(jnp.float32, *p.values())  # float32, unless a parameter has more bits
    x, y = profiles.pixel_grid(field, priors.pixel_scale, supersampling, dtype)
    halo = _deflect_halo(x, y, p["theta_E"], p, priors)
    shear = profiles.deflect_shear(x, y, p["shear"], p["shear_angle"])
    substructure = deflect_substructure(x, y, p)
    beta_x = x - halo[0] - shear[0] - substructure[0] - p["source"][0]
    beta_y = y - halo[1] - shear[1] - substructure[1] - p["source"][1]
    shape = (p["source_radius"], p["source_axis_ratio"], p["source_angle"])
    light = profiles.sersic_light(beta_x, beta_y, priors.source_n, *shape)
    image = profiles.bin_pixels(light, supersampling)
    image = profiles.blur(image, profiles.psf_kernel(priors.psf_sigma / priors.pixel_scale, priors.psf_size))
    return priors.photons * (image + priors.sky)


def _as_arrays(lens_params: Mapping[str, Any]) -> LensParams:
    """Returns the parameters of one lens as arrays; InputError unless their names and shapes belong together."""
    p = {name: jnp.asarray(x, None if hasattr(x, "dtype") else jnp.float32) for name, x in lens_params.items()}
    groups = [group for group in (SUBHALOS, VORTEX) if p.keys() & set(group)]
    needed = {name for group in (SMOOTH, *groups) for name in group}
    check(needed <= p.keys(), f"lens_params lack {', '.join(sorted(needed - p.keys()))}")
    unknown = ", ".join(sorted(p.keys() - needed - set(OPTIONAL)))
    check(not unknown, f"lens_params have unknown names {unknown}; expected {', '.join(sorted(needed | {*OPTIONAL}))}")
    n = len(p["subhalo_masses"]) if SUBHALOS in groups and p["subhalo_masses"].ndim == 1 else 0
    shapes = {"subhalo_masses": (n,), "subhalo_centres": (n, 2)} | dict.fromkeys(PAIRS, (2,))
    for name, value in p.items():
        expected = shapes.get(name, ())
        check(value.shape == expected, f"{name} has shape {value.shape}, expected {expected}")
    return p


def render_lenses(lens_params: LensParams, priors: Priors) -> jax.Array:
    """Returns `render_lens` of n lenses of one class, float32 (n, num_pixels, num_pixels), equal to rounding.

    The same as `jax.vmap` of `render_lens`, but twice as fast for `sphere` lenses on a CPU, of which it uses one core;
    `images.render_images` uses all. Each array of `lens_params` has a leading axis of length n.
    """
    render = partial(render_lens, priors=priors)
    if "vortex_mass" in lens_params:  # XLA's loops on CPUs compute an arctangent without vector instructions
        return jax.vmap(render)(lens_params)
    # The rays of one lens fit in a CPU's cache, and padding of its subhalos can be skipped.
    return jax.lax.platform_dependent(lens_params, cpu=partial(jax.lax.map, render), default=jax.vmap(render))


def _deflect_halo(x: jax.Array, y: jax.Array, theta_E: jax.Array, p: LensParams, priors: Priors) -> profiles.Pair:
    if "lens_centre" in p:
        x, y = x - p["lens_centre"][0], y - p["lens_centre"][1]
    axis_ratio, angle = p.get("lens_axis_ratio", priors.lens_axis_ratio), p.get("lens_angle", 0.0)
    if "lens_axis_ratio" not in p and priors.lens_axis_ratio == 1:
        return profiles.deflect_sis(x, y, theta_E)
    return profiles.deflect_sie(x, y, theta_E, axis_ratio, angle)


def significance(lens_params: LensParams, priors: Priors) -> jax.Array:
    """Returns the detection significance of the substructure, in standard deviations of the photon noise, float32 ().

    After a refit of every smooth parameter: theta_E, shear, the source's position, axis ratio and angle, and its radius
    if the priors leave it free. The imprint of the substructure, minus that of the same mass in the halo, is divided by
    the noise of each pixel; what remains after a least-squares fit of its derivatives in the smooth parameters is the
    significance. It is 0 for a lens without substructure. For vmap over lenses of one class.
    """
    p = _as_arrays(lens_params)
    smooth = {name: value for name, value in p.items() if name in SMOOTH or name in OPTIONAL}
    theta_E = jnp.sqrt(profiles.einstein_radius_squared(priors.mass, p["z_lens"], p["z_source"]))
    ellipticity = (1 - p["source_axis_ratio"]) / (1 + p["source_axis_ratio"])
    shear, shape = _components(p["shear"], p["shear_angle"]), _components(ellipticity, p["source_angle"])
    start = jnp.hstack([theta_E, shear, p["source"], shape, p["source_radius"]])

    def render_smooth(values):
        (shear, shear_angle), (ellipticity, source_angle) = _polar(values[1:3]), _polar(values[5:7])
        fitted = {"theta_E": values[0], "shear": shear, "shear_angle": shear_angle, "source": values[3:5]}
        fitted |= {"source_axis_ratio": (1 - ellipticity) / (1 + ellipticity), "source_angle": source_angle}
        return render_lens(smooth | fitted | {"source_radius": values[7]}, priors)

    expected = render_lens(p, priors)
    noise = jnp.sqrt(expected).ravel()
    imprint = (expected - render_smooth(start)).ravel() / noise
    jacobian = jax.jacfwd(render_smooth)(start).reshape(-1, len(start)) / noise[:, None]
    basis, _ = jnp.linalg.qr(jacobian if priors.source_radius_min < priors.source_radius_max else jacobian[:, :-1])
    for _ in range(2):  # the second time removes what float32 has left
        imprint -= basis @ (basis.T @ imprint)
    return jnp.linalg.norm(imprint)


def _components(length: jax.Array, angle: jax.Array) -> jax.Array:
    """Returns the components of a shear or an ellipticity, a little off 0, where its angle has no derivative."""
    return jnp.maximum(length, 1e-3) * jnp.stack([jnp.cos(2 * angle), jnp.sin(2 * angle)])


def _polar(components: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.hypot(components[0], components[1]), jnp.arctan2(components[1], components[0]) / 2
