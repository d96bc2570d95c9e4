import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, roc_auc_score

from gravlens_jax import CLASSES, metrics
from gravlens_jax.metrics import calibration_error, evaluate, fit_population, fit_temperature, outlier_scores, softmax

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("decimals", [0, 16])  # many ties, none
def test_metrics_are_those_of_scikit_learn(decimals):
    logits, labels = RNG.normal(size=(200, 3)).round(decimals), RNG.integers(0, 3, 200)
    values, probabilities = evaluate(logits, labels, CLASSES), softmax(logits)
    assert values["n"] == 200 and values["classes"] == list(CLASSES)
    assert values["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert values["loss"] == pytest.approx(log_loss(labels, probabilities))
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    np.testing.assert_allclose(list(values["auc"].values()), areas, rtol=1e-12)
    assert values["macro_auc"] == pytest.approx(np.mean(areas))
    np.testing.assert_array_equal(values["confusion"], confusion_matrix(labels, logits.argmax(1)))


def test_classes_without_images_or_without_others_have_no_auc():
    values = evaluate(RNG.normal(size=(10, 3)), np.array([0, 2] * 5), CLASSES)
    assert values["auc"]["sphere"] is None and values["macro_auc"] is None and values["auc"]["no"] is not None
    assert values["confusion"][1] == [0, 0, 0]
    values = evaluate(np.array([[1e4, -1e4, 0.0]], np.float32), np.array([1]), CLASSES)
    assert set(values["auc"].values()) == {None} and np.isfinite(values["loss"])


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    labels = np.array([0] * 9 + [1] + [1] * 10)  # confidence .9, accuracy .9; confidence .6, accuracy 0
    assert calibration_error(probabilities, labels) == pytest.approx(0.3)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_the_temperature_calibrates_logits_of_any_sharpness(sharpness):
    logits = 2 * RNG.normal(size=(20_000, 3))
    labels = (RNG.random((20_000, 1)) > softmax(logits).cumsum(1)).sum(1)  # drawn from the probabilities themselves
    temperature = fit_temperature(sharpness * logits, labels)
    assert temperature == pytest.approx(sharpness, rel=0.04)
    assert calibration_error(softmax(sharpness * logits / temperature), labels) < 0.015


@pytest.mark.parametrize("n", [1, 30])
def test_few_images_that_are_all_right_or_all_wrong_leave_the_temperature_near_1(n):
    logits = np.tile([1.5, 0.5, 0.5], (n, 1))
    right, wrong = (fit_temperature(logits, np.full(n, label)) for label in (0, 1))
    assert 0.5 < right < 1 < wrong < 2


def test_intervals_contain_the_value_and_shrink_with_the_number_of_images():
    labels = RNG.integers(0, 3, 800)
    logits = RNG.normal(size=(800, 3)) + 2 * np.eye(3)[labels]
    few, many = (metrics.intervals(logits[:n], labels[:n], CLASSES, resamples=100) for n in (50, 800))
    value = evaluate(logits, labels, CLASSES)
    p = value["accuracy"]
    assert many["accuracy"][0] < p < many["accuracy"][1]
    assert many["recall"]["no"][0] < np.mean(logits[labels == 0].argmax(1) == 0) < many["recall"]["no"][1]
    assert many["auc"]["no"][0] < value["auc"]["no"] < many["auc"]["no"][1]
    # The standard error of an accuracy p is sqrt(p (1 - p) / n); a 95 % interval is 3.92 of them.
    assert many["accuracy"][1] - many["accuracy"][0] == pytest.approx(3.92 * np.sqrt(p * (1 - p) / 800), rel=0.3)
    assert few["macro_auc"][1] - few["macro_auc"][0] > 2 * (many["macro_auc"][1] - many["macro_auc"][0])
    rare = metrics.intervals(np.eye(3)[[0, 1]], np.array([0, 1]), CLASSES, resamples=20)  # resamples lack a class
    assert rare["auc"]["vort"] is rare["recall"]["vort"] is rare["macro_auc"] is None
    assert rare["accuracy"] == [pytest.approx(2 / (2 + 1.96**2), rel=1e-3), pytest.approx(1)]  # Wilson: 2 of 2 right


@pytest.mark.parametrize("n", [40, 900])
def test_one_percent_of_images_of_each_class_have_an_outlier_score_above_1(n):
    shape, centres = RNG.normal(size=(16, 16)), 9 * RNG.normal(size=(3, 16))

    def draw(n):
        labels = RNG.integers(3, size=n)
        scatter = np.array([0.5, 1.0, 2.0])[labels, None]  # classes are not equally wide
        return centres[labels] + scatter * RNG.normal(size=(n, 16)) @ shape, labels

    population = fit_population(*draw(n), num_classes=3)
    shapes = {"whitening": (16, 16), "centres": (3, 16), "radii": (3,)}
    assert {name: x.shape for name, x in population.items()} == shapes
    means, labels = draw(4000)
    rates = [(outlier_scores(population, means[labels == k]) > 1).mean() for k in range(3)]
    assert max(rates) < (0.04 if n == 900 else 0.4) and (n == 40 or min(rates) > 0.001), rates
    assert (outlier_scores(population, means + 20 * shape[0]) > 1).mean() > 0.9
    means = np.zeros((20, 4))  # one class alone, all channels dead
    population = fit_population(means, np.zeros(20, int), num_classes=3)
    assert all(np.isfinite(x).all() for x in population.values()) and outlier_scores(population, means + 1).min() > 1
    assert fit_population(means[:19], np.zeros(19, int), num_classes=3) is None


def test_training_metrics_are_means_over_the_epoch_and_numbers_that_are_not_finite_are_named():
    sums = {"loss": 6.0, "correct": 3, "count": 12}
    values = metrics.training_metrics(5, sums, started=time.perf_counter() - 2, count=4)
    assert values == {"train_loss": 0.5, "train_accuracy": 0.25, "images_per_second": pytest.approx(4, rel=0.1)}
    with pytest.raises(
        FloatingPointError, match="training loss is nan at step 5; start again with a lower learning rate"
    ):
        metrics.training_metrics(5, sums | {"loss": np.nan}, started=0.0, count=0)
    variables = {"params": {"head": {"bias": np.ones(3)}}, "batch_stats": {"norm0": {"mean": np.ones(2)}}}
    assert metrics.find_not_finite(variables) is None
    variables["batch_stats"]["norm0"]["mean"] = np.array([0, -np.inf], np.float32)
    assert metrics.find_not_finite(variables) == "batch_stats/norm0/mean"


def test_convergence_of_a_mass_sheet_is_its_density_and_that_of_shear_is_0():
    x, y = np.meshgrid(np.arange(-2, 3) * 0.4, -np.arange(-2, 3) * 0.4)
    sheet, shear = np.stack([0.3 * x, 0.3 * y], -1), np.stack([0.1 * x + 0.2 * y, 0.2 * x - 0.1 * y], -1)
    found = metrics.convergence(np.stack([sheet, sheet + shear, shear]), 0.4)
    np.testing.assert_allclose(found - np.array([0.3, 0.3, 0])[:, None, None], 0, atol=1e-12)


def test_maps_are_compared_in_cells_with_light_and_by_their_densest_cells():
    rng = np.random.default_rng(0)
    true, labels = 0.01 * rng.normal(size=(30, 6, 6, 2)), np.arange(30) % 3
    true[labels == 0] = 1e-9  # rounding
    light = np.ones((30, 6, 6))
    light[:, :, 0] = 0
    predicted = true + 0.001 * rng.normal(size=true.shape)
    predicted[:, :, 0] = 100  # without light
    values = metrics.evaluate_maps(predicted, true, light, labels, CLASSES, 0.4)
    assert values["no"]["r2"] is None and values["no"]["rms_mas"] < 1e-5
    assert values["no"]["error_mas"] == pytest.approx(1, rel=0.1)
    assert values["vort"]["rms_mas"] == pytest.approx(10, rel=0.1)
    assert values["vort"]["r2"] == pytest.approx(0.99, abs=0.003)
    light[:, :, 1] = 0  # whose convergence has the error beside it
    values = metrics.evaluate_maps(predicted, true, light, labels, CLASSES, 0.4)
    assert values["sphere"]["peak_found"] > 0.6 and values["sphere"]["peak_near"] >= values["sphere"]["peak_found"]
    point = np.zeros((3, 6, 6, 2))  # the deflection by a mass in one cell, and by one in the cell below
    point[:, 3, 4], point[:, 3, 2] = (0.1, 0), (-0.1, 0)
    point[:, 2, 3], point[:, 4, 3] = (0, 0.1), (0, -0.1)
    shifted = metrics.evaluate_maps(np.roll(point, 1, 1), point, np.ones((3, 6, 6)), np.arange(3), CLASSES, 0.4)["vort"]
    assert (shifted["peak_found"], shifted["peak_near"]) == (0, 1) and shifted["r2"] < 0
    nothing = metrics.evaluate_maps(predicted, true, 0 * light, labels, CLASSES, 0.4)["vort"]
    assert set(nothing.values()) == {None}
