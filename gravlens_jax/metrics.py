"""Metrics of a classifier: accuracy, cross-entropy, confusion, ROC, AUC, calibration, outlier scores.

Pure functions of arrays.
"""

from typing import Any

import numpy as np


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
    """Returns the temperature, by which logits should be divided, with the lowest cross-entropy.

    Guo et al., section 4.2. `logits` are float (n, classes), n >= 1, of images that the network was not trained on,
    `labels` int (n,). The temperature changes the confidence of predictions, not their classes.
    """
    from scipy.optimize import minimize_scalar  # slow to import, as scikit-learn is

    found = minimize_scalar(lambda log: _loss(softmax(logits / np.exp(log)), labels), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def fit_population(
    means: np.ndarray, labels: np.ndarray, num_classes: int, folds: int = 10
) -> dict[str, np.ndarray] | None:
    """Returns the population from which `outlier_scores` measures; None for fewer than 20 images, which are too few.

    A Gaussian for each class, with a common covariance (Lee et al. 2018, arXiv 1807.03888, eq. 1 and 2, with channels
    of all stages as in their section 2.2), scaled so that 1 % of images like these have a score above 1. This quantile
    is found by cross-validation, because distances of images that a covariance was estimated from are too short.

    Args:
      means: float (n, channels), from `inference.outputs`, of images that the network was not trained on.
      labels: int (n,).
      num_classes: of the network; one without images gets the mean of all.
      folds: of the cross-validation.

    Returns:
      float32 whitening (channels, channels), and centres (num_classes, channels), which are whitened.
    """
    if len(labels) < 20:
        return None
    fold, scores = np.arange(len(labels)) % folds, np.empty(len(labels))
    for k in range(folds):
        others = _fit_gaussians(means[fold != k], labels[fold != k], num_classes)
        scores[fold == k] = outlier_scores(others, means[fold == k])
    unit = max(np.quantile(scores, 0.99), 1e-6)
    gaussians = _fit_gaussians(means, labels, num_classes)
    return {name: (array / unit).astype(np.float32) for name, array in gaussians.items()}


def _fit_gaussians(means: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    from sklearn.covariance import LedoitWolf

    means = means.astype(np.float64)
    own = [means[labels == k] for k in range(num_classes)]
    centres = np.stack([(some if len(some) else means).mean(0) for some in own])
    covariance = LedoitWolf(assume_centered=True).fit(means - centres[labels]).covariance_
    # Channels that are always 0 in these images, but perhaps not in others, get a small variance.
    covariance += np.eye(len(covariance)) * (1e-4 * np.trace(covariance) / len(covariance) + 1e-12)
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return {"whitening": whitening, "centres": centres @ whitening}


def outlier_scores(population: dict[str, np.ndarray] | None, means: np.ndarray) -> np.ndarray:
    """Returns the Mahalanobis distance to the nearest class, float32 (n,), in units of that which 1 % exceed.

    `population` is a result of `fit_population`, `means` float (n, channels); NaN without a population.
    """
    if population is None:
        return np.full(len(means), np.nan, np.float32)
    whitening, centres = (np.asarray(population[name], np.float64) for name in ("whitening", "centres"))
    white = means.astype(np.float64) @ whitening
    return np.stack([np.linalg.norm(white - centre, axis=1) for centre in centres]).min(0).astype(np.float32)


def _loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(own, np.finfo(np.float64).tiny))))


def intervals(
    logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], resamples: int = 300, seed: int = 0
) -> dict[str, Any]:
    """Returns 95 % intervals by bootstrap over the images: [low, high] for accuracy, macro_auc and each class's auc.

    None for an AUC that is undefined in one of the resamples, which are sets of n images drawn with replacement. The
    percentiles reflect the choice of test images alone, not the scatter between trainings. Arguments as in `evaluate`.
    """
    probabilities, rng, values = softmax(logits), np.random.default_rng(seed), []
    correct = probabilities.argmax(1) == labels
    for _ in range(resamples):
        rows = rng.integers(len(labels), size=len(labels))
        areas = roc_areas(probabilities[rows], labels[rows])
        values.append([correct[rows].mean(), areas.mean(), *areas])
    lows, highs = np.quantile(values, [0.025, 0.975], axis=0).tolist()
    pairs = [None if np.isnan(low) else [low, high] for low, high in zip(lows, highs, strict=True)]
    return {"accuracy": pairs[0], "macro_auc": pairs[1], "auc": dict(zip(classes, pairs[2:], strict=True))}


def roc_areas(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the area under each class's ROC curve, one class against the rest, float64 (classes,).

    It is the probability that an image of the class has a higher score than another image; ties count half
    (Hanley & McNeil 1982, Radiology 143, 29). NaN for a class that contains all or none of the images.
    `probabilities` are float (n, classes), `labels` int (n,).
    """
    areas = np.full(probabilities.shape[1], np.nan)
    for k, scores in enumerate(probabilities.T):
        own, others = scores[labels == k], np.sort(scores[labels != k])
        if len(own) and len(others):
            wins = np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")
            areas[k] = wins.mean() / (2 * len(others))
    return areas


def evaluate(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of a set of predictions, ready for JSON.

    Args:
      logits: float (n, classes), n >= 1.
      labels: int (n,).
      classes: names.

    Returns:
      n, accuracy, loss (mean cross-entropy), auc (class -> value, None where undefined), macro_auc (None unless all
      are defined), ece (expected calibration error), confusion (rows are the true classes), classes.
    """
    from sklearn.metrics import confusion_matrix

    probabilities = softmax(logits)
    areas = roc_areas(probabilities, labels)
    *auc, macro_auc = (None if np.isnan(area) else float(area) for area in (*areas, areas.mean()))
    return {
        "n": len(labels),
        "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
        "loss": _loss(probabilities, labels),
        "auc": dict(zip(classes, auc, strict=True)),
        "macro_auc": macro_auc,
        "ece": calibration_error(probabilities, labels),
        "confusion": confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes))).tolist(),
        "classes": list(classes),
    }
