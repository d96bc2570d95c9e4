"""Simulates labelled lens images."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES, SPLITS, PriorPreset, SimulationConfig
from gravlens_jax.errors import check
from gravlens_jax.files import check_folder
from gravlens_jax.lensing.priors import PRIORS, Priors
from gravlens_jax.progress import show_progress

DEFAULT = SimulationConfig()


@dataclass(frozen=True)
class Arguments:
    """Simulates labelled lens images into OUT/train.npz, OUT/val.npz, OUT/test.npz and OUT/easy.npz.

    Each file also has the parameters of the lenses, as arrays parameters/<name>.

    examples:
      python scripts/simulate.py data/mine --train 3000 --val 300 --test 300 --prior.shear-max 0.1
      python scripts/simulate.py data/few --train 9 --val 0 --test 0 --figure few.png
    """

    # folder to write to; existing files from the same arguments are kept
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    # the population
    prior: Priors
    preset: PriorPreset = DEFAULT.preset  # population that --prior options start from; ct1 re-simulates public images
    train: int = DEFAULT.train  # number of training images, all classes together; 0 for no such file
    easy: int = 0  # number of images with heavier substructure that training begins with
    val: int = DEFAULT.val  # number of validation images
    test: int = DEFAULT.test  # number of test images
    seed: int = DEFAULT.seed  # of the images
    figure: Path | None = None  # PNG to write: examples of each class, predictions, deflection of the substructure


def example_lenses(seed: int, priors: Priors, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns example images of each class and the deflection by their substructure.

    Args:
      seed: of the training images that are shown.
      priors: the population.
      columns: examples of each class.

    Returns:
      images: uint16 (3, columns, num_pixels, num_pixels) photon counts.
      deflections: float32, same shape, length of the deflection by the substructure alone, arcsec; 0 for `no`.
    """
    import jax.numpy as jnp

    from gravlens_jax.lensing.images import lens_key, simulate_images
    from gravlens_jax.lensing.profiles import pixel_grid
    from gravlens_jax.lensing.render import deflect_substructure, sample_lens

    n, train = len(CLASSES) * columns, SPLITS.index("train")
    images = np.concatenate(list(simulate_images(n, seed, train, priors)))
    x, y = pixel_grid(priors.num_pixels, priors.pixel_scale)
    deflections = np.empty(images.shape, np.float32)
    for index in range(n):
        p = sample_lens(lens_key(seed, train, index), priors, CLASSES[index % len(CLASSES)])
        deflections[index] = jnp.hypot(*deflect_substructure(x, y, p))
    shape = (columns, len(CLASSES), *images.shape[1:])
    return images.reshape(shape).swapaxes(0, 1), deflections.reshape(shape).swapaxes(0, 1)


def draw_population(
    path: Path, images: np.ndarray, deflections: np.ndarray, width: float, probabilities: np.ndarray | None
) -> None:
    """Pairs of an image and the deflection by its lens's substructure alone, a row for each class.

    Args:
      path: where to write the PNG.
      images, deflections: as `example_lenses` returns them.
      width: arcsec, of the whole image.
      probabilities: float (classes, columns, classes), predictions to write above the images; None for none.
    """
    from matplotlib.colors import LogNorm

    from gravlens_jax.report import WRONG, new_figure, save_figure

    rows, columns = images.shape[:2]
    figure = new_figure(3.1 * columns + 0.9, 1.75 * rows + 0.3, dpi=75)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    extent = (-width / 2, width / 2, -width / 2, width / 2)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
    for row, column in np.ndindex(rows, columns):
        left, right = grid[row, 2 * column : 2 * column + 2]
        left.imshow(np.sqrt(images[row, column]), cmap="inferno", extent=extent)
        title, colour = "image", "black"
        if probabilities is not None:
            p = probabilities[row, column]
            title = f"predicted: {CLASSES[p.argmax()]} {p.max():.2f}"
            colour = "black" if p.argmax() == row else WRONG
        left.set_title(title, fontsize=9, color=colour)
        deflection = np.maximum(deflections[row, column], 1e-6)
        shown = right.imshow(deflection, cmap="viridis", extent=extent, norm=LogNorm(0.01, 0.3))
        right.set_title("substructure", fontsize=9)
    for axes, name in zip(grid[:, 0], CLASSES, strict=True):
        axes.set_ylabel(name, fontsize=11)
    figure.colorbar(shown, ax=grid, label="deflection by substructure [arcsec]", shrink=0.8, pad=0.01, extend="both")
    save_figure(figure, path)


def main() -> None:
    """Runs the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRIORS, default=DEFAULT.preset)
    preset = first.parse_known_args()[0].preset
    # tyro takes the defaults of the chosen preset; `out` has none and must be given.
    default = Arguments(out=tyro.MISSING, prior=PRIORS[preset], preset=preset)
    a = tyro.cli(Arguments, default=default, args=sys.argv[1:])
    config = SimulationConfig(a.preset, a.train, a.easy, a.val, a.test, a.seed)
    check(a.train + a.easy + a.val + a.test > 0 or a.figure is not None, "0 images asked for: nothing to do")
    if a.figure is not None:
        check_folder(a.figure)
    from gravlens_jax.datasets import simulate_dataset

    simulate_dataset(a.out, config, show_progress, a.prior)
    print(a.out)
    if a.figure is not None:
        from gravlens_jax.inference import predict
        from gravlens_jax.network import load_pretrained

        images, deflections = example_lenses(a.seed, a.prior, columns=3)
        network, probabilities = load_pretrained(), None
        if images.shape[2:] == network.image_shape:
            flat = predict(network.model, network.variables, images.reshape(-1, *network.image_shape))
            probabilities = flat.reshape(*images.shape[:2], -1)
        draw_population(a.figure, images, deflections, a.prior.num_pixels * a.prior.pixel_scale, probabilities)
        print(a.figure)


if __name__ == "__main__":
    cli.run(main)
