"""Images per second of the simulator, beside lenstronomy; for `scripts/benchmark.py simulate`."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import numpy as np

from bench.machine import medians
from bench.peers import lenstronomy_image
from gravlens_jax.config import CLASSES
from gravlens_jax.lensing.images import simulate_images
from gravlens_jax.lensing.priors import PRESETS
from gravlens_jax.lensing.render import sample_lens

PRIORS = PRESETS["ct1"]


def measure_on_cores(
    function: Callable[[float], dict[str, float]], seconds: float, groups: list[list[int]]
) -> dict[str, float]:
    """Runs `our_rates` or `lenstronomy_rates` in a process on each group of cores, all at once; Linux only.

    Args:
      function: seconds for each class -> images per second of each class.
      seconds: its argument.
      groups: the cores that each process may use.

    Returns:
      images per second of each class, summed over the processes, and of "all": as many images of each class.
    """
    context = get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, os.sched_setaffinity, (0, group)) for group in groups]
    futures = [pool.submit(function, seconds) for pool in pools]
    results = [future.result() for future in futures]
    for pool in pools:
        pool.shutdown()
    rates = {name: sum(result[name] for result in results) for name in CLASSES}
    return rates | {"all": len(CLASSES) / sum(1 / rate for rate in rates.values())}


def our_rates(seconds: float) -> dict[str, float]:
    """Returns the images per second of each class from `simulate_images`, with noise, on all cores it may use."""
    rates = {}
    for name in CLASSES:
        next(simulate_images(1, 0, 0, PRIORS, (name,)))  # compiles
        start, done = time.perf_counter(), 0
        for chunk in simulate_images(10**6, 1, 0, PRIORS, (name,)):
            done += len(chunk)
            wall_seconds = time.perf_counter() - start
            if wall_seconds > seconds:
                break
        rates[name] = done / wall_seconds
    return rates


def lenstronomy_rates(seconds: float) -> dict[str, float]:
    """Returns the images per second of each class that lenstronomy makes, with noise, on one core."""
    rng, rates = np.random.default_rng(0), {}
    for name in CLASSES:
        lenses = [sample_lens(key, PRIORS, name) for key in jax.random.split(jax.random.key(0), 8)]
        lenses = [jax.tree.map(np.asarray, p) for p in lenses]
        lenstronomy_image(lenses[0], PRIORS)  # compiles, where it does
        start, done, wall_seconds = time.perf_counter(), 0, 0.0
        while wall_seconds < seconds:
            rng.poisson(lenstronomy_image(lenses[done % len(lenses)], PRIORS))
            done, wall_seconds = done + 1, time.perf_counter() - start
        rates[name] = done / wall_seconds
    return rates


def simulation_rates(
    seconds: float, repeats: int, lenstronomy: bool, cores: list[int]
) -> dict[tuple[str, int], dict[str, float]]:
    """Measures the codes alternately, on the first of `cores` and on all; lenstronomy runs one process on each.

    Args:
      seconds: length of one measurement of one class.
      repeats: measurements of each figure.
      lenstronomy: whether to measure it.
      cores: numbers of those to use.

    Returns:
      (code, number of cores) -> medians of the images per second of each class and of "all".
    """
    functions = {"gravlens_jax": our_rates} | ({"lenstronomy": lenstronomy_rates} if lenstronomy else {})
    rates: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for code, function in functions.items():
            for used in (cores[:1], cores):
                groups = [used] if code == "gravlens_jax" else [[core] for core in used]
                rates.setdefault((code, len(used)), []).append(measure_on_cores(function, seconds, groups))
    return medians(rates)


def rates_table(rates: dict[tuple[str, int], dict[str, float]]) -> str:
    """Returns the result of `simulation_rates` as a text table."""
    names = (*CLASSES, "all")
    lines = [f"{'images/s':28}" + "".join(f"{name:>10}" for name in names)]
    for (code, n), values in rates.items():
        lines.append(f"{code + f', {n} core' + 's' * (n > 1):28}" + "".join(f"{values[k]:10.1f}" for k in names))
    return "\n".join(lines)
