import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.lensing import profiles

CENTRES, STRENGTHS = np.array([[0.3, -0.2], [0.0, 0.5], [9.0, 9.0]]), np.array([0.04, 0.01, 0.0])
PROFILES = {
    "sis": lambda x, y: profiles.deflect_sis(x, y, 1.2),
    "sie": lambda x, y: profiles.deflect_sie(x, y, 1.2, 0.7, 0.4),
    "shear": lambda x, y: profiles.deflect_shear(x, y, 0.2, 0.3),
    "points": lambda x, y: profiles.deflect_points(x, y, CENTRES.astype(x.dtype), STRENGTHS.astype(x.dtype)),
    "string": lambda x, y: profiles.deflect_string(x, y, np.array([0.2, -0.1], x.dtype), 0.7, 2.0, 0.07),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_finite_gradients(function, *arguments):
    """Checks the derivatives by all arguments, float (n,) each."""
    gradients = jax.jit(jax.vmap(jax.grad(function, tuple(range(len(arguments))))))(*arguments)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", PROFILES)
def test_half_the_divergence_is_kappa(name):
    x, y = jnp.array([0.9, -0.4, 0.1]), jnp.array([0.2, 0.7, -1.1])
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda p: jnp.stack(PROFILES[name](*p)))))(jnp.stack([x, y], axis=1))
    u, v = math.cos(0.4) * x + math.sin(0.4) * y, math.cos(0.4) * y - math.sin(0.4) * x
    kappas = {"sis": 1.2 / (2 * jnp.hypot(x, y)), "sie": 1.2 / (2 * jnp.sqrt(0.7 * u**2 + v**2 / 0.7))}
    kappa = kappas.get(name, jnp.zeros(3))  # the others have no mass at these places
    np.testing.assert_allclose(jnp.trace(jacobian, axis1=1, axis2=2) / 2, kappa, atol=1e-9)


@pytest.mark.parametrize("softening", [profiles.SOFTENING, 0.15])
def test_string_is_the_sum_of_many_point_masses(softening):
    x, y = profiles.pixel_grid(6, 0.8)
    n, length, angle = 100_000, 2.0, 0.7
    along = length * ((np.arange(n) + 0.5) / n - 0.5)
    dx = np.asarray(x)[..., None] - (0.2 + along * np.cos(angle))
    dy = np.asarray(y)[..., None] - (-0.1 + along * np.sin(angle))
    k = 0.07 / n / (dx**2 + dy**2 + softening**2)
    deflection = profiles.deflect_string(x, y, np.array([0.2, -0.1]), angle, length, 0.07, softening)
    np.testing.assert_allclose(deflection, [(k * dx).sum(-1), (k * dy).sum(-1)], atol=1e-8)


@pytest.mark.parametrize("name", PROFILES)
def test_deflections_have_finite_gradients_on_and_off_the_centre(name):
    ends = 0.2 + math.cos(0.7), -0.1 + math.sin(0.7)  # of the string
    x, y = np.array([(0.0, 0.0), (0.3, -0.2), (0.2, -0.1), (1.0, 1.0), ends]).T
    assert_finite_gradients(lambda x, y: sum(PROFILES[name](x, y)), x, y)


@pytest.mark.parametrize("index", [0, 4])  # beside a mass, and in a group without any
def test_point_of_no_mass_has_the_derivative_of_any_other(index):
    centres = np.linspace([-1.0, -0.5], [1.0, 0.7], 5)

    def deflection(strength):
        strengths = jnp.zeros(5).at[1].set(0.1).at[index].set(strength)
        return profiles.deflect_points(jnp.array([0.3]), jnp.array([0.2]), centres, strengths)

    derivatives = jax.jacfwd(deflection)(0.0), jax.jacrev(deflection)(0.0)
    unit = np.array(profiles.deflect_points(np.array([0.3]), np.array([0.2]), centres[index, None], np.ones(1)))
    for found in derivatives:
        np.testing.assert_allclose(found, unit, rtol=1e-6)


