from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import PRIORS, embed, load_pretrained, predict, predict_deflection, predict_logits
from gravlens_jax.config import CLASSES, SPLITS, InputConfig
from gravlens_jax.datasets import map_grid
from gravlens_jax.inference import deflection_grid, fit_deflection, logits, outputs
from gravlens_jax.lensing.images import deflection_maps, simulate_images, simulate_parameters
from gravlens_jax.lensing.profiles import pixel_grid, sersic_light
from gravlens_jax.metrics import evaluate_maps
from gravlens_jax.npz import Dataset, open_npz, scale
from gravlens_jax.preprocess import cell_means, prepare, to_unit
from gravlens_jax.report import evaluate_network
from helpers import make_mapping_network, make_network, refuse

CT1, TEST = PRIORS["ct1"], SPLITS.index("test")
IMAGES = np.stack([scale(image) for image in np.random.default_rng(0).random((5, 16, 16))])


@pytest.fixture(scope="module")
def lenses():
    return np.concatenate(list(simulate_images(60, 8, TEST, CT1))).astype(np.float64)


@pytest.mark.parametrize("dtype, bad", [("f2", np.nan), (">f4", -np.inf), ("f8", np.nan), ("f8", np.inf)])
def test_pixels_that_are_not_finite_are_refused_by_file_and_image(tmp_path, dtype, bad):
    def evaluate(model, variables, images):
        evaluate_network(make_network(), Dataset(images, np.arange(5) % 3, CLASSES, {}), out=tmp_path / "report")

    images = IMAGES.astype(dtype)
    images[1, 7, 8] = bad
    np.savez(tmp_path / "bad.npz", images=images)
    for function in (predict, embed, evaluate):
        for given, file in ((open_npz(tmp_path / "bad.npz", need_labels=False).images, r"bad\.npz: "), (images, "^")):
            refuse(rf"{file}images\[1\] has NaN or infinite pixels", function, *make_network(), given)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_outputs_agree_with_the_network_for_any_number_of_images(n):
    (model, variables), images = make_network(), IMAGES[:n]
    expected, feature_maps = jax.jit(model.apply)(variables, prepare(IMAGES[..., None], model.input))
    logits, means = outputs(model, variables, images, batch_size=4)
    np.testing.assert_allclose(logits, expected[:n], atol=1e-5)
    np.testing.assert_allclose(means, np.concatenate([x.mean((1, 2)) for x in feature_maps], 1)[:n], atol=1e-5)
    probabilities, outlier = predict(model, variables, images, batch_size=4, return_outlier=True)
    assert outlier.shape == (n,) and np.isnan(outlier).all()  # the network has no population
    np.testing.assert_allclose(probabilities, jax.nn.softmax(expected)[:n], atol=1e-6)
    features, head = embed(model, variables, images, batch_size=4), variables["params"]["head"]
    assert features.shape == (n, 16) and features.dtype == logits.dtype == means.dtype == np.float32
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], expected[:n], atol=1e-5)


@pytest.mark.parametrize("function", [predict_logits, embed, predict_deflection])
def test_byte_order_batch_size_and_container_do_not_change_the_result(function):
    network = make_mapping_network(0.05)
    expected = function(*network, IMAGES)
    for given in (IMAGES.astype(">f4"), jnp.array(IMAGES), IMAGES.tolist()):
        np.testing.assert_allclose(function(*network, given), expected, atol=1e-6)
    np.testing.assert_allclose(function(*network, IMAGES, batch_size=4), expected, atol=1e-5)


@pytest.mark.parametrize("factor, offset, dtype", [(1e300, 0, "f8"), (1e-3, 1e6, "f8"), (1, -300, "f4")])
def test_predictions_do_not_depend_on_the_unit_of_the_pixels(lenses, factor, offset, dtype):
    given = (lenses[:12] * factor + offset).astype(dtype)
    results, expected = (predict(*load_pretrained(), images, return_outlier=True) for images in (given, lenses[:12]))
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, atol=1e-3)


def test_images_unlike_those_of_training_have_high_outlier_scores(lenses):
    light = np.asarray(sersic_light(*pixel_grid(150, CT1.pixel_scale), 4, 0.6, 1, 0))  # de Vaucouleurs
    coarse = simulate_images(24, 9, TEST, replace(CT1, pixel_scale=0.1, psf_pixels=None))
    light = lenses[:24] + lenses[:24].max((1, 2), keepdims=True) * light / light.max()  # as bright as the ring
    for unlike in (np.random.default_rng(0).poisson(light), np.concatenate(list(coarse))):
        ordinary, other = (predict(*load_pretrained(), x, return_outlier=True)[1] for x in (lenses, unlike))
        assert np.mean(ordinary > 1) <= 0.05 and np.mean(other > 1) > 0.5  # of 1,500 ordinary ones 0.5 % are above 1


def test_tta_is_the_mean_over_mirror_images():
    model, variables = make_network(input=InputConfig(crop=16, pool=2))
    images = np.random.default_rng(0).random((2, 18, 18))
    mirrored = [images, images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]]
    expected = np.mean([predict_logits(model, variables, mirror) for mirror in mirrored], axis=0)
    for mirror in mirrored:
        np.testing.assert_allclose(predict_logits(model, variables, mirror, tta=True), expected, atol=1e-5)
    means = outputs(model, variables, images)[1]
    np.testing.assert_allclose(outputs(model, variables, images, tta=True)[1], means, atol=1e-6)


