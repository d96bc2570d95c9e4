"""Whole runs from nothing: minutes to an accuracy."""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import jax

from bench.harness import Row
from gravlens_jax.config import Config
from gravlens_jax.progress import Stopped
from gravlens_jax.training import fit

COLUMNS = (
    "epochs{epochs}image-steps{image_steps:,}minutes{minutes:.2f}accuracy{val_accuracy:.4f}"
    "images/s{images_per_second:,.0f}reached     {reached}"
)


def run_from_nothing(config: Config, targets: tuple[float, ...], **changes: Any) -> Iterator[Row]:
    """Simulates the images of a run and trains, in a temporary folder; yields a row for each epoch.

    If the run is stopped, yields the epochs that are complete first.

    Args:
      config: the run.
      targets: accuracies.
      changes: fields of `config` with other values.

    Returns:
      epochs, of the whole run; image_steps; minutes, since the start; val_accuracy; images_per_second; and reached, the
      targets that no epoch before has reached.
    """
    start, rows, ahead = time.perf_counter(), [], set(targets)

    def add(line: Row) -> None:
        reached = sorted(target for target in ahead if target <= line["val_accuracy"])
        ahead.difference_update(reached)
        row = {"image_steps": line["step"] * config.batch_size, "minutes": (time.perf_counter() - start) / 60}
        row |= {name: line[name] for name in ("val_accuracy", "images_per_second")}
        rows.append({"epochs": config.epochs} | row | {"reached": reached})

    with tempfile.TemporaryDirectory() as folder:
        simulation = replace(config.simulation, folder=f"{folder}/data")
        config = replace(config, simulation=simulation, run_dir=f"{folder}/run", **changes)
        try:
            with redirect_stdout(sys.stderr):  # which is not the place of its table
                fit(config, on_epoch=add)
        except Stopped:
            yield from rows
            raise
    yield from rows


def measure_accuracy(config: Config, epochs: tuple[int, ...], targets: tuple[float, ...]) -> Iterator[Row]:
    """Yields `run_from_nothing` of a recipe with several numbers of epochs; each run compiles its programs.

    The learning rate of each run falls to 0 at its end.
    """
    for number in epochs:
        jax.clear_caches()
        yield from run_from_nothing(replace(config, epochs=number), targets)
