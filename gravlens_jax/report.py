"""Figures of a run, from saved arrays alone; never imports jax."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gravlens_jax.files import write_atomically
from gravlens_jax.metrics import evaluate, roc_curves, softmax

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for colour-blind eyes
DPI = 130
# Validation accuracy of GravLensNet's published run after each of its epochs of 30,000 real images, from the record in
# its repository, https://github.com/harish-jhr/GravLensNet.
GRAVLENSNET = (
    *(0.336, 0.339, 0.526, 0.610, 0.510, 0.793, 0.728, 0.713, 0.760, 0.814),
    *(0.773, 0.790, 0.822, 0.882, 0.843, 0.879, 0.877, 0.876, 0.888, 0.791),
)


def draw(
    out: Path,
    images: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    history: list[dict] | None = None,
) -> None:
    """Writes roc.png, confusion.png, examples.png and, if there is a history, history.png into the folder `out`.

    Args:
      out: an existing folder.
      images: (n, height, width).
      logits: float (n, classes).
      labels: int (n,).
      classes: names.
      history: the lines of metrics.jsonl.
    """
    draw_roc(out / "roc.png", logits, labels, classes)
    draw_confusion(out / "confusion.png", logits, labels, classes)
    draw_examples(out / "examples.png", images, logits, labels, classes)
    if history:
        draw_history(out / "history.png", history)


def table(values: dict[str, Any], where: Path) -> str:
    """Returns what `evaluate.evaluate_run` does as a small text table, and where the report is."""
    auc = values["auc"] | {"macro": values["macro_auc"]}
    confusion = zip(values["classes"], values["confusion"], strict=True)
    recall = {name: f"{row[k] / max(1, sum(row)):.3f}" for k, (name, row) in enumerate(confusion)}
    low, high = values["interval_95"]["accuracy"]
    lines = [
        f"{values['n']:,} images, {values['checkpoint']} checkpoint",
        f"  accuracy {values['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})   loss {values['loss']:.4f}",
        f"  calibration error {values['ece']:.4f} ({values['ece_uncalibrated']:.4f} without its temperature)",
        "  recall   " + "   ".join(f"{name} {value}" for name, value in recall.items()),
        "  AUC      " + "   ".join(f"{name} {'-' if v is None else f'{v:.4f}'}" for name, v in auc.items()),
        f"report: {where}",
    ]
    return "\n".join(lines)


def _save(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_atomically(path, data.getvalue())


def draw_history(path: Path, lines: list[dict]) -> None:
    """Loss, accuracy and learning rate over the epochs; `lines` as in metrics.jsonl."""
    epochs = [line["epoch"] for line in lines]
    figure = Figure((10, 3), dpi=DPI, layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate"), strict=True):
        if quantity == "learning_rate":
            axes.semilogy(epochs, [max(line[quantity], 1e-12) for line in lines], "o-", color="0.3", ms=3)
        else:
            for split, colour in (("train", COLOURS[0]), ("val", COLOURS[1])):
                values = [line[f"{split}_{quantity}"] for line in lines]
                axes.plot(epochs, values, "o-", color=colour, ms=3, label={"val": "validation"}.get(split, split))
            axes.legend(frameon=False)
        axes.set(xlabel="epoch", title=quantity.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_learning_curves(path: Path, histories: dict[str, list[dict]]) -> None:
    """Validation accuracy of several runs over image-steps and minutes, beside GravLensNet's over image-steps.

    Args:
      path: where to write the PNG.
      histories: name -> lines as in metrics.jsonl; those with a real_accuracy are shown with it too.
    """
    figure = Figure((9, 3.4), dpi=100, layout="constrained")
    by_steps, by_minutes = figure.subplots(1, 2, sharey=True)
    for colour, (name, lines) in zip(COLOURS, histories.items(), strict=False):
        seen = [line["image_steps"] / 1000 for line in lines]
        minutes = np.cumsum([line["wall_seconds"] for line in lines]) / 60
        real = [line.get("real_accuracy", np.nan) for line in lines]
        for axes, x in ((by_steps, seen), (by_minutes, minutes)):
            axes.plot(x, [line["val_accuracy"] for line in lines], "o-", color=colour, ms=3, label=name)
            if np.isfinite(real).any():
                axes.plot(x, real, "x", color=colour, ms=5, label=f"{name}, 135 real images")
    epochs = np.arange(1, len(GRAVLENSNET) + 1)
    by_steps.plot(30 * epochs, GRAVLENSNET, "s--", color="0.5", ms=3, label="GravLensNet, 32 layers, real images")
    by_steps.set(xlabel="thousands of image-steps", ylabel="validation accuracy", ylim=(0.3, 1))
    by_minutes.set(xlabel="minutes of training")
    for axes in (by_steps, by_minutes):
        axes.grid(alpha=0.3)
    by_steps.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def draw_roc(path: Path, logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """One ROC curve for each class against the rest."""
    figure = Figure((4.2, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for k, (name, curve) in enumerate(roc_curves(softmax(logits), labels, classes).items()):
        if curve is not None:
            axes.plot(curve[0], curve[1], color=COLOURS[k % len(COLOURS)], label=f"{name}: AUC {curve[2]:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="0.6", label="chance")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{len(labels):,} images", aspect="equal")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_confusion(path: Path, logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """The confusion matrix: counts, and colours by the fraction of the true class."""
    values = evaluate(logits, labels, classes)
    counts = np.array(values["confusion"])
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure((4.2, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        fraction = fractions[row, column]
        colour = "white" if fraction > 0.6 else "black"
        axes.text(column, row, f"{count:,}\n{fraction:.1%}", ha="center", va="center", color=colour)
    ticks = range(len(classes))
    axes.set(xticks=ticks, yticks=ticks, xticklabels=classes, yticklabels=classes, xlabel="predicted", ylabel="true")
    axes.set_title(f"accuracy {values['accuracy']:.1%}")
    figure.colorbar(shown, ax=axes, label="fraction of the true class", shrink=0.85)
    _save(figure, path)


def draw_examples(
    path: Path, images: np.ndarray, logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], columns: int = 6
) -> None:
    """A row of images for each class with truth, prediction and its probability; wrong ones in red, shown last."""
    probabilities = softmax(logits)
    predicted = probabilities.argmax(1)
    figure = Figure((1.5 * columns, 1.75 * len(classes)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(classes), columns, squeeze=False)
    for label, row in enumerate(grid):
        right = np.flatnonzero((labels == label) & (predicted == label))
        wrong = np.flatnonzero((labels == label) & (predicted != label))[: columns // 2]
        chosen = np.concatenate([right[: columns - len(wrong)], wrong])
        for axes in row:
            axes.axis("off")
        for axes, index in zip(row, chosen, strict=False):
            axes.imshow(np.sqrt(images[index] - images[index].min()), cmap="inferno")
            guess = predicted[index]
            axes.set_title(
                f"{classes[label]} → {classes[guess]} {probabilities[index, guess]:.2f}",
                fontsize=8,
                color="black" if guess == label else "#C00000",
            )
    figure.suptitle("truth → prediction and its probability", fontsize=9)
    _save(figure, path)


def draw_saliency(
    path: Path, images: np.ndarray, maps: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], columns: int = 3
) -> None:
    """Pairs of an image and the map of what speaks for its class, up to `columns` of them in a row for each class.

    Args:
      path: where to write the PNG.
      images: (n, height, width).
      maps: float (n, height, width), 0 or more; each is scaled by its own maximum.
      labels: int (n,), the class that each map is of.
      classes: names.
      columns: pairs in a row.
    """
    figure = Figure((3.1 * columns + 0.4, 1.6 * len(classes) + 0.3), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(classes), 2 * columns, squeeze=False)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[], frame_on=False)
    for label, row in enumerate(grid):
        row[0].set_ylabel(classes[label], fontsize=11)
        for column, index in enumerate(np.flatnonzero(labels == label)[:columns]):
            row[2 * column].imshow(np.sqrt(images[index] - images[index].min()), cmap="inferno")
            row[2 * column + 1].imshow(maps[index], cmap="viridis", vmin=0)
    for axes, title in zip(grid[0], ["image", "speaks for its class"] * columns, strict=True):
        axes.set_title(title, fontsize=9)
    _save(figure, path)


def draw_population(
    path: Path,
    images: np.ndarray,
    deflections: np.ndarray,
    classes: tuple[str, ...],
    width: float,
    probabilities: np.ndarray | None = None,
) -> None:
    """Pairs of an image and the deflection by its lens's substructure alone, a row for each class.

    Args:
      path: where to write the PNG.
      images: (classes, columns, height, width).
      deflections: float, same shape, arcsec.
      classes: names.
      width: arcsec, of the whole image.
      probabilities: float (classes, columns, classes), what a network makes of each image; written above it.
    """
    rows, columns = images.shape[:2]
    figure = Figure((3.1 * columns + 0.9, 1.75 * rows + 0.3), dpi=75, layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    extent = (-width / 2, width / 2, -width / 2, width / 2)
    for (row, column), axes in np.ndenumerate(grid):
        axes.set(xticks=[], yticks=[])
        if column % 2 == 0:
            axes.imshow(np.sqrt(images[row, column // 2]), cmap="inferno", extent=extent)
        else:
            shown = axes.imshow(
                np.maximum(deflections[row, column // 2], 1e-6), cmap="viridis", extent=extent, norm=LogNorm(0.01, 0.3)
            )
        if column % 2:
            axes.set_title("its substructure", fontsize=9)
        elif probabilities is None:
            axes.set_title("image", fontsize=9)
        else:
            own = probabilities[row, column // 2]
            colour = "black" if own.argmax() == row else "#C00000"
            axes.set_title(f"predicted: {classes[own.argmax()]} {own.max():.2f}", fontsize=9, color=colour)
        if column == 0:
            axes.set_ylabel(classes[row], fontsize=11)
    figure.colorbar(shown, ax=grid, label="deflection by substructure [arcsec]", shrink=0.8, pad=0.01, extend="both")
    _save(figure, path)


def draw_scaling(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Images per second and efficiency over the number of devices; dotted is what perfect scaling would give.

    Args:
      path: where to write the PNG.
      curves: name -> devices, images per second, efficiency, each (n,).
    """
    figure = Figure((7, 3.2), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (devices, rates, efficiencies)), colour in zip(curves.items(), COLOURS, strict=False):
        left.loglog(devices, rates, "o-", color=colour, ms=3, label=f"{name} scaling", base=2)
        left.loglog(devices, rates[0] * devices / devices[0], ":", color=colour, base=2)
        right.semilogx(devices, efficiencies, "o-", color=colour, ms=3, base=2)
    right.axhline(1, ls=":", color="0.6")
    right.set_ylim(0)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.legend(frameon=False)
    for axes, title in ((left, "images per second"), (right, "efficiency")):
        axes.set(xlabel="devices", title=title, xticks=devices, xticklabels=devices)
        axes.grid(alpha=0.3)
    _save(figure, path)
