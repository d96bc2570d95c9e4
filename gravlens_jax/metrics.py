"""Metrics of a classifier: accuracy, cross-entropy, confusion, AUC, calibration, outlier scores. Pure functions."""

import math
import time
from typing import Any

import numpy as np

NO_DEFLECTION = 1e-6  # arcsec; rounding gives a lens without substructure less
VISIBLE = 0.05  # mean pixel, of images in [0, 1], from which on the light of a cell shows its deflection
ADVICE = "start again with a lower learning rate (checkpoints that were saved before are intact)"


def mean_metrics(sums: dict[str, Any]) -> tuple[float, float]:
    """Returns the mean loss and the accuracy of the sums of `train_step`."""
    return float(sums["loss"]) / float(sums["count"]), float(sums["correct"]) / float(sums["count"])


def training_metrics(step: int, sums: dict[str, Any], started: float, count: int) -> dict[str, float]:
    """Returns train_loss, train_accuracy and images_per_second of an epoch; FloatingPointError if it is not finite.

    `started` is the time and `count` the number of images when the epoch, or its continuation, began.
    """
    check_finite(float(sums["loss"]), "training loss", step)
    loss, accuracy = mean_metrics(sums)
    rate = (int(sums["count"]) - count) / (time.perf_counter() - started)
    return {"train_loss": loss, "train_accuracy": accuracy, "images_per_second": rate}


def check_finite(loss: float, name: str, step: int) -> None:
    """Raises FloatingPointError unless the loss is finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name} is {loss} at step {step}; {ADVICE}")


def check_state(state: Any) -> None:
    """Raises FloatingPointError if a parameter of a TrainState is not finite, or all gradients of the epoch are 0.

    The loss alone does not show it: compiled CPU programs may drop NaN, and the loss of a dead network is ln(classes).
    """
    if name := find_not_finite({"params": state.params, "batch_stats": state.batch_stats}):
        raise FloatingPointError(f"{name} is not finite at step {int(state.step)}; {ADVICE}")
    if int(state.sums["count"]) and not float(state.sums["gradient"]) > 0:
        raise FloatingPointError(f"all gradients of the epoch are 0 at step {int(state.step)}: dead network; {ADVICE}")


def find_not_finite(variables: Any, name: str = "") -> str | None:
    """Returns the name of the first array that is not finite, in nested dicts of arrays; None for none."""
    if not isinstance(variables, dict):  # NumPy, because XLA drops NaN
        return None if np.isfinite(np.asarray(variables)).all() else name
    found = (find_not_finite(value, f"{name}/{key}".lstrip("/")) for key, value in variables.items())
    return next(filter(None, found), None)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns float64 probabilities (n, classes)."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def _loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    true = probabilities[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(true, np.finfo(np.float64).tiny))))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) over equal confidence bins."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature, by which logits should be divided: 1 without evidence for another one.

    Guo et al., section 4.2: it minimizes the summed cross-entropy, here with a normal prior: plus (ln T / 0.2)^2 / 2.
    Otherwise a few images that are all right, or one that is wrong, would give T = 0 or infinity. `logits` are float
    (n, classes), n >= 1, of images that the network was not trained on; `labels` int (n,).
    """
    from scipy.optimize import minimize_scalar  # slow to import, as scipy.stats and scikit-learn are

    def loss(log):
        return len(labels) * _loss(softmax(logits / np.exp(log)), labels) + (log / 0.2) ** 2 / 2

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def fit_population(means: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray] | None:
    """Returns the population from which `outlier_scores` measures; None for fewer than 20 images, which are too few.

    A Gaussian for each class, with a common covariance (Lee et al. 2018, arXiv 1807.03888, eq. 1 and 2, with channels
    of all stages as in their section 2.2), and for each class the distance that 1 % of the images nearest to it exceed,
    by cross-validation, because distances of images that a covariance was estimated from are too short.

    `means` are float (n, channels), from `inference.outputs`, of images that the network was not trained on, `labels`
    int (n,); a class without images gets the mean of all. The result has float32 whitening (channels, channels),
    centres (num_classes, channels), which are whitened, and radii (num_classes,), those quantiles.
    """
    if len(labels) < 20:
        return None
    fold, distances = np.arange(len(labels)) % 10, np.empty((len(labels), num_classes))
    for k in range(10):
        others = _fit_gaussians(means[fold != k], labels[fold != k], num_classes)
        distances[fold == k] = _distances(others, means[fold == k])
    nearest, shortest = distances.argmin(1), distances.min(1)
    groups = [shortest[nearest == k] if (nearest == k).sum() >= 20 else shortest for k in range(num_classes)]
    radii = {"radii": np.array([max(np.quantile(group, 0.99), 1e-6) for group in groups])}
    return {name: x.astype(np.float32) for name, x in (_fit_gaussians(means, labels, num_classes) | radii).items()}


