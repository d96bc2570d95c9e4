import os
import pkgutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gravlens_jax
from commands import ROOT
from gravlens_jax.config import FILES, InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.inference import embed, predict, predict_logits, saliency
from gravlens_jax.lensing.images import simulate_images, simulate_parameters
from gravlens_jax.lensing.priors import PRESETS
from gravlens_jax.lensing.profiles import pixel_grid, sersic_light
from gravlens_jax.metrics import roc_areas
from gravlens_jax.model import ResNet
from gravlens_jax.pixels import scale
from gravlens_jax.weights import load_pretrained

MODEL = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=1, stretch="linear", mean=0.0, std=1.0))
VARIABLES = MODEL.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))
IMAGES = np.stack([scale(image) for image in np.random.default_rng(0).random((5, 16, 16))])
# Run with the default network, images of its size, and XLA's default flags: the compiled program drops NaN there.
BAD_PIXELS = """
import pathlib, runpy, sys
import numpy as np
from gravlens_jax import InputError, embed, load_pretrained, open_npz, predict, saliency
from gravlens_jax.npz import Dataset
from gravlens_jax.report import evaluate_network

network = load_pretrained()

def evaluate(model, variables, images):
    evaluate_network(network, Dataset(images, np.arange(3), model.classes, {}), out=pathlib.Path("report"))

for dtype, bad in [("f2", np.nan), (">f4", -np.inf), ("f8", np.nan), ("f8", np.inf)]:
    images = np.random.default_rng(0).random((3, 150, 150)).astype(dtype)
    images[1, 75, 80] = bad
    np.savez("bad.npz", images=images)
    for function in (predict, embed, saliency, evaluate):
        for given, file in ((open_npz("bad.npz", need_labels=False).images, "bad.npz"), (images, "")):
            try:
                function(*network, given)
                print("no error:", dtype, bad, function, file)
            except InputError as error:
                assert file in str(error) and "images[1]" in str(error), error

np.save("bad.npy", images[1])
np.save("fine.npy", images[0])
sys.argv = ["predict.py", "pretrained", "bad.npy", "fine.npy", "bad.npz"]
runpy.run_path("{SCRIPTS}/predict.py", run_name="__main__")
"""


def test_pixels_that_are_not_finite_are_refused_by_file_and_image(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", BAD_PIXELS.replace("{SCRIPTS}", str(ROOT / "scripts"))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["file", "fine.npy"]
    assert done.stderr.count("error: ") == 1 and "bad.npy" in done.stderr and "bad.npz: images[1]" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bad.npy", "bad.npz", "fine.npy"}


def test_no_public_name_is_that_of_a_module():
    modules = {module.name for module in pkgutil.iter_modules(gravlens_jax.__path__)}
    assert not modules & set(gravlens_jax.__all__)


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_predictions_agree_with_the_network_for_any_number_of_images(n):
    logits = MODEL.apply(VARIABLES, IMAGES[..., None])[:n]
    probabilities = predict(MODEL, VARIABLES, IMAGES[:n], batch_size=4)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-6)
    features, head = embed(MODEL, VARIABLES, IMAGES[:n], batch_size=4), VARIABLES["params"]["head"]
    assert features.shape == (n, 16) and features.dtype == np.float32
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], logits, atol=1e-5)


@pytest.mark.parametrize("function", [predict_logits, embed, saliency])
def test_byte_order_batch_size_and_container_do_not_change_the_result(function):
    expected = function(MODEL, VARIABLES, IMAGES)
    for given in (IMAGES.astype(">f4"), jnp.array(IMAGES), IMAGES.tolist()):
        np.testing.assert_allclose(function(MODEL, VARIABLES, given), expected, atol=1e-6)
    np.testing.assert_allclose(function(MODEL, VARIABLES, IMAGES, batch_size=4), expected, atol=1e-5)


@pytest.fixture(scope="module")
def lenses():
    return np.concatenate(list(simulate_images(60, 8, FILES.index("test"), PRESETS["ct1"]))).astype(np.float64)


@pytest.mark.parametrize(
    "factor, offset, dtype",
    [(0.01, 0, "f8"), (1e-5, 0, "f4"), (1e-300, 0, "f8"), (1e300, 0, "f8"), (1, -300, "f4"), (1e-3, 1e6, "f8")],
)
def test_predictions_do_not_depend_on_the_unit_of_the_pixels(lenses, factor, offset, dtype):
    given = (lenses[:12] * factor + offset).astype(dtype)
    results, expected = (predict(*load_pretrained(), images, return_outlier=True) for images in (given, lenses[:12]))
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def change(images, name):
    """Returns images unlike those of training; `name` says how."""
    rng, priors = np.random.default_rng(0), PRESETS["ct1"]
    if name == "hot pixel":
        images = images.copy()
        images[np.arange(len(images)), rng.integers(150, size=len(images)), 75] = 5 * images.max((1, 2))
    elif name == "noise":
        images = rng.poisson(50, images.shape)
    elif name == "lens light":  # de Vaucouleurs, as bright as the ring
        light = np.asarray(sersic_light(*pixel_grid(150, priors.pixel_scale), 4, 0.6, 1, 0))
        images = rng.poisson(images + images.max((1, 2), keepdims=True) * light / light.max())
    else:
        camera = {"psf_sigma": 0.174, "psf_pixels": 21} if name == "wide PSF" else {"pixel_scale": name}
        priors = replace(priors, **camera)
        images = np.concatenate(list(simulate_images(len(images), 9, FILES.index("test"), priors)))
    return images


