"""Comparison with herculens and caustics, independent differentiable codes; skipped where they are not installed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.simulators import caustics_counts, make_caustics, make_herculens
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.lensing.render import render_lenses, sample_lens

PRIORS = replace(PRIORS["ct1"], subhalo_poisson=False, subhalo_padding=25)
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


def test_herculens_makes_the_same_images(lenses, monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # `make_herculens` replaces it
    pytest.importorskip("herculens", exc_type=ImportError)
    found = jax.jit(jax.vmap(make_herculens(PRIORS)))(lenses)
    assert_images_agree(jax.jit(render_lenses, static_argnames="priors")(lenses, priors=PRIORS), found)


def test_caustics_makes_the_same_images(lenses, monkeypatch):
    monkeypatch.setenv("CASKADE_BACKEND", "jax")
    pytest.importorskip("caustics", exc_type=ImportError)
    render, parameters = make_caustics(PRIORS, "jax", lenses)
    found = caustics_counts(jax.jit(jax.vmap(render))(jnp.asarray(parameters)), PRIORS)
    assert_images_agree(jax.jit(render_lenses, static_argnames="priors")(lenses, priors=PRIORS), found)
