import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gravlens_jax.config import CLASSES
from gravlens_jax.metrics import (
    calibration_error,
    evaluate,
    fit_population,
    fit_temperature,
    intervals,
    outlier_scores,
    roc_areas,
    softmax,
)

RNG = np.random.default_rng(0)


def test_metrics_agree_with_their_definitions():
    logits, labels = RNG.normal(size=(60, 3)), RNG.integers(0, 3, 60)
    values = evaluate(logits, labels, CLASSES)
    probabilities, guesses = softmax(logits), logits.argmax(1)
    assert values["n"] == 60 and values["classes"] == list(CLASSES)
    assert values["accuracy"] == np.mean(guesses == labels)
    assert values["loss"] == pytest.approx(-np.mean(np.log(probabilities[np.arange(60), labels])))
    assert values["macro_auc"] == pytest.approx(np.mean(list(values["auc"].values())))
    expected = [[np.sum((labels == k) & (guesses == j)) for j in range(3)] for k in range(3)]
    np.testing.assert_array_equal(values["confusion"], expected)


@pytest.mark.parametrize("decimals", [1, 16])  # many ties, none
def test_areas_are_those_of_scikit_learn(decimals):
    probabilities, labels = softmax(RNG.normal(size=(200, 3))).round(decimals), RNG.integers(0, 3, 200)
    expected = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    np.testing.assert_allclose(roc_areas(probabilities, labels), expected, rtol=1e-12)


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


def test_intervals_contain_the_value_and_shrink_with_the_number_of_images():
    labels = RNG.integers(0, 3, 800)
    logits = RNG.normal(size=(800, 3)) + 2 * np.eye(3)[labels]
    few, many = (intervals(logits[:n], labels[:n], CLASSES, resamples=100) for n in (50, 800))
    value = evaluate(logits, labels, CLASSES)
    p = value["accuracy"]
    assert many["accuracy"][0] < p < many["accuracy"][1]
    assert many["auc"]["no"][0] < value["auc"]["no"] < many["auc"]["no"][1]
    # The standard error of an accuracy p is sqrt(p (1 - p) / n); a 95 % interval is 3.92 of them.
    assert many["accuracy"][1] - many["accuracy"][0] == pytest.approx(3.92 * np.sqrt(p * (1 - p) / 800), rel=0.3)
    assert few["macro_auc"][1] - few["macro_auc"][0] > 2 * (many["macro_auc"][1] - many["macro_auc"][0])


def test_an_interval_is_none_if_a_resample_lacks_a_class():
    found = intervals(np.eye(3)[[0, 1]], np.array([0, 1]), CLASSES, resamples=20)
    assert found["auc"]["vort"] is None and found["macro_auc"] is None and len(found["accuracy"]) == 2


@pytest.mark.parametrize("n", [40, 900])
def test_one_percent_of_images_like_those_of_a_population_have_a_score_above_1(n):
    shape, centres = RNG.normal(size=(16, 16)), 3 * RNG.normal(size=(3, 16))

    def draw(n):
        labels = RNG.integers(3, size=n)
        return centres[labels] + RNG.normal(size=(n, 16)) @ shape, labels

    population = fit_population(*draw(n), num_classes=3)
    assert {name: x.shape for name, x in population.items()} == {"whitening": (16, 16), "centres": (3, 16)}
    means, _ = draw(4000)
    assert 0.001 < np.mean(outlier_scores(population, means) > 1) < (0.02 if n == 900 else 0.1)
    assert (outlier_scores(population, means + 8 * shape[0]) > 1).mean() > 0.9


def test_populations_of_degenerate_images_are_finite():
    means = np.zeros((20, 4))  # one class alone, all channels dead
    population = fit_population(means, np.zeros(20, int), num_classes=3)
    assert all(np.isfinite(x).all() for x in population.values()) and outlier_scores(population, means + 1).min() > 1
    assert fit_population(means[:19], np.zeros(19, int), num_classes=3) is None
