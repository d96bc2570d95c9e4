import inspect
import os
import pkgutil
import subprocess
import sys
from importlib import import_module

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
from gravlens_jax.lensing.profiles import pixel_grid
from gravlens_jax.model import ResNet
from gravlens_jax.weights import load_pretrained

MODEL = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=1, stretch="linear", mean=0.0, std=1.0))
VARIABLES = MODEL.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))
IMAGES = np.random.default_rng(0).random((5, 16, 16))
# Run with the default network, images of its size, and XLA's default flags: the compiled program drops NaN there.
BAD_PIXELS = """
import contextlib, io, pathlib, runpy, sys
import numpy as np
from gravlens_jax import InputError, embed, load_pretrained, open_npz, predict, saliency
from gravlens_jax.npz import Dataset
from gravlens_jax.report import evaluate_network

network = load_pretrained()

def evaluate(model, variables, images):
    evaluate_network(network, Dataset(images, np.arange(3), model.classes, {}), out=pathlib.Path("report"))

for dtype, bad in [("f2", np.nan), ("f2", np.inf), ("f4", np.nan), (">f4", -np.inf), ("f8", np.nan), ("f8", 1e300)]:
    images = np.random.default_rng(0).random((3, 150, 150)).astype(dtype)
    images[1, 75, 80] = bad
    np.savez("bad.npz", images=images)
    np.save("bad.npy", images[1])
    for function in (predict, embed, saliency, evaluate):
        for given, name in ((open_npz("bad.npz", need_labels=False).images, "bad.npz"), (images, "images[1]")):
            try:
                function(*network, given)
                print("no error:", dtype, bad, function, name)
            except InputError as error:
                if name not in str(error) or "images[1]" not in str(error):
                    print(dtype, bad, function, error)

np.savez("labelled.npz", images=images, labels=np.arange(3), classes=np.array(network.model.classes))
np.save("fine.npy", images[0])
for script, *arguments in (["predict.py", "bad.npz"], ["predict.py", "bad.npy"], ["evaluate.py", "labelled.npz"],
                           ["predict.py", "bad.npy", "fine.npy", "bad.npz"]):
    sys.argv = [script, "pretrained", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(f"{SCRIPTS}/{script}", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    rows = [line.split(",")[0] for line in out.getvalue().splitlines() if not line.startswith("file,class")]
    named = all(name in err.getvalue() for name in arguments if name != "fine.npy")
    if status != 2 or not named or err.getvalue().count("\\n") != 1 or rows != [a for a in arguments if "fine" in a]:
        print(script, arguments, status, out.getvalue(), err.getvalue())
print(sorted(path.name for path in pathlib.Path().iterdir()))
"""


def test_pixels_that_are_not_finite_are_refused_by_file_and_image(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    code = BAD_PIXELS.replace("{SCRIPTS}", str(ROOT / "scripts"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "['bad.npy', 'bad.npz', 'fine.npy', 'labelled.npz']\n", done
    assert done.returncode == 0, done.stderr


def test_public_names_are_not_modules_whatever_was_imported_before():
    for module in pkgutil.walk_packages(gravlens_jax.__path__, "gravlens_jax."):
        import_module(module.name)
    assert gravlens_jax.predict is predict and gravlens_jax.load_pretrained is load_pretrained
    assert not [name for name in gravlens_jax.__all__ if inspect.ismodule(getattr(gravlens_jax, name))]


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_predictions_agree_with_the_network_for_any_number_of_images(n):
    logits = MODEL.apply(VARIABLES, jnp.float32(IMAGES[:n])[..., None])
    probabilities = predict(MODEL, VARIABLES, IMAGES[:n], batch_size=4)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-6)
    features, head = embed(MODEL, VARIABLES, IMAGES[:n], batch_size=4), VARIABLES["params"]["head"]
    assert features.shape == (n, 16) and features.dtype == np.float32
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], logits, atol=1e-5)


@pytest.mark.parametrize("function", [predict_logits, embed, saliency])
def test_byte_order_batch_size_and_container_do_not_change_the_result(function):
    images = IMAGES.astype(np.float32)
    expected = function(MODEL, VARIABLES, images)
    for given in (images.astype(">f4"), jnp.array(images), images.tolist()):
        np.testing.assert_array_equal(function(MODEL, VARIABLES, given), expected)
    np.testing.assert_allclose(function(MODEL, VARIABLES, images, batch_size=2), expected, atol=1e-5)


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


@pytest.mark.parametrize("size, crop, pool", [(51, 40, 1), (60, 48, 2), (61, 54, 3)])
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
    maps = saliency(MODEL, VARIABLES, IMAGES)
    np.testing.assert_array_equal(saliency(MODEL, VARIABLES, IMAGES, predicted, batch_size=2), maps)
    assert (saliency(MODEL, VARIABLES, IMAGES, (predicted + 1) % 3) != maps).any((1, 2)).all()
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


def hit_rates(maps, lenses, pixel_scale, radius):
    """Returns the fraction of maps that peak within `radius` of their own lens's substructure, and of other lenses'."""
    x, y = pixel_grid(maps.shape[1], pixel_scale)
    peaks = maps.reshape(len(maps), -1).argmax(1)
    x, y = np.ravel(x)[peaks], np.ravel(y)[peaks]
    n = len(maps)
    each = [{name: values[i] for name, values in lenses.items()} for i in range(n)]
    hits = np.array([distance_to_substructure(x, y, p) for p in each]) < radius
    return hits.trace() / n, (hits.sum() - hits.trace()) / (n * (n - 1))


def test_hit_rates_are_counted_in_arcsec():
    maps = np.zeros((2, 41, 41), np.float32)
    maps[0, 10, 30] = maps[1, 30, 20] = 1  # x, y = 1, 1 and 0, -1 arcsec
    lenses = {"vortex_angle": [0.0, 0.0], "vortex_length": [1.0, 1.0], "vortex_centre": [[1.0, 1.05], [1.0, 0.9]]}
    assert hit_rates(maps, lenses, 0.1, 0.2) == (0.5, 0.5) and hit_rates(maps, lenses, 0.1, 0.01) == (0, 0)


def test_saliency_of_the_pretrained_network_peaks_on_the_substructure():
    n, priors, split = 60, PRESETS["ct1"], FILES.index("test")
    images = np.concatenate(list(simulate_images(n, 8, split, priors)))
    parameters = simulate_parameters(n, 8, split, priors)
    for label in (1, 2):
        lenses = {name: v[label::3] for name, v in parameters.items() if np.isfinite(v[label::3]).all()}
        rate, chance = hit_rates(saliency(*load_pretrained(), images[label::3]), lenses, priors.pixel_scale, radius=0.2)
        assert rate > 0.75 and chance < 0.25  # 430 lenses of each class: .82 and .96, chance .04 and .13
