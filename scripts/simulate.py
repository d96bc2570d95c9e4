"""Simulates labelled lens images."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.config import PriorPreset, SimulationConfig
from gravlens_jax.errors import check
from gravlens_jax.lensing.priors import PRIORS, Priors

DEFAULT = SimulationConfig()


@dataclass(frozen=True)
class Arguments:
    """Simulates labelled lens images into OUT/train.npz, OUT/val.npz, OUT/test.npz and OUT/easy.npz.

    Each file also has the parameters of the lenses, as arrays parameters/<name>.

    examples:
      python scripts/simulate.py data/mine --train 3000 --val 300 --test 300 --prior.shear-max 0.1
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


def main() -> None:
    """Runs the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRIORS, default=DEFAULT.preset)
    preset = first.parse_known_args()[0].preset
    # tyro takes the defaults of the chosen preset; `out` has none and must be given.
    default = Arguments(out=tyro.MISSING, prior=PRIORS[preset], preset=preset)
    a = tyro.cli(Arguments, default=default, args=sys.argv[1:])
    config = SimulationConfig(a.preset, a.train, a.easy, a.val, a.test, a.seed)
    check(a.train + a.easy + a.val + a.test > 0, "0 images asked for: nothing to do")
    from gravlens_jax.datasets import simulate_dataset

    simulate_dataset(a.out, config, a.prior)
    print(a.out)


if __name__ == "__main__":
    cli.run(main)
