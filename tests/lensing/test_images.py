import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from gravlens_jax import PRIORS, ResNet, predict_logits
from gravlens_jax.config import CLASSES, PRESETS
from gravlens_jax.lensing import images
from gravlens_jax.lensing.images import labels_of, render_images, simulate_parameters, without_nan
from gravlens_jax.lensing.render import Grid, deflection_map
from helpers import refuse
from import_torch import load_state_dict, to_variables

CT1 = PRIORS["ct1"]


def simulate(n, seed=0, split=0, priors=CT1, **options):
    return np.concatenate(list(images.simulate_images(n, seed, split, priors, **options)))


@pytest.fixture(scope="module")
def counts():
    """80 images of each class."""
    return simulate(240)


@pytest.fixture(scope="module")
def smooth_counts():
    """600 images without substructure."""
    return simulate(600, classes=("no",))


def scale(counts):
    low, high = counts.min((1, 2), keepdims=True), counts.max((1, 2), keepdims=True)
    return (counts - low) / (high - low).astype(float)


def test_image_depends_only_on_seed_split_and_index(counts):
    np.testing.assert_array_equal(simulate(17), counts[:17])
    assert (simulate(3, seed=1) != counts[:3]).any((1, 2)).all()
    assert (simulate(3, split=1) != counts[:3]).any((1, 2)).all()
    assert len({image.tobytes() for image in counts}) == len(counts)


def test_pixels_are_distributed_as_in_the_public_images(counts):
    scaled = scale(counts)  # public figures over all 30,000 training images
    assert scaled.mean() == pytest.approx(0.0617, abs=0.0015)
    assert scaled.std() == pytest.approx(0.1173, abs=0.003)
    fractions = np.histogram(scaled, 100, (0, 1))[0][:3] / scaled.size
    np.testing.assert_allclose(fractions, [0.1593, 0.4143, 0.1117], atol=0.01)
    means = [scaled[label::3].mean() for label in range(3)]
    assert max(means) / min(means) < 1.05  # means of 80 images scatter by 1.5 %


def test_whole_histogram_is_the_public_one(counts, shared):
    public = np.loadtxt(shared / "reference" / "pixel_histogram.csv", delimiter=",", comments="#")[:97, 1]
    fractions = np.histogram(scale(counts), 100, (0, 1))[0][:97] / counts.size
    assert np.sqrt(np.mean(np.log(fractions / public) ** 2)) < 0.06


def test_lenses_without_substructure_are_those_of_9995_public_images(smooth_counts, shared):
    public = json.loads((shared / "reference/real_no.json").read_text())
    counts = smooth_counts - smooth_counts.min((1, 2), keepdims=True).astype(float)
    unit, y, x = scale(smooth_counts), *(np.indices((150, 150)) - 74.5)
    ring = np.minimum(*(np.minimum(np.arange(150), np.arange(149, -1, -1))[index] for index in np.indices((150, 150))))
    distance = (np.hypot(x, y) / 3).astype(int)

    def assert_close(values, expected, sigmas=4):
        """`values` (images, statistics) have the public means, up to the standard errors of both."""
        error = np.hypot(np.std(values, 0) / np.sqrt(len(values)), expected["standard_error"])
        assert (np.abs(np.mean(values, 0) - expected["mean"]) < sigmas * error + 1e-9).all()

    border = np.stack([unit[:, ring == k].mean(1) for k in range(8)], 1)
    assert_close(border - border[:, 5:6], public["ring_k_minus_ring_5_unit"])
    profile = np.stack([counts[:, distance == k].mean(1) for k in range(25)], 1)
    assert_close(profile, public["radial_profile_counts_rings_of_3_pixels"])
    assert_close(counts.max((1, 2)), public["peak_minus_floor_counts"])
    brightest = np.sort(counts.reshape(len(counts), -1), 1)[:, ::-1]
    means = np.stack([brightest[:, :n].mean(1) for n in (1, 10, 100, 1000, 5000)], 1)
    assert_close(means, public["mean_of_brightest_1_10_100_1000_5000_counts"])


