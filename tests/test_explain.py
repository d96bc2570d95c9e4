import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import InputConfig, InputError
from gravlens_jax.explain import distance_to_substructure, find_peaks, hit_rates, saliency
from gravlens_jax.model import ResNet, predict_logits
from gravlens_jax.priors import PRESETS
from gravlens_jax.render import sample_lens
from gravlens_jax.simulate import simulate_images, simulate_parameters
from gravlens_jax.weights import load_pretrained

PRIORS = PRESETS["ct1"]


def network(crop, pool):
    """A network in which brightness anywhere speaks for every class: all its weights are positive."""
    model = ResNet(depth=8, width=4, input=InputConfig(crop, pool, "linear", 0.0, 1.0))
    variables = model.init(jax.random.key(0), jnp.zeros((1, crop // pool, crop // pool, 1)))
    return model, variables | {"params": jax.tree.map(jnp.abs, variables["params"])}


@pytest.mark.parametrize("size, crop, pool", [(51, 40, 1), (60, 48, 2), (61, 54, 3)])
def test_the_map_is_brightest_where_the_image_is(size, crop, pool):
    places = [(20, 31), (27, 22), (33, 33)]
    images = np.zeros((3, size, size), np.float32)
    for image, (row, column) in zip(images, places, strict=True):
        image[row - 1 : row + 2, column - 1 : column + 2] = 1
    maps = saliency(*network(crop, pool), images)
    assert maps.shape == images.shape and maps.dtype == np.float32 and maps.min() >= 0
    found = np.array([np.unravel_index(m.argmax(), m.shape) for m in maps])
    assert np.abs(found - places).max() <= 2 * pool  # one pixel of stage 2


def test_the_predicted_class_is_explained_unless_told_otherwise():
    model = ResNet(depth=8, width=4, input=InputConfig(16, 1))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    images = np.random.default_rng(0).random((3, 16, 16))
    predicted = predict_logits(model, variables, images).argmax(1)
    maps = saliency(model, variables, images)
    np.testing.assert_array_equal(saliency(model, variables, images, predicted), maps)
    assert (saliency(model, variables, images, (predicted + 1) % 3) != maps).any((1, 2)).all()
    with pytest.raises(InputError, match=r"expected \(n, height, width\)"):
        saliency(model, variables, images[0])


def test_distance_is_that_to_the_nearest_of_many_points():
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 50)).astype(np.float32)
    vortex, subhalos = (jax.tree.map(np.array, sample_lens(jax.random.key(1), PRIORS, s)) for s in ("vort", "sphere"))
    angle = vortex["vortex_angle"]
    steps = np.linspace(-0.5, 0.5, 20_001) * vortex["vortex_length"]
    points = vortex["vortex_centre"] + steps[:, None] * np.array([np.cos(angle), np.sin(angle)])
    expected = np.hypot(x[:, None] - points[:, 0], y[:, None] - points[:, 1]).min(1)
    np.testing.assert_allclose(distance_to_substructure(x, y, vortex), expected, atol=1e-3)
    points = subhalos["subhalo_centres"][np.argsort(subhalos["subhalo_masses"])[-5:]]
    expected = np.hypot(x[:, None] - points[:, 0], y[:, None] - points[:, 1]).min(1)
    np.testing.assert_allclose(distance_to_substructure(x, y, subhalos), expected, rtol=1e-5)


def test_peaks_and_hits_are_counted_in_arcsec():
    maps = np.zeros((2, 41, 41), np.float32)
    maps[0, 10, 30] = maps[1, 30, 20] = 1  # x, y = 1, 1 and 0, -1 arcsec
    np.testing.assert_allclose(find_peaks(maps, 0.1), [[1, 0], [1, -1]], atol=1e-6)
    lens = {"vortex_angle": [0.0, 0.0], "vortex_length": [1.0, 1.0], "vortex_centre": [[1.0, 1.05], [1.0, 0.9]]}
    lenses = {name: jnp.array(values) for name, values in lens.items()}
    assert hit_rates(maps, lenses, 0.1, 0.2) == (0.5, 0.5)
    assert hit_rates(maps, lenses, 0.1, 0.01) == (0.0, 0.0)


def test_the_pretrained_network_s_maps_peak_on_the_substructure():
    n = 60
    images = np.concatenate(list(simulate_images(n, 8, "test", PRIORS)))
    parameters = simulate_parameters(n, 8, "test", PRIORS)
    for label in (1, 2):
        own = {name: jnp.array(v[label::3]) for name, v in parameters.items() if np.isfinite(v[label::3]).all()}
        rate, chance = hit_rates(saliency(*load_pretrained(), images[label::3]), own, PRIORS.pixel_scale, radius=0.2)
        assert rate > 0.75 and chance < 0.25  # 430 lenses of each class: .82 and .96, chance .04 and .13
