"""All speeds of an accelerator in one table; for `scripts/benchmark.py gpu`."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gravlens_jax.network import load_pretrained

from bench.accuracy import minutes_to, our_run
from bench.machine import time_calls
from bench.steps import compile_step
from gravlens_jax.config import SPLITS, PRESETS, STREAM
from gravlens_jax.inference import predict_logits
from gravlens_jax.lensing.images import simulate_images
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.stream import StreamData
from gravlens_jax.sharding import data_mesh

RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # recipe of config.PRESETS, and what is changed
    "default, images in files": ("default", {}),
    "default, images on the device": ("default", {"device_data": True}),
    "default, images simulated when needed": ("default", {"data": f"{STREAM}ct1"}),
    "best, images simulated when needed": ("best", {"data": f"{STREAM}ct1"}),
}


def measure_accelerator(
    batch_sizes: tuple[int, ...], recipes: tuple[str, ...], folder: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Measures steps, inference, simulation and whole runs on the default device, and compares its logits with a CPU's.

    Args:
      batch_sizes: of steps, inference and simulation.
      recipes: those of RUNS to train.
      folder: for images and runs.
      show: receives each line of the table as soon as it is known.

    Returns:
      images_per_second: name -> images per second.
      runs: name -> lines of `our_run`.
      logits: largest difference, and fraction of equal classes, of 300 images on this device and on the CPU.
    """
    logits = compare_logits()
    show(
        f"logits of 300 images, here and on the CPU: largest difference {logits['difference']:.1e}, "
        f"same class {logits['same']:.1%}"
    )
    size = PRESETS["default"].input.crop // PRESETS["default"].input.pool
    rates: dict[str, float] = {}
    for n, dtype, train in itertools.product(batch_sizes, ("float32", "bfloat16"), (True, False)):
        run, _ = compile_step(train, n, size, dtype, 1)
        name = f"{'training step' if train else 'inference'}, {size} x {size}, batch {n}, {dtype}"
        rates[name] = n / statistics.median(run(5, 20))
        show(_last(rates))
    for n in batch_sizes:
        source = StreamData(n, PRIORS["ct1"], SPLITS.index("train"), n, 0, data_mesh(1), None)
        seconds = time_calls(partial(source.render, 0, 0, 0), 1, 5)
        rates[f"simulation, ct1 with noise, batch {n}"] = n / statistics.median(seconds)
        show(_last(rates))
    runs = {}
    for name, (preset, changes) in RUNS.items():
        if preset in recipes:
            config = PRESETS[preset]
            simulation = replace(config.simulation, folder=str(folder / f"{name}, data"))
            runs[name] = our_run(replace(config, simulation=simulation, run_dir=str(folder / name), **changes))
            last = runs[name][-1]
            rates[name] = last["images_per_second"]
            first = minutes_to([{"code": name} | line for line in runs[name]], 0.95)
            text = (
                f"{last['minutes']:.1f} minutes to {last['val_accuracy']:.2%}, {first.get(name, math.inf):.1f} to 95 %"
            )
            show(f"{_last(rates)}, {text}")
    return {"images_per_second": rates, "runs": runs, "logits": logits}


def _last(rates: dict[str, float]) -> str:
    name, rate = list(rates.items())[-1]
    return f"{name:55}{rate:12,.0f} images/s"


def compare_logits() -> dict[str, float]:
    """Returns how the pretrained network's logits differ between the default device and the CPU."""
    network = load_pretrained()
    images = np.concatenate(list(simulate_images(300, 0, SPLITS.index("test"), PRIORS["ct1"])))
    here = predict_logits(network.model, network.variables, images)
    with jax.default_device(jax.devices("cpu")[0]):
        there = predict_logits(network.model, network.variables, images)
    return {
        "difference": float(np.abs(here - there).max()),
        "same": float(np.mean(here.argmax(1) == there.argmax(1))),
    }
