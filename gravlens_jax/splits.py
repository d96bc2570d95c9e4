"""The images of a run: files that are there, files simulated first, or a stream of fresh images."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gravlens_jax import mesh
from gravlens_jax.config import SPLITS, Config, check
from gravlens_jax.data import load_splits
from gravlens_jax.model import check_images
from gravlens_jax.npz import Dataset
from gravlens_jax.priors import PRESETS, make_easy
from gravlens_jax.progress import track
from gravlens_jax.simulate import simulate_dataset
from gravlens_jax.stream import Stream


class Splits(NamedTuple):
    """The images of a run; `easy`, if there are any, come before the first epoch."""

    train: Dataset | Stream
    val: Dataset
    test: Dataset
    easy: Dataset | Stream | None = None


def open_splits(config: Config) -> Splits:
    """Returns the images of a run; simulates files first if the config names none and they are not there.

    Raises:
      InputError: files are missing, damaged or do not belong together; images too small or too few for the config.
    """
    splits = _open(config)
    check_images((splits.train.size, *splits.train.image_shape), config.input)
    for name, images in (("train", splits.train), ("easy", splits.easy)):
        check(
            images is None or images.size >= config.batch_size,
            f"{name} holds {images.size if images else 0} images, fewer than batch_size={config.batch_size}; give more "
            f"or lower it",
        )
    return splits


def _open(config: Config) -> Splits:
    if config.data is not None and config.stream is None:
        return Splits(**load_splits(Path(config.data)))
    s = config.simulation
    for split in SPLITS:
        check(getattr(s, split) > 0, f"--simulation.{split} is 0; training needs images of every split")
    if config.stream is None:
        return Splits(**load_splits(_simulate(config)))
    priors = PRESETS[config.stream]
    easy = Stream(s.easy, s.seed, "easy", make_easy(priors)) if s.easy else None
    held_out = replace(config, simulation=replace(s, preset=config.stream, train=0, easy=0))
    return Splits(
        train=Stream(s.train, s.seed, "train", priors),
        easy=easy,
        **load_splits(_simulate(held_out), ("val", "test")),
    )


def _simulate(config: Config) -> Path:
    """Simulates the files that the config describes, those that are not there; returns their folder."""
    s = config.simulation
    folder = Path("data") / f"{s.preset}-{s.easy}-{s.train}-{s.val}-{s.test}-seed{s.seed}"
    if mesh.is_main():
        simulate_dataset(folder, s, track)
    mesh.wait_for_all("the images are simulated")
    return folder
