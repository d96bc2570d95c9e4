"""Simulates labelled lens images."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES, PriorPreset, SimulationConfig, check
from gravlens_jax.files import check_folder
from gravlens_jax.model import predict
from gravlens_jax.priors import PRESETS, Priors
from gravlens_jax.progress import track
from gravlens_jax.simulate import example_lenses, simulate_dataset
from gravlens_jax.weights import load_network

DEFAULT = SimulationConfig()


@dataclass(frozen=True)
class Arguments:
    """Simulates labelled lens images into OUT/train.npz, OUT/val.npz, OUT/test.npz and OUT/easy.npz.

    examples:
      python scripts/simulate.py data/mine --train 3000 --val 300 --test 300 --prior.shear-max 0.1
      python scripts/simulate.py data/few --train 9 --val 0 --test 0 --parameters --figure few.png
    """

    # folder to write to; files that are there from the same arguments are kept
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    # the population
    prior: Priors
    preset: PriorPreset = DEFAULT.preset  # population that --prior options start from; ct1 re-simulates public images
    train: int = DEFAULT.train  # number of training images, all classes together; 0 for no such file
    easy: int = 0  # number of training images with heavier substructure, which a run begins with
    val: int = DEFAULT.val  # number of validation images
    test: int = DEFAULT.test  # number of test images
    seed: int = DEFAULT.seed  # of the images
    parameters: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # store each lens's parameters in the files too
    figure: Path | None = None  # PNG to draw: examples of each class, predictions, deflection of the substructure


def main() -> None:
    """Runs the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default=DEFAULT.preset)
    preset = first.parse_known_args()[0].preset
    # tyro takes the defaults of the chosen preset; `out` has none and must be given.
    default = Arguments(out=tyro.MISSING, prior=PRESETS[preset], preset=preset)
    a = tyro.cli(Arguments, default=default, args=sys.argv[1:])
    config = SimulationConfig(a.preset, a.train, a.easy, a.val, a.test, a.seed)
    check(a.train + a.easy + a.val + a.test > 0 or a.figure is not None, "0 images asked for: nothing to do")
    if a.figure is not None:
        check_folder(a.figure)
    simulate_dataset(a.out, config, track, a.prior, a.parameters)
    print(a.out)
    if a.figure is not None:
        from gravlens_jax.figures import draw_population  # and Matplotlib, which takes a third of a second

        width = a.prior.num_pixels * a.prior.pixel_scale
        images, deflections = example_lenses(a.seed, a.prior, columns=3)
        network, guesses = load_network("pretrained"), None
        if images.shape[2:] == network.image_shape:
            guesses = predict(network.model, network.variables, images.reshape(-1, *network.image_shape))
            guesses = guesses.reshape(*images.shape[:2], -1)
        draw_population(a.figure, images, deflections, CLASSES, width, guesses)
        print(a.figure)


if __name__ == "__main__":
    cli.run(main)
