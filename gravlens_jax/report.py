"""The figures of a run's report, from saved arrays alone: none of it needs jax."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gravlens_jax.figures import COLOURS, DPI, save
from gravlens_jax.metrics import evaluate, roc_areas, roc_curves, softmax


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
    save(figure, path)


def draw_roc(path: Path, logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    """One ROC curve for each class against the rest."""
    figure = Figure((4.2, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    probabilities = softmax(logits)
    curves, areas = roc_curves(probabilities, labels, classes), roc_areas(probabilities, labels)
    for k, name in enumerate(classes):
        if name in curves:
            axes.plot(*curves[name], color=COLOURS[k % len(COLOURS)], label=f"{name}: AUC {areas[k]:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="0.6", label="chance")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{len(labels):,} images", aspect="equal")
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    save(figure, path)


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
    save(figure, path)


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
    save(figure, path)


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
    save(figure, path)
