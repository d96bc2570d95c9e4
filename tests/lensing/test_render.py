from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

from gravlens_jax.config import CLASSES
from gravlens_jax.lensing import PRIORS, render_images, render_lens, render_lenses, sample_lens, significance
from gravlens_jax.lensing.images import MAX_COUNTS
from gravlens_jax.lensing.profiles import deflect_sis, einstein_radius_squared, pixel_grid
from gravlens_jax.lensing.render import Grid, deflect_substructure, deflection_map
from helpers import refuse

CT1 = PRIORS["ct1"]
SMALL = replace(CT1, num_pixels=12, pixel_scale=0.5, psf_pixels=3)
render = jax.jit(render_lenses, static_argnames="priors")


@cache
def sample_lenses(substructure, priors=CT1):
    """Returns the parameters of 4000 lenses."""
    keys = jax.random.split(jax.random.key(0), 4000)
    sample = jax.vmap(lambda key: sample_lens(key, priors, substructure))  # without jit, all priors share programs
    return {name: np.asarray(values) for name, values in sample(keys).items()}


def take(lenses, rows):
    return {name: values[rows] for name, values in lenses.items()}


@pytest.mark.parametrize("substructure", CLASSES)
def test_parameters_are_uniform_within_the_priors(substructure):
    p = sample_lenses(substructure)
    for name in ("z_lens", "z_source", "shear", "shear_angle", "source_axis_ratio", "source_angle"):
        low, high = getattr(CT1, f"{name}_min"), getattr(CT1, f"{name}_max")
        assert low <= p[name].min() and p[name].max() <= high
        assert np.mean(p[name]) == pytest.approx((low + high) / 2, abs=4 * (high - low) / np.sqrt(12 * 4000))
    assert np.hypot(*p["source"].T).max() <= 0.5


def test_subhalos_have_poisson_numbers_and_power_law_masses():
    p = sample_lenses("sphere")
    number = (p["subhalo_masses"] > 0).sum(1)
    assert np.mean(number) == pytest.approx(25, abs=0.4) and np.var(number) == pytest.approx(25, abs=3)
    masses = p["subhalo_masses"][p["subhalo_masses"] > 0]
    assert masses.min() >= 0.999e6 and masses.max() <= 1.001e10
    uniform = (masses**0.1 - 1e6**0.1) / (1e10**0.1 - 1e6**0.1)
    np.testing.assert_allclose(np.histogram(uniform, 10, (0, 1))[0] / len(masses), 0.1, atol=0.008)
    assert np.mean(1 - p["halo_mass"] / 1e12) == pytest.approx(0.038, abs=0.001)
    np.testing.assert_allclose(p["halo_mass"] + p["subhalo_masses"].sum(1), 1e12, rtol=1e-6)


