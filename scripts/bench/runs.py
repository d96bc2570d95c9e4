"""Whole runs from nothing: minutes to an accuracy, beside PyTorch; and what else to know of an accelerator."""

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.costs import Case
from bench.harness import Row, call_apart, time_calls
from gravlens_jax import load_pretrained, predict_logits
from gravlens_jax.config import PRESETS, SPLITS, STREAM, Config
from gravlens_jax.datasets import open_splits
from gravlens_jax.lensing.images import simulate_images
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.sharding import data_mesh
from gravlens_jax.stream import StreamData
from gravlens_jax.training import fit

# Of GravLensNet, in its repository (https://github.com/harish-jhr/GravLensNet): right on 89.6 % of its test images
# after 20 epochs of 30,000 images; 32 layers, 150 x 150 pixels, Adam.
GRAVLENSNET: Row = {"code": "GravLensNet (computed)", "epochs": 20, "image_steps": 600_000, "val_accuracy": 0.896}
COLUMNS = (
    "code                                  {code}  epochs{epochs}  image-steps{image_steps:,}  minutes{minutes:.2f}"
    "  accuracy{val_accuracy:.4f}  images/s{images_per_second:,.0f}"
)
SIMULATION_COLUMNS = "simulation {simulation}  batch{batch_size}    images/s{images_per_second:,.0f}"
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {  # recipe of config.PRESETS, and what is changed
    "default, images in files": ("default", {}),
    "default, images on the device": ("default", {"device_data": True}),
    "default, images simulated when needed": ("default", {"data": f"{STREAM}ct1"}),
    "best, images simulated when needed": ("best", {"data": f"{STREAM}ct1"}),
}


def our_run(config: Config) -> list[Row]:
    """Trains by `training.fit`; returns image_steps, minutes, val_accuracy and images_per_second of each epoch."""
    start, rows = time.perf_counter(), []

    def add(line: Row) -> None:
        row = {"image_steps": line["step"] * config.batch_size, "minutes": (time.perf_counter() - start) / 60}
        rows.append(row | {name: line[name] for name in ("val_accuracy", "images_per_second")})

    fit(config, on_epoch=add)
    return rows


def torch_run(config: Config) -> list[Row]:
    """Returns image_steps, minutes and val_accuracy of each epoch of the same recipe in PyTorch."""
    from bench.torch_resnet import train_torch

    start = time.perf_counter()
    epochs = train_torch(config, open_splits(config, data_mesh(1)))
    return [row | {"minutes": (time.perf_counter() - start) / 60} for row in epochs]


def gravlensnet_minutes(batch_size: int = 50, steps: int = 5) -> float:
    """Returns the minutes of GravLensNet's training, from the time of a step of its network on random images.

    Its batches have 200 images, which take four times as long as 50 and too much memory for a laptop.
    """
    from bench.torch_resnet import torch_step

    run, _ = torch_step(Case(True, batch_size, image_size=150, depth=32))
    return GRAVLENSNET["image_steps"] / batch_size * statistics.median(run(2, steps)) / 60


def _simulate(config: Config) -> None:
    open_splits(config, data_mesh(1))


def measure_accuracy(config: Config, epochs: tuple[int, ...], peer: bool, folder: Path) -> Iterator[Row]:
    """Runs a recipe with several numbers of epochs, each time in a process of its own; yields their epochs.

    Args:
      config: the recipe; of its images, all that it names are simulated, which counts in the minutes of each run.
      epochs: numbers of epochs; the learning rate of each run falls to 0 at its end.
      peer: whether to run it in PyTorch too, on the same images.
      folder: for images and runs.
    """
    config = replace(config, simulation=replace(config.simulation, folder=str(folder / "data")))
    (simulation,) = time_calls(lambda: call_apart(_simulate, (config,)), 0, 1)
    runs = {"gravlens_jax": our_run} | ({"PyTorch, same recipe": torch_run} if peer else {})
    for number in epochs:
        own = replace(config, epochs=number, run_dir=str(folder / f"epochs{number}"))
        for code, run in runs.items():
            for row in call_apart(run, (own,))[0]:
                yield {"code": code, "epochs": number} | row | {"minutes": row["minutes"] + simulation / 60}
    if peer:
        yield GRAVLENSNET | {"minutes": call_apart(gravlensnet_minutes, ())[0]}


def minutes_to(rows: Iterable[Row], accuracy: float) -> dict[str, float]:
    """Returns the minutes to the first epoch of at least this accuracy, of each code that reaches it."""
    found: dict[str, float] = {}
    for row in rows:
        if row["val_accuracy"] >= accuracy:
            found[row["code"]] = min(row["minutes"], found.get(row["code"], row["minutes"]))
    return found


def run_recipes(recipes: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """Runs those of SOURCES with one of `recipes` on the default device; yields their epochs, as `measure_accuracy`."""
    for name, (preset, changes) in SOURCES.items():
        if preset in recipes:
            config = PRESETS[preset]
            simulation = replace(config.simulation, folder=str(folder / f"{name}, data"))
            config = replace(config, simulation=simulation, run_dir=str(folder / name), **changes)
            yield from ({"code": name, "epochs": config.epochs} | row for row in our_run(config))


def render_batches(batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    """Yields simulation (the population), batch_size and images_per_second of images with noise, on the device."""
    for n in batch_sizes:
        source = StreamData(n, PRIORS["ct1"], SPLITS.index("train"), n, 0, data_mesh(1), None)
        seconds = time_calls(partial(source.render, 0, 0, 0), 1, 5)
        yield {"simulation": "ct1", "batch_size": n, "images_per_second": n / statistics.median(seconds)}


def compare_logits() -> Row:
    """Returns how the pretrained network's logits of 300 images differ between the default device and the CPU.

    Returns:
      difference, the largest; and same, the fraction of equal classes.
    """
    network = load_pretrained()
    images = np.concatenate(list(simulate_images(300, 0, SPLITS.index("test"), PRIORS["ct1"])))
    here = predict_logits(network.model, network.variables, images)
    with jax.default_device(jax.devices("cpu")[0]):
        there = predict_logits(network.model, network.variables, images)
    same = float(np.mean(here.argmax(1) == there.argmax(1)))
    return {"difference": float(np.abs(here - there).max()), "same": same}
