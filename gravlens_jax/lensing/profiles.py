"""Deflections of lens profiles, light of the source, and the camera: pure functions.

Angles on the sky are in arcsec, orientations in radians counter-clockwise from +x, masses in solar masses. Every
function works on float arrays `x`, `y` of one shape (the rays) and scalar parameters; `jax.vmap` makes batches of them.
The source position of a ray is its image position minus the sum of all deflections.

Equations: Narayan & Bartelmann, astro-ph/9606001 (isothermal sphere, point mass); Keeton, astro-ph/0102341 (shear);
Ciotti & Bertin 1999, A&A 352, 447 (Sersic b_n).
"""

import math
import operator
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

SPEED_OF_LIGHT_KM_S = 299792.458
# 4 G M_sun / (c^2 Mpc) in arcsec^2: theta_E^2 of one solar mass at a distance ratio of 1 / Mpc.
FOUR_G_OVER_C2_ARCSEC2_MPC = 4 * 4.30091727e-9 / SPEED_OF_LIGHT_KM_S**2 * math.degrees(3600) ** 2
# Distances smaller than this are kept away from 0 (arcsec): gradients stay finite at a profile's centre.
SOFTENING = 1e-6
POINTS_PER_PASS = 4  # point masses that are added in one pass over the rays

Pair = tuple[jax.Array, jax.Array]
Number = jax.Array | float  # a scalar or, where arrays are meant, an array


def pixel_grid(num_pixels: int, pixel_scale: float, supersampling: int = 1, dtype: DTypeLike = float) -> Pair:
    """Returns x, y of all (sub-)pixels, float (n, n) with n = num_pixels * supersampling, arcsec.

    The field's centre is at the origin, row 0 at +y. `pixel_scale` is in arcsec; `dtype` float is JAX's default.
    """
    n = num_pixels * supersampling
    centres = (jnp.arange(n, dtype=dtype) - (n - 1) / 2) * (pixel_scale / supersampling)
    x, y = jnp.meshgrid(centres, -centres)
    return x, y


def luminosity_distance(z: Number, hubble: float = 70.0, omega_m: float = 0.3) -> jax.Array:
    """Returns the luminosity distance in Mpc at redshift `z` (any shape) in a flat LambdaCDM cosmology.

    The integral of c / H(z) is taken with 16 Gauss-Legendre nodes (relative error below 1e-12 for z < 2).
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    z = jnp.asarray(z)
    dtype = jnp.promote_types(z.dtype, jnp.float32)  # also where JAX's default is float64
    nodes, weights = (nodes + 1).astype(dtype), weights.astype(dtype)
    redshifts = z[..., None] * nodes / 2
    inverse_e = 1 / jnp.sqrt(omega_m * (1 + redshifts) ** 3 + 1 - omega_m)
    comoving = SPEED_OF_LIGHT_KM_S / hubble * z / 2 * jnp.sum(weights * inverse_e, axis=-1)
    return (1 + z) * comoving


def einstein_radius_squared(mass: Number, z_lens: Number, z_source: Number) -> jax.Array:
    """Returns theta_E^2 in arcsec^2 of `mass` (solar masses); it is linear in mass.

    Distances are luminosity distances and D_LS = D_S - D_L, as in the code that made the public images; the textbook
    value has angular-diameter distances. 1e12 at redshifts 0.5 and 1.0 gives 1.28145^2.
    """
    d_lens, d_source = luminosity_distance(z_lens), luminosity_distance(z_source)
    return FOUR_G_OVER_C2_ARCSEC2_MPC * mass * (d_source - d_lens) / (d_lens * d_source)


def deflect_sis(x: jax.Array, y: jax.Array, theta_E: Number) -> Pair:
    """Returns the deflection theta_E (x, y) / r of a singular isothermal sphere at the origin."""
    k = theta_E * jax.lax.rsqrt(x * x + y * y + SOFTENING**2)
    return k * x, k * y


def deflect_sie(x: jax.Array, y: jax.Array, theta_E: Number, axis_ratio: Number, angle: Number) -> Pair:
    """Returns the deflection of a singular isothermal ellipsoid at the origin.

    With the major axis along x, psi^2 = q^2 x^2 + y^2 and f^2 = 1 - q^2:
    theta_E sqrt(q) / f (atan(f x / psi), atanh(f y / psi)). Kormann, Schneider & Bartelmann 1994, A&A 284, 285.
    `axis_ratio` is q, minor over major axis, in (0, 1]; 1 is `deflect_sis`. `angle` is that of the major axis.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    f_squared = 1 - axis_ratio**2
    psi = jnp.sqrt(axis_ratio**2 * u * u + v * v + SOFTENING**2)
    # atan(f t) / f and atanh(f t) / f are smooth in f^2, through f = 0: written as t times a function of (f t)^2.
    k = theta_E * jnp.sqrt(axis_ratio) / psi
    along = k * u * _arc_over_argument(f_squared * (u / psi) ** 2, jnp.arctan, -1)
    across = k * v * _arc_over_argument(f_squared * (v / psi) ** 2, jnp.arctanh, 1)
    return cos * along - sin * across, sin * along + cos * across


def _arc_over_argument(s: jax.Array, function: Callable, sign: int) -> jax.Array:
    """Returns function(sqrt(s)) / sqrt(s), by its series 1 + sign s / 3 + s^2 / 5 + sign s^3 / 7 where s is small."""
    small = s < 1e-3
    root = jnp.sqrt(jnp.where(small, 1e-3, s))
    return jnp.where(small, 1 + sign * s / 3 + s**2 / 5 + sign * s**3 / 7, function(root) / root)