def test_ellipses_have_finite_gradients_in_every_parameter_and_that_of_axis_ratio_1_is_the_sphere():
    x, y, axis_ratio = np.array(list(product([0.0, 0.3, -0.1], [0.0, 0.7], [0.2, 0.999, 1.0]))).T
    angle, size, n = np.full((3, len(x)), [[0.4], [0.5], [1.5]])
    assert_finite_gradients(lambda *p: sum(profiles.deflect_sie(*p)), x, y, size, axis_ratio, angle)
    assert_finite_gradients(profiles.sersic_light, x, y, n, size, axis_ratio, angle)
    x, y = profiles.pixel_grid(7, 0.5)
    np.testing.assert_allclose(profiles.deflect_sie(x, y, 1.2, 1.0, 0.4), PROFILES["sis"](x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROFILES)
def test_deflections_keep_the_precision_of_their_input(name):
    x, y = profiles.pixel_grid(30, 0.25)
    double, single = PROFILES[name](x, y), PROFILES[name](x.astype(jnp.float32), y.astype(jnp.float32))
    assert [a.dtype for a in (*double, *single)] == [jnp.float64] * 2 + [jnp.float32] * 2
    np.testing.assert_allclose(single, double, atol=2e-5)


def test_half_the_sersic_light_is_inside_the_effective_radius():
    x, y = profiles.pixel_grid(600, 0.02)
    light = profiles.sersic_light(x, y, 1.5, 0.5, 0.6, 0.4)
    radius = jnp.array([0.25, 0.5, 1.0])  # of the circle: the logarithm of the light is -b_n radius^(1/n) + a constant
    logs = jnp.log(profiles.sersic_light(radius, 0 * radius, 4.0, 0.5, 1.0, 0.0))
    np.testing.assert_allclose(logs - logs[1], -7.669 * ((radius / 0.5) ** 0.25 - 1), atol=1e-3)  # de Vaucouleurs
    u, v = np.cos(0.4) * x + np.sin(0.4) * y, np.cos(0.4) * y - np.sin(0.4) * x
    inside = 0.6 * u**2 + v**2 / 0.6 < 0.5**2
    assert float(light[inside].sum() / light.sum()) == pytest.approx(0.5, abs=2e-3)  # pixels on the ellipse's edge


def test_distances_and_einstein_radius_are_the_known_ones():
    # Flat LambdaCDM, H0 = 70, Om = 0.3: the textbook integral by 100,000 midpoints.
    z = (np.arange(100_000) + 0.5) / 100_000
    comoving = profiles.SPEED_OF_LIGHT_KM_S / 70 * np.mean(1 / np.sqrt(0.3 * (1 + z) ** 3 + 0.7))
    assert float(profiles.luminosity_distance(1.0)) == pytest.approx(2 * comoving, rel=1e-9)
    theta_E = math.sqrt(profiles.einstein_radius_squared(1e12, 0.5, 1.0))  # here of the public code,
    assert theta_E == pytest.approx(1.28145, abs=1e-4)  # whose constants of nature are rounded to a few 1e-5


def test_pixel_grid_has_plus_y_in_row_0_and_supersamples():
    x, y = profiles.pixel_grid(2, 1.0, 2)
    np.testing.assert_allclose(x[0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(y[:, 0], [0.75, 0.25, -0.25, -0.75])
    np.testing.assert_allclose(profiles.bin_pixels(x, 2), profiles.pixel_grid(2, 1.0)[0])


def test_blur_is_a_normalized_gaussian():
    image = jnp.zeros((41, 41)).at[20, 20].set(1.0)
    rows = np.arange(-5, 6)
    kernel = np.exp(-(rows[:, None] ** 2 + rows**2) / (2 * 1.74**2))
    expected = np.pad(kernel / kernel.sum(), 10)
    np.testing.assert_allclose(profiles.blur(image, profiles.psf_kernel(1.74, 11)), expected, atol=1e-12)