def _fit_gaussians(means: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    from sklearn.covariance import LedoitWolf

    means = means.astype(np.float64)
    classes = [means[labels == k] for k in range(num_classes)]
    centres = np.stack([(images if len(images) else means).mean(0) for images in classes])
    covariance = LedoitWolf(assume_centered=True).fit(means - centres[labels]).covariance_
    # Channels that are always 0 in these images, but perhaps not in others, get a small variance.
    covariance += np.eye(len(covariance)) * (1e-4 * np.trace(covariance) / len(covariance) + 1e-12)
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    return {"whitening": whitening, "centres": centres @ whitening}


def outlier_scores(population: dict[str, np.ndarray] | None, means: np.ndarray) -> np.ndarray:
    """Returns the Mahalanobis distance to the nearest class, float32 (n,), in units of that which 1 % exceed there.

    `population` is a result of `fit_population`, `means` float (n, channels); NaN without a population.
    """
    if population is None:
        return np.full(len(means), np.nan, np.float32)
    distances = _distances(population, means)
    return (distances.min(1) / np.asarray(population["radii"])[distances.argmin(1)]).astype(np.float32)


def _distances(population: dict[str, np.ndarray], means: np.ndarray) -> np.ndarray:
    whitening, centres = (np.asarray(population[name], np.float64) for name in ("whitening", "centres"))
    white = means @ whitening
    return np.stack([np.linalg.norm(white - centre, axis=1) for centre in centres], 1)


def intervals(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], resamples: int = 300) -> dict[str, Any]:
    """Returns 95 % intervals: [low, high] for accuracy, each class's recall, macro_auc and each class's auc.

    Accuracy and recall have Wilson intervals, AUCs the percentiles of a bootstrap over the images. None for the recall
    of an absent class, and for an AUC that is undefined in a resample or does not vary, as of separated classes. The
    intervals reflect the choice of test images alone, not the scatter between trainings.
    """
    from scipy.stats import binomtest

    def wilson(correct):
        return [*binomtest(correct.sum(), len(correct)).proportion_ci(method="wilson")] if len(correct) else None

    probabilities, rng, values = softmax(logits), np.random.default_rng(0), []
    correct = probabilities.argmax(1) == labels
    for _ in range(resamples):
        rows = rng.integers(len(labels), size=len(labels))
        areas = roc_areas(probabilities[rows], labels[rows])
        values.append([areas.mean(), *areas])
    lows, highs = np.quantile(values, [0.025, 0.975], axis=0).tolist()
    macro_auc, *auc = ([low, high] if low < high else None for low, high in zip(lows, highs, strict=True))
    return {
        "accuracy": wilson(correct),
        "recall": {name: wilson(correct[labels == k]) for k, name in enumerate(classes)},
        "macro_auc": macro_auc,
        "auc": dict(zip(classes, auc, strict=True)),
    }