def deflect_shear(x: jax.Array, y: jax.Array, gamma: Number, phi: Number) -> Pair:
    """Returns the deflection of an external shear of strength `gamma` along the direction `phi` (radians)."""
    g1, g2 = gamma * jnp.cos(2 * phi), gamma * jnp.sin(2 * phi)
    return g1 * x + g2 * y, g2 * x - g1 * y


def deflect_points(
    x: jax.Array, y: jax.Array, centres: jax.Array, theta_E_squared: jax.Array, softening: float = SOFTENING
) -> Pair:
    """Returns the summed deflection of point masses, theta_E^2 (x, y) / (r^2 + softening^2) each.

    `centres` are float (n, 2), x and y of each mass; `theta_E_squared` float (n,), arcsec^2, 0 for padding.
    """
    padding = -len(theta_E_squared) % POINTS_PER_PASS
    centres, strengths = jnp.pad(centres, ((0, padding), (0, 0))), jnp.pad(theta_E_squared, (0, padding))
    groups = centres.reshape(-1, POINTS_PER_PASS, 2), strengths.reshape(-1, POINTS_PER_PASS)

    def add(alpha, group):
        return _add_points(alpha, x, y, *group, softening), None

    # A scan keeps one pair of arrays in the cache: on a CPU 5 times faster than one fused sum over all masses.
    return jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(y)), groups)[0]


def _add_all_points(alpha, x, y, centres, strengths, softening):
    for (cx, cy), strength in zip(centres, strengths, strict=True):
        dx, dy = x - cx, y - cy
        k = strength / (dx * dx + dy * dy + softening**2)
        alpha = alpha[0] + k * dx, alpha[1] + k * dy
    return alpha


@jax.custom_jvp
def _add_points(alpha, x, y, centres, strengths, softening):
    # Skips groups of padding, except where `jax.vmap` turns the choice into a selection.
    operands = alpha, x, y, centres, strengths, softening
    return jax.lax.cond(jnp.any(strengths != 0), _add_all_points, lambda alpha, *_: alpha, *operands)


@_add_points.defjvp
def _differentiate_points(primals, tangents):
    return jax.jvp(_add_all_points, primals, tangents)  # also of padding: a mass of 0 has a derivative


def deflect_string(
    x: jax.Array,
    y: jax.Array,
    centre: jax.Array,
    angle: Number,
    length: Number,
    theta_E_squared: Number,
    softening: float = SOFTENING,
) -> Pair:
    """Returns the deflection of a straight string of uniform density: the point-mass kernel integrated along it.

    `centre` is float (2,), `angle` the direction, `length` from end to end; `theta_E_squared`, arcsec^2, is that of the
    whole mass, `softening` that of the point masses that make up the string.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    dx, dy = x - centre[0], y - centre[1]
    u, w = cos * dx + sin * dy, cos * dy - sin * dx
    squared = w * w + softening**2
    distance = jnp.sqrt(squared)
    head, tail = u + length / 2, u - length / 2
    along = theta_E_squared / (2 * length) * jnp.log((head * head + squared) / (tail * tail + squared))
    angle_seen = math.pi / 2 - jnp.arctan((squared + head * tail) / (length * distance))  # from end to end
    across = theta_E_squared / length * w / distance * angle_seen
    return cos * along - sin * across, sin * along + cos * across


def sersic_b(n: Number) -> Number:
    """Returns b_n of the Sersic index `n` (Ciotti & Bertin 1999, A&A 352, 447, eq. 18)."""
    return 2 * n - 1 / 3 + 4 / (405 * n) + 46 / (25515 * n**2) + 131 / (1148175 * n**3)


def sersic_light(
    x: jax.Array, y: jax.Array, n: Number, effective_radius: Number, axis_ratio: Number, angle: Number
) -> jax.Array:
    """Returns the surface brightness of an elliptical Sersic profile at the origin, 1 at the effective radius.

    `n` is the Sersic index, 0.5 to 10; `effective_radius` the half-light radius of the circle of equal area;
    `axis_ratio` minor over major axis, in (0, 1]; `angle` the direction of the major axis.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    radius_squared = axis_ratio * u * u + v * v / axis_ratio + SOFTENING**2
    # exp(log) is 3 times as fast as a power on a CPU, and as exact to float32 rounding.
    power = jnp.exp(jnp.log(radius_squared / effective_radius**2) / (2 * n))
    return jnp.exp(-sersic_b(n) * (power - 1))


def bin_pixels(image: jax.Array, factor: int) -> jax.Array:
    """Averages blocks of `factor` x `factor` pixels: (n, m) -> (n / factor, m / factor)."""
    # Sums of slices, because XLA vectorizes them on a CPU, but not a mean.
    rows = reduce(operator.add, (image[i::factor] for i in range(factor)))
    return reduce(operator.add, (rows[:, i::factor] for i in range(factor))) / factor**2


def psf_kernel(sigma: float, size: int) -> np.ndarray:
    """Returns one factor of a separable Gaussian, normalized, float64 (size,); `sigma` and odd `size` in pixels."""
    half = size // 2
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    return kernel / kernel.sum()


def blur(image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """Convolves an image with the outer product of `kernel` (size,): (height, width) loses size - 1 in both."""
    half, (height, width) = len(kernel) // 2, image.shape
    # The padding is not needed, but XLA fuses loops through slices alone: on a CPU 12 times slower for a string.
    padded = jnp.pad(image, ((half, half), (0, 0)))
    image = reduce(operator.add, (k * padded[i : i + height] for i, k in enumerate(kernel.tolist())))
    padded = jnp.pad(image, ((0, 0), (half, half)))
    image = reduce(operator.add, (k * padded[:, i : i + width] for i, k in enumerate(kernel.tolist())))
    return image[half : height - half, half : width - half]
