"""Comparison with herculens and caustics, independent differentiable codes; skipped where they are not installed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.simulators import caustics_counts, make_caustics, make_herculens
from gravlens_jax.lensing import profiles
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.lensing.render import render_lenses, sample_lens

PRIORS = replace(PRIORS["ct1"], subhalo_poisson=False, subhalo_padding=25)
CENTRES, STRENGTHS = np.array([[0.3, -0.2], [0.0, 0.5]]), np.array([0.04, 0.01])
pytestmark = pytest.mark.filterwarnings("ignore")  # of other codes


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):  # as caustics needs it
        yield


@pytest.fixture
def lenses():
    sample = partial(sample_lens, priors=PRIORS, substructure="sphere")
    return jax.tree.map(lambda x: x.astype(float), jax.vmap(sample)(jax.random.split(jax.random.key(0), 3)))


def assert_images_agree(expected, found):
    inside = np.s_[:, 8:-8, 8:-8]  # where light from outside of the field does not reach
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5 * expected.max())


def our_deflections(x, y):
    parts = profiles.deflect_sis(x, y, 1.2), profiles.deflect_shear(x, y, 0.2, 0.3)
    return np.sum([*parts, profiles.deflect_points(x, y, CENTRES, STRENGTHS)], axis=0)


def test_herculens_makes_the_same_images_and_deflections(lenses, monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # `make_herculens` replaces it
    pytest.importorskip("herculens", exc_type=ImportError)
    found = jax.jit(jax.vmap(make_herculens(PRIORS)))(lenses)
    assert_images_agree(jax.jit(render_lenses, static_argnames="priors")(lenses, priors=PRIORS), found)

    from herculens.MassModel.mass_model import MassModel

    x, y = profiles.pixel_grid(150, 0.05)
    keywords = [{"theta_E": 1.2, "center_x": 0.0, "center_y": 0.0}]
    keywords.append({"gamma1": 0.2 * np.cos(0.6), "gamma2": 0.2 * np.sin(0.6), "ra_0": 0.0, "dec_0": 0.0})
    for strength, (cx, cy) in zip(STRENGTHS, CENTRES, strict=True):
        keywords.append({"theta_E": np.sqrt(strength), "center_x": cx, "center_y": cy})
    expected = MassModel(["SIS", "SHEAR", "POINT_MASS", "POINT_MASS"]).alpha(x.ravel(), y.ravel(), keywords)
    np.testing.assert_allclose(our_deflections(x, y).reshape(2, -1), expected, atol=5e-6)


def test_caustics_makes_the_same_images_and_deflections(lenses, monkeypatch):
    monkeypatch.setenv("CASKADE_BACKEND", "jax")
    caustics = pytest.importorskip("caustics", exc_type=ImportError)
    render, parameters = make_caustics(PRIORS, "jax", lenses)
    found = caustics_counts(jax.jit(jax.vmap(render))(jnp.asarray(parameters)), PRIORS)
    assert_images_agree(jax.jit(render_lenses, static_argnames="priors")(lenses, priors=PRIORS), found)

    x, y = profiles.pixel_grid(150, 0.05)
    cosmology = caustics.FlatLambdaCDM(name="c")
    options = {"cosmology": cosmology, "z_l": 0.5, "z_s": 1.0}
    models = [caustics.SIS(x0=0.0, y0=0.0, Rein=1.2, **options)]
    shear = {"gamma_1": 0.2 * np.cos(0.6), "gamma_2": 0.2 * np.sin(0.6)}
    models.append(caustics.ExternalShear(x0=0.0, y0=0.0, **shear, **options))
    for strength, (cx, cy) in zip(STRENGTHS, CENTRES, strict=True):
        models.append(caustics.Point(x0=cx, y0=cy, Rein=np.sqrt(strength), **options))
    expected = np.sum([model.reduced_deflection_angle(x, y) for model in models], axis=0)
    np.testing.assert_allclose(our_deflections(x, y), expected, atol=5e-6)
