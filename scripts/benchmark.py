"""Measures how fast this machine is; one subcommand for each thing that is measured."""

import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES, check
from gravlens_jax.peers import lenstronomy_image
from gravlens_jax.priors import PRESETS
from gravlens_jax.render import sample_lens
from gravlens_jax.simulate import simulate_images

PRIORS = PRESETS["ct1"]


def simulate(seconds: float = 4.0, repeats: int = 3, lenstronomy: bool = True) -> None:
    """Measures images per second of `ct1` with photon noise, on one core and on all, beside lenstronomy.

    Every measurement is a process of its own on the cores it may use, and the codes take turns; medians are printed, as
    a table and as a JSON line. Compilation is not counted. lenstronomy sees lenses of the same population, the same
    grid, sub-pixels and PSF; its strings are 100 point masses; on all cores it runs one process on each.

    Args:
        seconds: length of one measurement of one class.
        repeats: measurements of each figure.
        lenstronomy: whether to measure it (pip install lenstronomy).
    """
    check(hasattr(os, "sched_setaffinity"), "this benchmark pins processes to cores, which only Linux allows")
    cores = sorted(os.sched_getaffinity(0))
    functions = {"gravlens_jax": _our_rates} | ({"lenstronomy": _lenstronomy_rates} if lenstronomy else {})
    rates: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for code, function in functions.items():
            for used in (cores[:1], cores):
                groups = [used] if code == "gravlens_jax" else [[core] for core in used]
                rates.setdefault((code, len(used)), []).append(_measure(function, seconds, groups))
    names = (*CLASSES, "all")
    medians = {key: {k: float(np.median([r[k] for r in runs])) for k in names} for key, runs in rates.items()}
    print(f"{'images/s':28}" + "".join(f"{name:>10}" for name in names))
    for (code, n), values in medians.items():
        print(f"{code + f', {n} core' + 's' * (n > 1):28}" + "".join(f"{values[name]:10.1f}" for name in names))
    result = [{"code": code, "cores": n} | values for (code, n), values in medians.items()]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "simulate", "images_per_second": result} | versions))


def _measure(function, seconds: float, groups: list[list[int]]) -> dict[str, float]:
    """Runs `function` in one process on each group of cores at the same time; sums the images per second."""
    context = get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, os.sched_setaffinity, (0, group)) for group in groups]
    futures = [pool.submit(function, seconds) for pool in pools]
    results = [future.result() for future in futures]
    for pool in pools:
        pool.shutdown()
    rates = {name: sum(result[name] for result in results) for name in CLASSES}
    return rates | {"all": len(CLASSES) / sum(1 / rate for rate in rates.values())}  # equal parts of each


def _our_rates(seconds: float) -> dict[str, float]:
    rates = {}
    for name in CLASSES:
        next(simulate_images(1, 0, "train", PRIORS, (name,)))  # compiles
        start, done = time.perf_counter(), 0
        for chunk in simulate_images(10**6, 1, "train", PRIORS, (name,)):
            done += len(chunk)
            wall_seconds = time.perf_counter() - start
            if wall_seconds > seconds:
                break
        rates[name] = done / wall_seconds
    return rates


def _lenstronomy_rates(seconds: float) -> dict[str, float]:
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


if __name__ == "__main__":
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict({"simulate": simulate}))