def test_network_trained_on_public_images_recognizes_simulated_ones(shared, counts):
    order = [("no", "vort", "sphere").index(name) for name in CLASSES]
    variables = to_variables(load_state_dict(shared / "reference" / "Train_3_best.npz"), 32, order)
    model = ResNet(depth=32, activation="relu", input=PRESETS["published"].input)
    predicted = predict_logits(model, variables, counts[:100], 50).argmax(1)
    assert 0.83 <= np.mean(predicted == labels_of(100)) <= 0.96  # it is right on 89.6 % of public images


def of_class(label, parameters):
    """Returns the parameters of lenses of one class, as `sample_lens` names them."""
    lenses = {name: values[label::3] for name, values in parameters.items()}
    return {name: values for name, values in lenses.items() if np.isfinite(values).all()}


def test_images_are_those_of_their_parameters_for_lenses_of_one_class_or_of_all(counts):
    parameters = simulate_parameters(12, 0, 0, CT1)
    expected = render_images(without_nan(parameters), CT1)
    for label, name in enumerate(CLASSES):
        lenses = of_class(label, parameters)
        assert ("subhalo_masses" in lenses, "vortex_mass" in lenses) == (name == "sphere", name == "vort")
        np.testing.assert_allclose(expected[label::3], render_images(lenses, CT1), rtol=1e-4)
    render = jax.jit(partial(images.render_batch, priors=CT1, batch_size=5))
    batches = {first: render(first, 0, 0) for first in (0, 2, 7)}  # of consecutive images, on a device
    for first, found in ((0, counts[:12]), *((first, batch["images"]) for first, batch in batches.items())):
        mean = expected[first : first + len(found)]
        chi_square = np.mean((found - mean) ** 2 / mean, (1, 2))
        np.testing.assert_allclose(chi_square, 1, atol=0.06)  # 22,500 pixels: one standard error is 0.01
    for first, batch in batches.items():
        np.testing.assert_array_equal(batch["labels"], np.arange(first, first + 5) % 3)


def test_deflection_maps_are_those_of_each_lens(monkeypatch):
    monkeypatch.setattr(images, "BLOCK", 3)
    parameters, grid = simulate_parameters(7, 3, 1, CT1), Grid(6, 0.5, 0.1)
    maps = images.deflection_maps(parameters, CT1, grid)
    assert maps.dtype == np.float32 and ((np.abs(maps).max((1, 2, 3)) > 1e-3) == (labels_of(7) > 0)).all()
    for label in range(3):
        expected = jax.jit(jax.vmap(lambda p: deflection_map(p, CT1, grid)))(of_class(label, parameters))
        np.testing.assert_allclose(maps[label::3], expected, atol=1e-5)
    for start in (0, 2):
        again = images.render_deflections(start, 3, 1, n=5, priors=CT1, grid=grid)
        np.testing.assert_allclose(again, maps[start : start + 5], atol=1e-5)


def test_accelerators_simulate_the_same_images_up_to_1_count_in_rare_pixels(monkeypatch, counts):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(images, "ACCELERATOR_BLOCK", 1)
    difference = np.abs(simulate(3).astype(int) - counts[:3])  # test_loader compares streams
    assert difference.max() <= 1 and np.mean(difference) < 1e-3


def test_impossible_images_are_refused():
    bright = replace(CT1, num_pixels=30, pixel_scale=0.25, photons=6e4)
    refuse("lower the prior `photons`", simulate, 1, priors=bright)  # beyond uint16
    heavy = "a sphere lens cannot be rendered: its substructure is heavier than the prior"
    refuse(heavy, simulate, 3, priors=replace(CT1, mass=1e9, num_pixels=20))
    refuse("n=0: expected at least 1 image", simulate, 0)