@pytest.mark.parametrize("name", ["hot pixel", "noise", "lens light", "wide PSF", 0.025, 0.1])
def test_images_unlike_those_of_training_have_high_outlier_scores(lenses, name):
    network = load_pretrained()
    ordinary, other = (predict(*network, x, return_outlier=True)[1] for x in (lenses, change(lenses[:24], name)))
    assert np.mean(ordinary > 1) <= 0.05 and np.mean(other > 1) > 0.5  # of 1,500 ordinary ones 0.5 % are above 1
    scores, labels = np.concatenate([ordinary, other]), np.repeat([0, 1], [len(ordinary), len(other)])
    assert roc_areas(np.stack([-scores, scores], 1), labels)[1] > 0.95


def test_outlier_scores_are_nan_without_a_population():
    probabilities, outlier = predict(MODEL, VARIABLES, IMAGES, return_outlier=True)
    np.testing.assert_array_equal(probabilities, predict(MODEL, VARIABLES, IMAGES))
    assert outlier.shape == (5,) and np.isnan(outlier).all()


def test_tta_is_the_mean_over_mirror_images():
    model = MODEL.clone(input=InputConfig(crop=16, pool=2))
    images = np.random.default_rng(0).random((2, 18, 18))
    mirrors = [images, images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]]
    expected = np.mean([predict_logits(model, VARIABLES, some) for some in mirrors], axis=0)
    for some in mirrors:
        np.testing.assert_allclose(predict_logits(model, VARIABLES, some, tta=True), expected, atol=1e-5)


@pytest.mark.parametrize("function", [predict, embed, saliency])
def test_wrong_shapes_are_refused(function):
    for shape, message in (((16, 16), r"expected \(n, height, width\)"), ((2, 12, 20), "crop of 16 x 16")):
        with pytest.raises(InputError, match=message):
            function(MODEL, VARIABLES, np.zeros(shape))
    with pytest.raises(InputError, match="batch_size=0"):
        function(MODEL, VARIABLES, IMAGES, batch_size=0)


@pytest.mark.parametrize("size, crop, pool", [(51, 40, 1), (61, 54, 3)])
def test_saliency_peaks_at_the_brightest_place_if_all_weights_are_positive(size, crop, pool):
    model = ResNet(depth=8, width=4, input=InputConfig(crop, pool, "linear", 0.0, 1.0))
    variables = VARIABLES | {"params": jax.tree.map(jnp.abs, VARIABLES["params"])}
    places = [(20, 31), (27, 22), (33, 33)]
    images = np.zeros((3, size, size), np.float32)
    for image, (row, column) in zip(images, places, strict=True):
        image[row - 1 : row + 2, column - 1 : column + 2] = 1
    maps = saliency(model, variables, images)
    assert maps.shape == images.shape and maps.dtype == np.float32 and maps.min() >= 0
    found = np.array([np.unravel_index(m.argmax(), m.shape) for m in maps])
    assert np.abs(found - places).max() <= 2 * pool  # one pixel of stage 2


def test_saliency_explains_the_predicted_class_by_default():
    predicted = predict_logits(MODEL, VARIABLES, IMAGES).argmax(1)
    default, same, other = (
        saliency(MODEL, VARIABLES, IMAGES, labels, batch_size=4) for labels in (None, predicted, (predicted + 1) % 3)
    )
    np.testing.assert_allclose(same, default, atol=1e-6)
    assert (np.abs(other - default).max((1, 2)) > 1e-4).all()
    with pytest.raises(InputError, match=r"labels have shape \(2,\), expected \(5,\)"):
        saliency(MODEL, VARIABLES, IMAGES, predicted[:2])


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
    n, priors, split, images = len(lenses), PRESETS["ct1"], FILES.index("test"), lenses[label::3]
    parameters = {name: v[label::3] for name, v in simulate_parameters(n, 8, split, priors).items()}
    lenses = [{name: v[i] for name, v in parameters.items() if np.isfinite(v).all()} for i in range(n // 3)]
    peaks = saliency(*load_pretrained(), images).reshape(n // 3, -1).argmax(1)
    x, y = (np.ravel(axis)[peaks] for axis in pixel_grid(images.shape[1], priors.pixel_scale))
    hits = np.array([distance_to_substructure(x, y, p) for p in lenses]) < 0.2
    rate, chance = np.diag(hits).mean(), hits[~np.eye(n // 3, dtype=bool)].mean()  # of its own lens, of others
    assert rate > 0.75 and chance < 0.25  # 430 lenses of each class: .82 and .96, chance .04 and .13
