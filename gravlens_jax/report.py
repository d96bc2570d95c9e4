"""The report on a network: metrics, predictions and figures for labelled images. Matplotlib is imported for drawing."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax import files, inference, metrics
from gravlens_jax.config import Checkpoint
from gravlens_jax.datasets import map_renderer
from gravlens_jax.network import Network
from gravlens_jax.npz import Dataset, read_rows, scale
from gravlens_jax.preprocess import check_image_shape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for colour-blind eyes
WRONG = "#C00000"  # of a wrong prediction


def evaluate_network(
    network: Network,
    dataset: Dataset,
    *,
    checkpoint: Checkpoint = "best",
    out: Path | None = None,
    tta: bool = False,
    history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Evaluates a network on labelled images, in its order of classes; writes the report to the folder `out`, if given.

    Existing files are replaced. `checkpoint` is recorded; `tta` averages over mirror images, see `predict_logits`;
    `history`, lines of metrics.jsonl, is for history.png. Returns the contents of metrics.json: those of
    `metrics.evaluate`, and `checkpoint`, `tta`, `interval_95` (see `metrics.intervals`), `temperature`,
    `ece_uncalibrated`, without the temperature, `outliers`, the fraction of images with an outlier score above 1 (None
    if the network has no population), and `deflection`, see `metrics.evaluate_maps` (None unless the network predicts
    deflections and the images are simulated).
    """
    (model, variables), images, labels = network, dataset.images, dataset.labels
    check_image_shape(dataset.image_shape, network.image_shape, "the images")
    has_maps = inference.has_deflection(model, variables)
    logits, means, *found = inference.outputs(model, variables, images, tta=tta, maps=has_maps)
    maps, light = found[:1], found[1:]
    outlier = metrics.outlier_scores(variables.get("population"), means)
    values = metrics.evaluate(logits, labels, model.classes) | {
        "checkpoint": checkpoint,
        "tta": tta,
        "interval_95": metrics.intervals(logits, labels, model.classes),
        "temperature": network.temperature,
        "ece_uncalibrated": metrics.calibration_error(metrics.softmax(logits * network.temperature), labels),
        "outliers": None if np.isnan(outlier).any() else float(np.mean(outlier > 1)),
        "deflection": None,
    }
    if has_maps and (render := map_renderer(dataset, model.input, model.pixel_scale)):
        maps.append(render(np.arange(dataset.size)))
        values["deflection"] = metrics.evaluate_maps(
            maps[0], maps[1], light[0], labels, model.classes, network.cell_width
        )
    if out is None:
        return values
    arrays = {"logits": logits, "outlier": outlier, "labels": labels, "classes": np.array(model.classes)}
    files.write_atomically(out / "metrics.json", json.dumps(values, indent=2) + "\n")
    files.write_arrays(out / "predictions.npz", arrays)
    save_figure(draw_roc(logits, labels, model.classes), out / "roc.png")
    save_figure(draw_confusion(values), out / "confusion.png")
    save_figure(draw_examples(images, logits, labels, model.classes), out / "examples.png")
    if history:
        save_figure(draw_history(history), out / "history.png")
    if has_maps:
        rows = np.concatenate([np.flatnonzero(labels == k)[:3] for k in range(len(model.classes))])
        few = read_rows(images, rows), [array[rows] for array in maps], logits[rows], labels[rows]
        save_figure(draw_substructure(network, *few), out / "substructure.png")
    return values


def table(values: dict[str, Any], where: Path) -> str:
    """Returns the result of `evaluate_network` as a small text table, with the path of the report."""
    auc = values["auc"] | {"macro": values["macro_auc"]}
    confusion = zip(values["classes"], values["confusion"], strict=True)
    recall = {name: row[k] / sum(row) if sum(row) else None for k, (name, row) in enumerate(confusion)}
    (low, high), outliers = values["interval_95"]["accuracy"], values["outliers"]
    maps = "".join(
        f"\n  deflection of {name}: R2 {m['r2']:.3f}, error {m['error_mas']:.1f} of {m['rms_mas']:.1f} mas, "
        f"densest cell found in {m['peak_found']:.0%}, with its neighbours in {m['peak_near']:.0%}"
        for name, m in (values["deflection"] or {}).items()
        if m["r2"] is not None
    )
    return f"""{values["n"]:,} images, {values["checkpoint"]} checkpoint
  accuracy {values["accuracy"]:.4f} (95 % interval {low:.4f} to {high:.4f})   loss {values["loss"]:.4f}
  calibration error {values["ece"]:.4f} ({values["ece_uncalibrated"]:.4f} without temperature scaling)
  outliers {"-" if outliers is None else f"{outliers:.1%}"} (about 1 % of images like those of training)
  recall   {"   ".join(f"{name} {'-' if v is None else f'{v:.3f}'}" for name, v in recall.items())}
  AUC      {"   ".join(f"{name} {'-' if v is None else f'{v:.4f}'}" for name, v in auc.items())}{maps}
report: {where}"""


