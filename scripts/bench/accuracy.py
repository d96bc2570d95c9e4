"""Minutes from nothing to an accuracy, beside the same recipe in PyTorch; for `scripts/benchmark.py accuracy`."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.steps import random_batch
from bench.torch_resnet import torch_step, train_torch
from gravlens_jax.config import Config
from gravlens_jax.datasets import open_splits
from gravlens_jax.sharding import data_mesh
from gravlens_jax.training import fit

# Of GravLensNet, in its repository (https://github.com/harish-jhr/GravLensNet): right on 89.6 % of its test images
# after 20 epochs of 30,000 images; 32 layers, 150 x 150 pixels, Adam.
GRAVLENSNET_IMAGE_STEPS, GRAVLENSNET_DEPTH, GRAVLENSNET_SIZE, GRAVLENSNET_ACCURACY = 600_000, 32, 150, 0.896


def our_run(config: Config) -> list[dict[str, float]]:
    """Trains by `training.fit`; returns image_steps, minutes, val_accuracy and images_per_second of each epoch."""
    start, lines = time.perf_counter(), []

    def add(line: dict[str, Any]) -> None:
        minutes = (time.perf_counter() - start) / 60
        steps = line["step"] * config.batch_size
        own = {name: line[name] for name in ("val_accuracy", "images_per_second")}
        lines.append({"image_steps": steps, "minutes": minutes} | own)

    fit(config, on_epoch=add)
    return lines


def torch_run(config: Config) -> list[dict[str, float]]:
    """Returns image_steps, minutes and val_accuracy of each epoch of the same recipe in PyTorch."""
    start = time.perf_counter()
    epochs = train_torch(config, open_splits(config, data_mesh(1)))
    return [line | {"minutes": (time.perf_counter() - start) / 60} for line in epochs]


def gravlensnet_minutes(batch_size: int = 50, steps: int = 5) -> float:
    """Returns the minutes of GravLensNet's training, from the time of a step of its network on random images.

    Its batches have 200 images, which take four times as long as 50 and too much memory for a laptop.
    """
    run, _ = torch_step(True, random_batch(batch_size, GRAVLENSNET_SIZE), "float32", GRAVLENSNET_DEPTH)
    return GRAVLENSNET_IMAGE_STEPS / batch_size * run(2, steps)[steps // 2] / 60


def measure_accuracy(config: Config, epochs: tuple[int, ...], peer: bool, folder: Path) -> list[dict[str, Any]]:
    """Runs a recipe with several numbers of epochs, each code in a process of its own; returns their lines.

    Args:
      config: the recipe; of its images, all that it names are simulated.
      epochs: numbers of epochs; the learning rate of each run falls to 0 at its end.
      peer: whether to run it in PyTorch too, on the images of our first run, whose simulation is added to its minutes.
      folder: for images and runs.
    """
    rows = []
    config = replace(config, simulation=replace(config.simulation, folder=str(folder / "data")))
    with ProcessPoolExecutor(1, get_context("spawn")) as ours, ProcessPoolExecutor(1, get_context("spawn")) as theirs:
        start = time.perf_counter()
        ours.submit(_simulate, config).result()
        simulation = (time.perf_counter() - start) / 60
        for number in epochs:
            own = replace(config, epochs=number, run_dir=str(folder / f"epochs{number}"))
            runs = {"gravlens_jax": ours.submit(our_run, own)}
            runs["gravlens_jax"].result()  # one after the other
            if peer:
                runs["PyTorch, same recipe"] = theirs.submit(torch_run, own)
            for code, run in runs.items():
                for line in run.result():
                    rows.append({"code": code, "epochs": number} | line | {"minutes": line["minutes"] + simulation})
        if peer:
            minutes = theirs.submit(gravlensnet_minutes).result()
            row = {"code": "GravLensNet (computed)", "epochs": 20, "image_steps": GRAVLENSNET_IMAGE_STEPS}
            rows.append(row | {"val_accuracy": GRAVLENSNET_ACCURACY, "minutes": minutes})
    return rows


def _simulate(config: Config) -> None:
    open_splits(config, data_mesh(1))


def minutes_to(rows: list[dict[str, Any]], accuracy: float) -> dict[str, float]:
    """Returns the minutes to the first epoch of at least this accuracy, of each code that reaches it."""
    found: dict[str, float] = {}
    for row in rows:
        if row["val_accuracy"] >= accuracy:
            found[row["code"]] = min(row["minutes"], found.get(row["code"], row["minutes"]))
    return found


HEADER = f"{'code':24}{'epochs':>7}{'image-steps':>13}{'minutes':>9}{'accuracy':>10}"


def line(row: dict[str, Any]) -> str:
    """Returns a row as a line of the table."""
    return f"{row['code']:24}{row['epochs']:7}{row['image_steps']:13,}{row['minutes']:9.2f}{row['val_accuracy']:10.4f}"
