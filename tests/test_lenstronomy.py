"""The same lenses in lenstronomy, an independent code (Birrer & Amara 2018); skipped where it is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import lens
from gravlens_jax.peers import ellipticity, lenstronomy_image
from gravlens_jax.priors import PRESETS
from gravlens_jax.render import render_lens, sample_lens

pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs
pytest.importorskip("lenstronomy", exc_type=ImportError)


@pytest.mark.parametrize(
    "ours, theirs, keywords",
    [
        (lambda x, y: lens.deflect_sis(x, y, 1.3), "SIS", {"theta_E": 1.3}),
        (lambda x, y: lens.deflect_sie(x, y, 1.3, 0.8, 0.3), "SIE", {"theta_E": 1.3} | ellipticity(0.8, 0.3)),
        (lambda x, y: lens.deflect_sie(x, y, 1.3, 0.3, -1.0), "SIE", {"theta_E": 1.3} | ellipticity(0.3, -1.0)),
        (
            lambda x, y: lens.deflect_shear(x, y, 0.2, 0.4),
            "SHEAR",
            {"gamma1": 0.2 * np.cos(0.8), "gamma2": 0.2 * np.sin(0.8)},
        ),
        (
            lambda x, y: lens.deflect_points(x, y, jnp.array([[0.31, -0.42]]), jnp.array([0.2**2])),
            "POINT_MASS",
            {"theta_E": 0.2, "center_x": 0.31, "center_y": -0.42},
        ),
    ],
)
def test_deflections_agree_to_1e_6_arcsec(ours, theirs, keywords):
    from lenstronomy.LensModel.lens_model import LensModel

    with jax.enable_x64(True):
        x, y = lens.pixel_grid(150, 0.05)
        expected = LensModel([theirs]).alpha(np.ravel(x), np.ravel(y), [keywords])
        for a, b in zip(ours(x, y), expected, strict=True):
            np.testing.assert_allclose(np.ravel(a), b, atol=1e-6)


@pytest.mark.parametrize("n, rtol", [(1.0, 1e-2), (1.5, 5e-3), (4.0, 5e-3)])
def test_sersic_agrees_to_the_accuracy_of_their_linear_b_n(n, rtol):
    from lenstronomy.LightModel.light_model import LightModel

    with jax.enable_x64(True):
        x, y = lens.pixel_grid(100, 0.02)
        keywords = {"amp": 1.0, "R_sersic": 0.5, "n_sersic": n, "center_x": 0, "center_y": 0} | ellipticity(0.6, 0.5)
        expected = LightModel(["SERSIC_ELLIPSE"]).surface_brightness(np.ravel(x), np.ravel(y), [keywords])
        ours = np.ravel(lens.sersic_light(x, y, n, 0.5, 0.6, 0.5))
        inside = np.ravel(np.hypot(x, y)) < 1.0  # theirs has another b_n, whose error grows outwards
        np.testing.assert_allclose(ours[inside], expected[inside], rtol=rtol)


@pytest.mark.parametrize("preset", ["ct1", "deeplensesim_i"])
@pytest.mark.parametrize("substructure", ["no", "sphere", "vort"])
@pytest.mark.parametrize("seed", [0, 1])
def test_whole_images_agree_to_1_per_cent_of_the_peak(preset, substructure, seed):
    priors = PRESETS[preset]
    p = sample_lens(jax.random.key(seed), priors, substructure)
    ours, theirs = np.asarray(render_lens(p, priors)), lenstronomy_image(p, priors, string_points=1000)
    # Rays that all but hit a point mass differ by rounding: 99.5 % of the pixels must agree.
    difference = np.sort(np.abs(ours - theirs).ravel())
    assert difference[int(0.995 * difference.size)] < 0.01 * theirs.max()
    if substructure == "no":
        assert difference[-1] < 0.01 * theirs.max()