def new_figure(width: float, height: float, dpi: int = 130) -> Any:
    """Returns a matplotlib Figure of this size in inches that needs no display."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=dpi, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi="figure")
    files.write_atomically(path, data.getvalue())


def _show_image(axes: Any, image: np.ndarray, title: str, correct: bool, **options: Any) -> None:
    """Draws the square root of the image scaled to [0, 1]; the title is red unless `correct`."""
    axes.imshow(np.sqrt(scale(image)), cmap="inferno", **options)
    axes.set_title(title, fontsize=8, color="black" if correct else WRONG)


def draw_history(lines: Sequence[dict[str, Any]]) -> Any:
    """Returns a figure of loss, accuracy and learning rate over the epochs; `lines` as in metrics.jsonl."""
    epochs = [line["epoch"] for line in lines]
    figure = new_figure(10, 3)
    for axes, quantity in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate"), strict=True):
        if quantity == "learning_rate":
            axes.semilogy(epochs, [max(line[quantity], 1e-12) for line in lines], "o-", color="0.3", ms=3)
        else:
            for split, name, colour in (("train", "train", COLOURS[0]), ("val", "validation", COLOURS[1])):
                values = [line[f"{split}_{quantity}"] for line in lines]
                axes.plot(epochs, values, "o-", color=colour, ms=3, label=name)
            axes.legend(frameon=False)
        axes.set(xlabel="epoch", title=quantity.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure


def draw_roc(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Any:
    """Returns a figure of one ROC curve for each class against the rest."""
    from sklearn.metrics import roc_curve

    figure, probabilities = new_figure(4.2, 4), metrics.softmax(logits)
    axes = figure.subplots()
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{len(labels):,} images", aspect="equal")
    for k, area in enumerate(metrics.roc_areas(probabilities, labels)):
        if not np.isnan(area):
            rates = roc_curve(labels == k, probabilities[:, k])[:2]
            axes.plot(*rates, color=COLOURS[k % len(COLOURS)], label=f"{classes[k]}: AUC {area:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="0.6", label="chance")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    return figure


def draw_confusion(values: dict[str, Any]) -> Any:
    """Returns a figure of the confusion matrix of `metrics.evaluate`, coloured by the fraction of the true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.array(values["confusion"])
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(4.2, 3.8)
    axes = figure.subplots()
    shown = ConfusionMatrixDisplay(fractions, display_labels=values["classes"]).plot(cmap="Blues", ax=axes)
    for (row, column), text in np.ndenumerate(shown.text_):
        fraction = f"{fractions[row, column]:.1%}" if counts[row].any() else "no images"
        text.set_text(f"{counts[row, column]:,}\n{fraction}")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {values['accuracy']:.1%}")
    return figure


def draw_examples(images: inference.Images, logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Any:
    """Returns a figure with a row of images for each class, titled by prediction; wrong ones last, in red."""
    probabilities, columns = metrics.softmax(logits), 6
    predicted = probabilities.argmax(1)
    figure = new_figure(1.5 * columns, 1.75 * len(classes))
    for label, row in enumerate(figure.subplots(len(classes), columns, squeeze=False)):
        correct = np.flatnonzero((labels == label) & (predicted == label))
        wrong = np.flatnonzero((labels == label) & (predicted != label))[: columns // 2]
        chosen = np.concatenate([correct[: columns - len(wrong)], wrong])
        for axes in row:
            axes.axis("off")
        for axes, index, image in zip(row, chosen, read_rows(images, chosen), strict=False):
            title = f"{classes[label]} → {classes[predicted[index]]} {probabilities[index].max():.2f}"
            _show_image(axes, image, title, predicted[index] == label)
    figure.suptitle("true class → predicted class and its probability", fontsize=9)
    return figure


def draw_substructure(
    network: Network, images: np.ndarray, maps: list[np.ndarray], logits: np.ndarray, labels: np.ndarray
) -> Any:
    """Returns a figure with a row of up to 3 images for each class, each with its maps of the substructure.

    `maps`, float (n, cells, cells, 2) in arcsec, are predicted and perhaps true; drawn is their convergence.
    """
    columns, probabilities, (model, _), width = 3, metrics.softmax(logits), network, network.cell_width
    x, y = inference.deflection_grid(model, network.image_shape)
    shown = [metrics.convergence(array, width) for array in maps[::-1]]
    limit = max(float(np.quantile(np.abs(shown[0]), 0.999)), 1e-6)
    each, names = 1 + len(maps), ["true map", "predicted map"][-len(maps) :]
    figure = new_figure(1.25 * each * columns + 1, 1.5 * len(model.classes) + 0.4)
    grid = figure.subplots(len(model.classes), each * columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel():
        axes.set(frame_on=False)
        axes.tick_params(labelsize=6, length=2)
    edges = [x[0, 0] - width / 2, x[0, -1] + width / 2, y[-1, 0] - width / 2, y[0, 0] + width / 2]
    half = [length / 2 * (model.pixel_scale or 1) for length in network.image_shape]
    for label, row in enumerate(grid):
        row[0].set_ylabel(f"{model.classes[label]}\n[arcsec]", fontsize=8)
        for column, index in enumerate(np.flatnonzero(labels == label)):
            left, *others = row[column * each : (column + 1) * each]
            predicted = probabilities[index].argmax()
            title = f"predicted: {model.classes[predicted]} {probabilities[index].max():.2f}"
            _show_image(left, images[index], title, predicted == label, extent=(-half[1], half[1], -half[0], half[0]))
            for axes, array, name in zip(others, shown, names, strict=True):
                drawn = axes.imshow(array[index], cmap="PuOr_r", vmin=-limit, vmax=limit, extent=edges)
                axes.set_title(name, fontsize=8)
    grid[0, 0].set(xlim=edges[:2], ylim=edges[2:])
    figure.colorbar(drawn, ax=grid, label="convergence of the substructure", shrink=0.8, pad=0.01, extend="both")
    return figure
