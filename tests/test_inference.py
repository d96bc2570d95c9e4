from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import CLASSES, SPLITS, InputConfig
from gravlens_jax.inference import embed, logits, outputs, predict, predict_logits, saliency
from gravlens_jax.lensing.images import simulate_images, simulate_parameters
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.lensing.profiles import pixel_grid, sersic_light
from gravlens_jax.network import load_pretrained
from gravlens_jax.npz import Dataset, open_npz, scale
from gravlens_jax.preprocess import prepare
from gravlens_jax.report import evaluate_network
from helpers import make_network, refuse

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
    for function in (predict, embed, saliency, evaluate):
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


@pytest.mark.parametrize("function", [predict_logits, embed, saliency])
def test_byte_order_batch_size_and_container_do_not_change_the_result(function):
    network = make_network()
    expected = function(*network, IMAGES)
    for given in (IMAGES.astype(">f4"), jnp.array(IMAGES), IMAGES.tolist()):
        np.testing.assert_allclose(function(*network, given), expected, atol=1e-6)
    np.testing.assert_allclose(function(*network, IMAGES, batch_size=4), expected, atol=1e-5)


@pytest.mark.parametrize(
    "factor, offset, dtype",
    [(0.01, 0, "f8"), (1e-5, 0, "f4"), (1e-300, 0, "f8"), (1e300, 0, "f8"), (1, -300, "f4"), (1e-3, 1e6, "f8")],
)
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


def test_saliency_explains_the_predicted_class_by_default():
    network = make_network()
    predicted = predict_logits(*network, IMAGES).argmax(1)
    default, same, other = (
        saliency(*network, IMAGES, labels, batch_size=4) for labels in (None, predicted, (predicted + 1) % 3)
    )
    np.testing.assert_allclose(same, default, atol=1e-6)
    assert (np.abs(other - default).max((1, 2)) > 1e-4).all()
    refuse(r"labels have shape \(2,\), expected \(5,\): one per image", saliency, *network, IMAGES, np.arange(2))
    for bad, found in ((7, "0 1 2 7"), (-1, "-1 *0 *1 *2")):
        refuse(rf"labels are \[{found}\], expected 0 to 2", saliency, *network, IMAGES, np.array([0, 1, 2, 1, bad]))


def distance_to_substructure(x, y, p, heaviest=5):
    """Returns the distance (arcsec) of points to a lens's vortex, or to the nearest of its heaviest subhalos."""
    if "subhalo_masses" in p:
        centres = p["subhalo_centres"][np.argsort(p["subhalo_masses"])[-heaviest:]]
        return np.hypot(x - centres[:, :1], y - centres[:, 1:]).min(0)
    dx, dy = x - p["vortex_centre"][0], y - p["vortex_centre"][1]
    cos, sin = np.cos(p["vortex_angle"]), np.sin(p["vortex_angle"])
    beyond = np.maximum(np.abs(cos * dx + sin * dy) - p["vortex_length"] / 2, 0)
    return np.hypot(beyond, cos * dy - sin * dx)


@pytest.mark.parametrize("label", [1, 2])
def test_saliency_of_the_pretrained_network_peaks_on_the_substructure(lenses, label):
    n, images = len(lenses), lenses[label::3]
    parameters = {name: v[label::3] for name, v in simulate_parameters(n, 8, TEST, CT1).items()}
    lenses = [{name: v[i] for name, v in parameters.items() if np.isfinite(v).all()} for i in range(n // 3)]
    peaks = saliency(*load_pretrained(), images).reshape(n // 3, -1).argmax(1)
    x, y = (np.ravel(axis)[peaks] for axis in pixel_grid(images.shape[1], CT1.pixel_scale))
    hits = np.array([distance_to_substructure(x, y, p) for p in lenses]) < 0.2
    rate, chance = np.diag(hits).mean(), hits[~np.eye(n // 3, dtype=bool)].mean()  # of its own lens, of others
    assert rate > 0.75 and chance < 0.25  # of 430 lenses of each class: .87 and .97, by chance .05 and .14


@pytest.mark.parametrize("function", [predict, embed, saliency])
def test_wrong_shapes_batch_sizes_and_images_that_are_no_real_numbers_are_refused(function):
    for shape, message in (((16, 16), r"expected \(n, height, width\)"), ((2, 12, 20), "crop of 16 x 16")):
        refuse(message, function, *make_network(), np.zeros(shape))
    refuse("batch_size=0", function, *make_network(), IMAGES, batch_size=0)
    for images in (IMAGES * 1j, IMAGES.astype(object), IMAGES.astype(str), IMAGES > 0.5):
        refuse(f"dtype {images.dtype}, expected real numbers", function, *make_network(), images)
    refuse("images are a masked array", function, *make_network(), np.ma.masked_greater(IMAGES, 0.9))


def test_logits_can_be_traced_and_differentiated_in_both_modes():
    (model, variables), images = make_network(), jnp.float32(IMAGES[:2])
    each = jax.jit(jax.vmap(lambda image: logits(model, variables, image[None])[0]))(images)
    np.testing.assert_allclose(each, predict_logits(model, variables, IMAGES[:2]), atol=1e-5)

    def brighter(x):
        return logits(model, variables, images[:1] + x * (jnp.arange(16.0) / 16)[None, None])[0, 0]

    forward, backward, second = (jax.jit(f(brighter))(0.1) for f in (jax.jacfwd, jax.grad, jax.hessian))
    assert forward == pytest.approx(float(backward), rel=1e-3) and np.isfinite(second)