def test_vortices_and_einstein_radii_have_the_known_sizes():
    p = sample_lenses("vort")
    np.testing.assert_allclose(p["halo_mass"] + p["vortex_mass"], 1e12, rtol=1e-6)
    assert p["vortex_length"].min() >= 1 and p["vortex_length"].max() <= 4
    quantiles = np.quantile(sample_lenses("no")["theta_E"], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    np.testing.assert_allclose(quantiles, [0.83, 0.99, 1.15, 1.28, 1.42, 1.56, 1.66], atol=0.015)


@pytest.mark.parametrize("preset", PRIORS)
@pytest.mark.parametrize("substructure", CLASSES)
def test_every_preset_renders_finite_images(preset, substructure):
    priors = replace(PRIORS[preset], num_pixels=40)
    rendered = render(take(sample_lenses(substructure, PRIORS[preset]), slice(50)), priors)
    assert np.isfinite(rendered).all() and rendered.min() >= priors.photons * priors.sky * 0.999
    assert rendered.max() < MAX_COUNTS


@pytest.mark.parametrize("substructure", CLASSES)
def test_image_is_differentiable_and_does_not_depend_on_the_other_lenses(substructure):
    @jax.jit
    def render_and_differentiate(lenses):
        alone, vjp = jax.vjp(partial(render_lens, priors=SMALL), take(lenses, 1))
        return render_lenses(lenses, SMALL)[1], alone, *vjp(jnp.ones_like(alone))

    lenses = take(sample_lenses(substructure), slice(5))
    together, alone, gradients = render_and_differentiate(lenses)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    on_all_cores = render_images(lenses, SMALL)
    assert on_all_cores.shape == (5, 12, 12)
    np.testing.assert_allclose(on_all_cores[1], alone, rtol=1e-4)
    np.testing.assert_allclose(on_all_cores[4], render_images(take(lenses, slice(4, None)), SMALL)[0], rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("substructure", CLASSES)
def test_deflection_map_compares_with_a_lens_whose_whole_mass_is_in_the_halo(substructure):
    lenses, (x, y) = take(sample_lenses(substructure), slice(20)), pixel_grid(50, 0.08)
    maps = jax.vmap(lambda p: deflection_map(p, CT1, Grid(50, 0.08)))(lenses)
    assert maps.shape == (20, 50, 50, 2) and maps.dtype == np.float32

    @jax.vmap
    def expect(p):
        whole = jnp.sqrt(einstein_radius_squared(CT1.mass, p["z_lens"], p["z_source"]))
        parts = deflect_substructure(x, y, p), deflect_sis(x, y, p["theta_E"]), deflect_sis(x, y, -whole)
        return jnp.moveaxis(jnp.sum(jnp.array(parts), 0), 0, -1)

    for found, expected in zip(maps, expect(lenses), strict=True):
        size = np.median(np.abs(expected))
        difference = np.median(np.abs(found - expected))  # large only close to a point mass or string
        assert difference < 0.02 * size + 1e-6 and (size > 1e-3) == (substructure != "no")


@pytest.mark.parametrize("substructure", ["sphere", "vort"])
def test_significance_is_what_a_least_squares_fit_of_the_smooth_parameters_leaves(substructure):
    with jax.enable_x64(True):
        p = {name: np.float64(value) for name, value in take(sample_lenses(substructure), 3).items()}
        expected = np.asarray(render_lens(p, CT1))
        names = ("theta_E", "shear", "shear_angle", "source", "source_axis_ratio", "source_angle")
        smooth = {name: value for name, value in p.items() if "subhalo" not in name and "vortex" not in name}
        whole = np.sqrt(einstein_radius_squared(CT1.mass, p["z_lens"], p["z_source"]))
        start = np.hstack([(smooth | {"theta_E": whole})[name] for name in names])

        def residual(values):
            theta, shear, angle, x, y, ratio, source_angle = values
            lens = smooth | {"theta_E": theta, "shear": shear, "shear_angle": angle, "source": np.array([x, y])}
            lens |= {"source_axis_ratio": ratio, "source_angle": source_angle}
            return ((np.asarray(render_lens(lens, CT1)) - expected) / np.sqrt(expected)).ravel()

        fitted = least_squares(residual, start, x_scale=[0.1, 0.1, 1, 0.1, 0.1, 0.1, 1])
    found = significance({name: np.float32(value) for name, value in p.items()}, CT1)
    assert found == pytest.approx(np.sqrt(2 * fitted.cost), rel=0.1)  # of 300 lenses the median is 1 % larger


def test_significance_is_0_without_substructure_and_finite_for_a_round_source_without_shear():
    lenses = take(sample_lenses("no"), slice(2))
    assert np.asarray(jax.vmap(lambda p: significance(p, CT1))(lenses)).max() < 1e-3
    p = take(sample_lenses("sphere"), 0)
    plain = significance(p | {"shear": np.float32(0), "source_axis_ratio": np.float32(1)}, CT1)
    assert plain == pytest.approx(float(significance(p, CT1)), rel=0.5)


def test_light_from_outside_of_the_image_reaches_its_border():
    p = sample_lens(jax.random.key(0), CT1, "no")
    small, large = (render_lens(p, replace(CT1, num_pixels=n)) for n in (40, 60))
    np.testing.assert_allclose(small, large[10:-10, 10:-10], rtol=1e-5)


def test_odd_numbers_of_rays_miss_the_singular_centre():
    priors = replace(PRIORS["deeplensesim_i"], num_pixels=21)  # without sub-pixels
    p = sample_lens(jax.random.key(0), priors, "vort") | {"source": jnp.float32([0.05, 0.02])}

    def centre(position, priors):
        return render_lens(p | {"vortex_centre": position}, priors)[10, 10]

    fine = replace(priors, supersampling=8)
    position = jnp.float32([0.01, 0.02])
    assert centre(position, priors) == pytest.approx(float(centre(position, fine)), rel=0.1)
    steps = [(centre(position.at[0].add(h), fine)) for h in (-1e-2, 1e-2)]
    difference = float(steps[1] - steps[0]) / 2e-2
    assert jax.grad(centre)(position, priors)[0] == pytest.approx(difference, rel=0.3, abs=30)


NUMBERS = {"z_lens": 0.5, "z_source": 1.0, "theta_E": 1.2, "shear": 0.1, "shear_angle": 0.0, "source": (0.1, -0.05)}
NUMBERS |= {"source_radius": 0.5, "source_axis_ratio": 0.7, "source_angle": 0.2}


def test_lens_may_be_written_with_numbers_and_be_elliptical_and_displaced():
    sphere = render_lens(NUMBERS, SMALL)
    assert sphere.dtype == jnp.float32
    render = jax.jit(lambda change: render_lens(NUMBERS | change, SMALL))
    same = render({"lens_axis_ratio": 1.0, "lens_angle": 0.3, "lens_centre": (0.0, 0.0)})
    np.testing.assert_allclose(same, sphere, rtol=1e-4)
    moved = render({"lens_centre": (0.5, 0.0), "source": (0.6, -0.05), "shear": 0.0})
    np.testing.assert_allclose(moved[:, 1:], render({"shear": 0.0})[:, :-1], rtol=1e-4)  # by one pixel
    shape = {"lens_axis_ratio": 0.8, "lens_angle": 0.3, "lens_centre": (0.1, 0.0)}
    gradient = jax.jit(jax.grad(lambda shape: render(shape)[3, 3]))(jax.tree.map(jnp.float32, shape))
    assert all(np.isfinite(x) and x != 0 for x in jax.tree.leaves(gradient))


def test_parameters_that_do_not_belong_together_and_unknown_substructure_are_refused():
    for message, change in {
        "unknown names shear_gamma; expected halo_mass, lens_angle, .* theta_E, z_lens": {"shear_gamma": 0.1},
        "lack vortex_angle, vortex_centre, vortex_length": {"vortex_mass": 1e10},
        r"source has shape \(1,\), expected \(2,\)": {"source": (0.1,)},
        r"subhalo_centres has shape \(2, 2\), exp": {"subhalo_masses": [1e9] * 3, "subhalo_centres": [(0, 0)] * 2},
    }.items():
        refuse(message, render_lens, NUMBERS | change, SMALL)
    refuse("substructure='vortex': expected one of no", sample_lens, jax.random.key(0), CT1, "vortex")
