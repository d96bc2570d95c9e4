"""What a classifier is worth: accuracy, cross-entropy, confusion, ROC, AUC, calibration. Pure, NumPy in and out."""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns float64 probabilities (n, classes)."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Returns the expected calibration error: mean |accuracy - confidence| over `bins` equal confidence bins.

    Guo et al. 2017, arXiv 1706.04599, eq. 3.
    """
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the positive number that logits should be divided by: the one of lowest cross-entropy.

    Guo et al. 2017, arXiv 1706.04599, section 4.2. It changes no prediction, only how sure it is.

    Args:
      logits: float (n, classes), n >= 1, of images that the network was not trained on.
      labels: int (n,).
    """
    found = minimize_scalar(lambda log: _loss(softmax(logits / np.exp(log)), labels), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def _loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(own, np.finfo(np.float64).tiny))))


def intervals(
    logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], resamples: int = 300, seed: int = 0
) -> dict[str, Any]:
    """Returns 95 % intervals by bootstrap over the images: [low, high] for accuracy, macro_auc and each class's auc.

    None for an AUC that is undefined in one of the resamples. Percentiles; they know of the images' scatter alone, not
    of how another training would end.

    Args:
      logits, labels, classes: as in `evaluate`.
      resamples: sets of n images drawn with replacement.
      seed: of the draw.
    """
    rng, values = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = rng.integers(len(labels), size=len(labels))
        values.append(evaluate(logits[rows], labels[rows], classes))

    def interval(name: str, key: str | None = None) -> list[float] | None:
        numbers = [value[name] if key is None else value[name][key] for value in values]
        return None if None in numbers else np.quantile(numbers, [0.025, 0.975]).tolist()

    auc = {name: interval("auc", name) for name in classes}
    return {"accuracy": interval("accuracy"), "macro_auc": interval("macro_auc"), "auc": auc}


def roc_curves(probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, tuple | None]:
    """Returns class -> (false positive rates, true positive rates, AUC), one class against the rest.

    None for a class that all or none of the labels are.
    """
    curves: dict[str, tuple | None] = {}
    for k, name in enumerate(classes):
        positive = labels == k
        curves[name] = None
        if 0 < positive.sum() < len(labels):
            false_positive, true_positive, _ = roc_curve(positive, probabilities[:, k])
            curves[name] = false_positive, true_positive, float(roc_auc_score(positive, probabilities[:, k]))
    return curves


def evaluate(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of a set of predictions, ready for JSON.

    Args:
      logits: float (n, classes), n >= 1.
      labels: int (n,).
      classes: names.

    Returns:
      n, accuracy, loss (mean cross-entropy), auc (class -> value, None where undefined), macro_auc (None unless all
      are defined), ece, confusion (rows are the truth), classes.
    """
    probabilities = softmax(logits)
    auc = {name: curve and curve[2] for name, curve in roc_curves(probabilities, labels, classes).items()}
    return {
        "n": len(labels),
        "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
        "loss": _loss(probabilities, labels),
        "auc": auc,
        "macro_auc": None if None in auc.values() else float(np.mean(list(auc.values()))),
        "ece": calibration_error(probabilities, labels),
        "confusion": confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes))).tolist(),
        "classes": list(classes),
    }