def roc_areas(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the area under each class's ROC curve, one class against the rest, float64 (classes,).

    It is the probability that an image of the class has a higher score than another image; ties count half (Hanley &
    McNeil 1982, Radiology 143, 29). NaN for a class of all or no images. `labels` are int (n,).
    """
    from scipy.stats import rankdata

    members = labels[:, None] == np.arange(probabilities.shape[1])
    n = members.sum(0)
    wins = (rankdata(probabilities, axis=0) * members).sum(0) - n * (n + 1) / 2
    return np.divide(wins, n * (len(labels) - n), out=np.full(len(n), np.nan), where=n % len(labels) != 0)


def convergence(deflection: np.ndarray, cell_width: float) -> np.ndarray:
    """Returns the surface density in critical units, float (n, cells, cells): half the divergence of the deflection.

    Maps (n, cells, cells, 2) and `cell_width` are in arcsec, row 0 at +y. Differences are central, at edges one-sided.
    """
    dx_dx = np.gradient(deflection[..., 0], cell_width, axis=-1)
    return (dx_dx - np.gradient(deflection[..., 1], cell_width, axis=-2)) / 2


def evaluate_maps(
    predicted: np.ndarray,
    true: np.ndarray,
    light: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    width: float,
) -> dict[str, Any]:
    """Returns how well deflections are predicted, class -> metrics ready for JSON, in cells with visible light.

    They are rms_mas of the true deflection and error_mas, the root mean square error, in milliarcseconds; r2, 1 -
    sum(error^2) / sum((true - mean)^2) over both components; peak_found and peak_near, the fractions of images whose
    predicted convergence is largest in the cell where the true one is, or in one of the eight cells around it. None
    where there is no substructure, or no image.

    `predicted` and `true` are float (n, cells, cells, 2), arcsec; `light`, float (n, cells, cells), is the mean pixel
    in [0, 1], visible from VISIBLE on; `labels`, int (n,), index `classes`; `width` is that of a cell, arcsec.
    """
    visible, values = light >= VISIBLE, {}
    peaks = [np.where(visible, convergence(maps, width), -np.inf).reshape(len(maps), -1) for maps in (predicted, true)]
    rows, columns = np.unravel_index([peak.argmax(1) for peak in peaks], light.shape[1:])
    distance = np.maximum(abs(rows[0] - rows[1]), abs(columns[0] - columns[1]))
    for k, name in enumerate(classes):
        images = (labels == k) & visible.any((1, 2))
        error, truth = (maps[images][visible[images]].astype(np.float64) for maps in (predicted - true, true))
        empty, dark = not images.any(), not (np.abs(truth) > NO_DEFLECTION).any()
        values[name] = {
            "rms_mas": None if empty else 1e3 * float(np.sqrt((truth**2).mean())),
            "error_mas": None if empty else 1e3 * float(np.sqrt((error**2).mean())),
            "r2": None if dark else float(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum()),
            "peak_found": None if dark else float((distance[images] == 0).mean()),
            "peak_near": None if dark else float((distance[images] <= 1).mean()),
        }
    return values


def evaluate(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the metrics of predictions, ready for JSON: `logits` are float (n, classes), n >= 1, `labels` int (n,).

    They are n, accuracy, loss (mean cross-entropy), auc (class -> value, None where undefined), macro_auc (None unless
    all are defined), ece (expected calibration error), confusion (rows are the true classes), classes.
    """
    probabilities, confusion = softmax(logits), np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    areas = roc_areas(probabilities, labels)
    *auc, macro_auc = (None if np.isnan(area) else float(area) for area in (*areas, areas.mean()))
    return {
        "n": len(labels),
        "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
        "loss": _loss(probabilities, labels),
        "auc": dict(zip(classes, auc, strict=True)),
        "macro_auc": macro_auc,
        "ece": calibration_error(probabilities, labels),
        "confusion": confusion.tolist(),
        "classes": list(classes),
    }
