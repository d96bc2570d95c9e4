import numpy as np
import pytest

from gravlens_jax.config import CLASSES
from gravlens_jax.metrics import calibration_error, evaluate, softmax

RNG = np.random.default_rng(0)


def test_metrics_agree_with_their_definitions():
    logits, labels = RNG.normal(size=(60, 3)), RNG.integers(0, 3, 60)
    values = evaluate(logits, labels, CLASSES)
    probabilities = softmax(logits)
    guesses = logits.argmax(1)
    assert values["n"] == 60 and values["classes"] == list(CLASSES)
    assert values["accuracy"] == np.mean(guesses == labels)
    assert values["loss"] == pytest.approx(-np.mean(np.log(probabilities[np.arange(60), labels])))
    for k, name in enumerate(CLASSES):
        # AUC is the chance that a random positive is ranked above a random negative.
        score = probabilities[:, k]
        pairs = score[labels == k][:, None] - score[labels != k]
        assert values["auc"][name] == pytest.approx(np.mean(pairs > 0))
        for j in range(3):
            assert values["confusion"][k][j] == np.sum((labels == k) & (guesses == j))
    assert values["macro_auc"] == pytest.approx(np.mean(list(values["auc"].values())))


def test_an_absent_class_has_no_auc_but_keeps_its_row():
    values = evaluate(RNG.normal(size=(10, 3)), np.array([0, 2] * 5), CLASSES)
    assert values["auc"]["sphere"] is None and values["macro_auc"] is None
    assert values["auc"]["no"] is not None
    assert values["confusion"][1] == [0, 0, 0]


def test_one_example_of_one_class():
    values = evaluate(np.array([[3.0, 0.0, 0.0]]), np.array([0]), CLASSES)
    assert values["accuracy"] == 1 and set(values["auc"].values()) == {None}


def test_extreme_logits_stay_finite():
    values = evaluate(np.array([[1e4, -1e4, 0.0]], np.float32), np.array([1]), CLASSES)
    assert np.isfinite(values["loss"])


def test_calibration_error():
    probabilities = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10)
    labels = np.array([0] * 9 + [1] + [1] * 10)  # 90 % sure and right in 9 of 10; 60 % sure and always wrong
    assert calibration_error(probabilities, labels) == pytest.approx(0.3)
