"""Figures that are not of one run: a population of lenses, learning curves, scaling. None of it needs jax."""

import io
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from gravlens_jax.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for colour-blind eyes
DPI = 130
# Validation accuracy of GravLensNet's published run after each of its epochs of 30,000 real images, from the record in
# its repository, https://github.com/harish-jhr/GravLensNet.
GRAVLENSNET = (
    *(0.336, 0.339, 0.526, 0.610, 0.510, 0.793, 0.728, 0.713, 0.760, 0.814),
    *(0.773, 0.790, 0.822, 0.882, 0.843, 0.879, 0.877, 0.876, 0.888, 0.791),
)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    write_atomically(path, data.getvalue())


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
    save(figure, path)


def draw_learning_curves(path: Path, histories: dict[str, list[dict]]) -> None:
    """Validation accuracy of several runs over image-steps and minutes, beside GravLensNet's over image-steps.

    Args:
      path: where to write the PNG.
      histories: name -> lines as in metrics.jsonl; those with a real_accuracy are shown with it too.
    """
    figure = Figure((9, 3.4), dpi=100, layout="constrained")
    by_steps, by_minutes = figure.subplots(1, 2, sharey=True)
    for colour, (name, lines) in zip(cycle(COLOURS), histories.items(), strict=False):
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
    save(figure, path)


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
    save(figure, path)
