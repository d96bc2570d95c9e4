"""Whole runs from nothing: minutes to an accuracy, beside PyTorch."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.costs import Case
from bench.harness import Row, call_apart, time_calls
from gravlens_jax.config import Config
from gravlens_jax.datasets import open_splits
from gravlens_jax.progress import Stopped
from gravlens_jax.sharding import data_mesh
from gravlens_jax.training import fit

# Of GravLensNet, in its repository (https://github.com/harish-jhr/GravLensNet): right on 89.6 % of its test images
# after 20 epochs of 30,000 images; 32 layers, 150 x 150 pixels, Adam.
GRAVLENSNET: Row = {"code": "GravLensNet (computed)", "epochs": 20, "image_steps": 600_000, "val_accuracy": 0.896}
COLUMNS = (
    "code                  {code}epochs{epochs}image-steps{image_steps:,}target{target:.1%}minutes{minutes:.2f}"
    "accuracy{val_accuracy:.4f}images/s{images_per_second:,.0f}"
)


def our_run(config: Config) -> Iterator[Row]:
    """Trains by `training.fit`; yields image_steps, minutes, val_accuracy and images_per_second of each epoch.

    If the run is stopped, yields the epochs that are complete first.
    """
    start, rows, stopped = time.perf_counter(), [], None

    def add(line: Row) -> None:
        row = {"image_steps": line["step"] * config.batch_size, "minutes": (time.perf_counter() - start) / 60}
        rows.append(row | {name: line[name] for name in ("val_accuracy", "images_per_second")})

    try:
        with redirect_stdout(sys.stderr):  # which is not the place of its table
            fit(config, on_epoch=add)
    except Stopped as error:
        stopped = error
    yield from rows
    if stopped:
        raise stopped


def torch_run(config: Config) -> Iterator[Row]:
    """Yields image_steps, minutes and val_accuracy of each epoch of the same recipe in PyTorch."""
    from bench.torch_resnet import train_torch

    start = time.perf_counter()
    for row in train_torch(config, open_splits(config, data_mesh(1))):
        yield row | {"minutes": (time.perf_counter() - start) / 60}


def gravlensnet_minutes(batch_size: int = 50, steps: int = 5) -> float:
    """Returns the minutes of GravLensNet's training, from the time of a step of its network on random images.

    Its batches have 200 images, which take four times as long as 50 and too much memory for a laptop.
    """
    from bench.torch_resnet import torch_step

    run, _ = torch_step(Case(True, batch_size, image_size=150, depth=32))
    return GRAVLENSNET["image_steps"] / batch_size * statistics.median(run(2, steps)) / 60


def _simulate(config: Config) -> None:
    open_splits(config, data_mesh(1))


def _all_of(run: Callable[[Config], Iterator[Row]], config: Config) -> list[Row]:
    return list(run(config))


def measure_accuracy(config: Config, epochs: tuple[int, ...], peer: bool, folder: Path) -> Iterator[Row]:
    """Runs a recipe with several numbers of epochs, each time in a process of its own; yields their epochs.

    Args:
      config: the recipe; of its images, all that it names are simulated, which counts in the minutes of each run.
      epochs: numbers of epochs; the learning rate of each run falls to 0 at its end.
      peer: whether to run it in PyTorch too, on the same images.
      folder: for images and runs.
    """
    config = replace(config, simulation=replace(config.simulation, folder=str(folder / "data")))
    (simulation,) = time_calls(partial(call_apart, _simulate, (config,)), 0, 1)
    runs = {"gravlens_jax": our_run} | ({"PyTorch, same recipe": torch_run} if peer else {})
    for number in epochs:
        own = replace(config, epochs=number, run_dir=str(folder / f"epochs{number}"))
        for code, run in runs.items():
            for row in call_apart(_all_of, (run, own))[0]:
                yield {"code": code, "epochs": number} | row | {"minutes": row["minutes"] + simulation / 60}
    if peer:
        yield GRAVLENSNET | {"minutes": call_apart(gravlensnet_minutes, ())[0]}


def with_targets(rows: Iterable[Row], targets: tuple[float, ...]) -> Iterator[Row]:
    """Yields the rows of epochs, and after the first one of a run that reaches a target its code, target and minutes.

    Args:
      rows: with code and epochs, which name the run, minutes and val_accuracy.
      targets: accuracies.
    """
    reached = set()
    for row in rows:
        yield row
        for target in targets:
            key = row["code"], row["epochs"], target
            if row["val_accuracy"] >= target and key not in reached:
                reached.add(key)
                yield {"code": row["code"], "epochs": row["epochs"], "target": target, "minutes": row["minutes"]}
