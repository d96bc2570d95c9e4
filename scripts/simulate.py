"""Simulates labelled lens images."""

from pathlib import Path
from typing import Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.config import SimulationConfig
from gravlens_jax.progress import track
from gravlens_jax.simulate import simulate_dataset

DEFAULT = SimulationConfig()


def main(
    out: tyro.conf.Positional[Path],
    preset: Literal["ct1"] = "ct1",
    train: int = DEFAULT.train,
    val: int = DEFAULT.val,
    test: int = DEFAULT.test,
    seed: int = DEFAULT.seed,
) -> None:
    """Simulates labelled lens images into OUT/train.npz, OUT/val.npz and OUT/test.npz.

    Args:
        out: folder to write to; files that are there already from the same arguments are kept.
        preset: population of lenses; ct1 re-simulates the public DeepLense images.
        train: number of training images, all classes together; 0 for no such file.
        val: number of validation images.
        test: number of test images.
        seed: of the images.
    """
    print(simulate_dataset(out, SimulationConfig(preset, train, val, test, seed), track))


if __name__ == "__main__":
    cli.run_function(main)
