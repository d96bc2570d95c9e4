"""Comparison with independent codes, above all lenstronomy (Birrer & Amara 2018); skipped if one is not installed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.simulators import ellipticity, lenstronomy_image, make_herculens
from gravlens_jax.config import CLASSES
from gravlens_jax.lensing import PRIORS, profiles, render_lens, render_lenses, sample_lens

pytestmark = pytest.mark.filterwarnings("ignore")  # of other codes
render = jax.jit(render_lens, static_argnames="priors")


def deflect_point(x, y):
    return profiles.deflect_points(x, y, jnp.array([[0.31, -0.42]]), jnp.array([0.2**2]))


@pytest.mark.parametrize(
    "function, arguments, model, keywords",
    [
        (profiles.deflect_sis, (1.3,), "SIS", {"theta_E": 1.3}),
        (profiles.deflect_sie, (1.3, 0.8, 0.3), "SIE", {"theta_E": 1.3} | ellipticity(0.8, 0.3)),
        (profiles.deflect_sie, (1.3, 0.3, -1.0), "SIE", {"theta_E": 1.3} | ellipticity(0.3, -1.0)),
        (profiles.deflect_shear, (0.2, 0.4), "SHEAR", {"gamma1": 0.2 * np.cos(0.8), "gamma2": 0.2 * np.sin(0.8)}),
        (deflect_point, (), "POINT_MASS", {"theta_E": 0.2, "center_x": 0.31, "center_y": -0.42}),
    ],
)
def test_deflections_agree_to_1e_6_arcsec(function, arguments, model, keywords):
    lens_model = pytest.importorskip("lenstronomy.LensModel.lens_model", exc_type=ImportError)
    with jax.enable_x64(True):
        x, y = profiles.pixel_grid(150, 0.05)
        expected = lens_model.LensModel([model]).alpha(np.ravel(x), np.ravel(y), [keywords])
        np.testing.assert_allclose([np.ravel(a) for a in function(x, y, *arguments)], expected, atol=1e-6)


@pytest.mark.parametrize("preset", ["ct1", "deeplensesim_i"])
@pytest.mark.parametrize("substructure", CLASSES)
def test_whole_images_agree_to_1_percent_of_the_peak(preset, substructure):
    pytest.importorskip("lenstronomy", exc_type=ImportError)
    priors = PRIORS[preset]
    p = sample_lens(jax.random.key(0), priors, substructure)
    expected = lenstronomy_image(p, priors, string_points=300)
    difference = np.sort(np.abs(render(p, priors) - expected).ravel())
    # Rays that almost hit a point mass differ by rounding: 99.5 % of the pixels must agree.
    worst = difference[-1] if substructure == "no" else difference[int(0.995 * difference.size)]
    assert worst < 0.01 * expected.max()


def test_whole_images_of_herculens_agree_to_1e_5_of_the_peak(monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # `make_herculens` replaces it
    pytest.importorskip("herculens", exc_type=ImportError)
    priors = replace(PRIORS["ct1"], subhalo_poisson=False, subhalo_padding=25)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):  # as herculens needs it
        sample = partial(sample_lens, priors=priors, substructure="sphere")
        lenses = jax.vmap(sample)(jax.random.split(jax.random.key(0), 3))
        lenses = jax.tree.map(lambda x: x.astype(float), lenses)
        found = jax.jit(jax.vmap(make_herculens(priors)))(lenses)
        expected = jax.jit(render_lenses, static_argnames="priors")(lenses, priors=priors)
    inside = np.s_[:, 8:-8, 8:-8]  # where light from outside of the field does not reach
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5 * expected.max())