def test_deflections_are_linear_in_the_last_feature_map_and_mirrored_with_the_images():
    model, variables = make_mapping_network(0.05)
    head = variables["deflection"]
    _, feature_maps = jax.jit(model.apply)(variables, prepare(IMAGES[..., None], model.input))
    expected = np.asarray(feature_maps[-1]) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(predict_deflection(model, variables, IMAGES, batch_size=4), expected, atol=1e-5)
    averaged = predict_deflection(model, variables, IMAGES, tta=True)
    for axis, signs in ((1, [1, -1]), (2, [-1, 1])):
        mirrored = predict_deflection(model, variables, np.flip(IMAGES, axis), tta=True)
        np.testing.assert_array_equal(np.flip(mirrored, axis) * np.float32(signs), averaged)
    fitted = fit_deflection(model, variables, IMAGES, lambda rows: expected[rows], batch_size=4)
    found = predict_deflection(model, variables | {"deflection": fitted}, IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())
    for network in (tuple(make_network()), (model.clone(pixel_scale=None), variables)):
        refuse("the network predicts no deflections: its training images had no", predict_deflection, *network, IMAGES)


@pytest.mark.parametrize("size, crop, pool", [(51, 40, 1), (61, 54, 3), (60, 40, 2)])
def test_the_grid_says_where_the_cells_are_also_if_the_crop_cannot_be_central(size, crop, pool):
    model = make_network(input=InputConfig(crop, pool)).model.clone(pixel_scale=0.05)
    x, y = deflection_grid(model, (size, size))
    column, row = np.meshgrid(*[np.arange(size) - (size - 1) / 2] * 2)
    rng = np.random.default_rng(0)
    for _ in range(20):  # a wide spot of light is in the middle of the cells that it lights
        x0, y0 = rng.uniform(-0.2, 0.2, 2)
        spot = np.exp(-((column * 0.05 - x0) ** 2 + (-row * 0.05 - y0) ** 2) / 2 / (0.5 * model.input.cell * 0.05) ** 2)
        (light,) = cell_means(to_unit(spot[None]), model.input)[..., 0]
        assert (light * x).sum() / light.sum() == pytest.approx(x0, abs=0.02)
        assert (light * y).sum() / light.sum() == pytest.approx(y0, abs=0.02)


def test_the_pretrained_network_classifies_simulated_lenses_and_maps_their_substructure(lenses):
    model, variables = load_pretrained()
    parameters = simulate_parameters(len(lenses), 8, TEST, CT1)
    true = deflection_maps(parameters, CT1, map_grid(model.input, CT1))
    labels, found = np.arange(len(lenses)) % 3, []
    for tta in (False, True):
        logits, _, predicted, light = outputs(model, variables, lenses, tta=tta, maps=True)
        assert (logits.argmax(1) == labels).sum() >= 56  # 98.9 % of 20,000
        np.testing.assert_allclose(light, cell_means(to_unit(lenses), model.input)[..., 0], atol=1e-6)
        found.append(evaluate_maps(predicted, true, light, labels, CLASSES, 0.4))
    single, averaged = found
    assert single["no"]["r2"] is None and single["no"]["error_mas"] < 2
    assert single["sphere"]["r2"] > 0.75 and single["vort"]["r2"] > 0.94  # of many: .88 and .97
    assert averaged["sphere"]["r2"] > single["sphere"]["r2"] and averaged["vort"]["r2"] > single["vort"]["r2"]
    assert single["vort"]["peak_near"] > 0.7 and single["sphere"]["peak_found"] > 0.35


@pytest.mark.parametrize("function", [predict, embed, predict_deflection])
def test_wrong_shapes_batch_sizes_and_images_that_are_no_real_numbers_are_refused(function):
    for shape, message in (((16, 16), r"expected \(n, height, width\)"), ((2, 12, 20), "crop of 16 x 16")):
        refuse(message, function, *make_mapping_network(0.05), np.zeros(shape))
    refuse("batch_size=0", function, *make_mapping_network(0.05), IMAGES, batch_size=0)
    for images in (IMAGES * 1j, IMAGES.astype(object), IMAGES.astype(str), IMAGES > 0.5):
        refuse(f"dtype {images.dtype}, expected real numbers", function, *make_mapping_network(0.05), images)
    refuse("images are a masked array", function, *make_mapping_network(0.05), np.ma.masked_greater(IMAGES, 0.9))


def test_logits_can_be_traced_and_differentiated_in_both_modes():
    (model, variables), images = make_network(), jnp.float32(IMAGES[:2])
    each = jax.jit(jax.vmap(lambda image: logits(model, variables, image[None])[0]))(images)
    np.testing.assert_allclose(each, predict_logits(model, variables, IMAGES[:2]), atol=1e-5)

    def brighter(x):
        return logits(model, variables, images[:1] + x * (jnp.arange(16.0) / 16)[None, None])[0, 0]

    forward, backward, second = (jax.jit(f(brighter))(0.1) for f in (jax.jacfwd, jax.grad, jax.hessian))
    assert forward == pytest.approx(float(backward), rel=1e-3) and np.isfinite(second)
