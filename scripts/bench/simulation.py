"""Images per second of the simulator, beside other codes; for `scripts/benchmark.py simulate`."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import jax
import numpy as np

from bench.simulators import lenstronomy_image, make_caustics, make_herculens
from gravlens_jax.lensing.images import render_images, simulate_images
from gravlens_jax.lensing.priors import PRESETS
from gravlens_jax.lensing.render import render_lens, render_lenses, sample_lens

CT1 = PRESETS["ct1"]
PRIORS = replace(CT1, subhalo_poisson=False, subhalo_padding=round(CT1.subhalo_number))  # exactly 25 subhalos
BATCH = 32  # lenses that are rendered together


def sample_lenses() -> dict[str, jax.Array]:
    """Returns the parameters of a batch of `sphere` lenses."""
    sample = partial(sample_lens, priors=PRIORS, substructure="sphere")
    return jax.vmap(sample)(jax.random.split(jax.random.key(0), BATCH))


def _batches(render: Callable, jit: bool = True) -> Iterator[int]:
    """Renders a batch of lenses, again and again; yields the number of images."""
    lenses = sample_lenses()
    render = jax.jit(render) if jit else render
    while True:
        jax.block_until_ready(render(lenses))
        yield BATCH


def _caustics_torch(compiled: bool) -> Iterator[int]:
    import torch

    simulator, lenses = make_caustics(PRIORS, "torch", sample_lenses())
    render, lenses = torch.vmap(simulator), torch.from_numpy(lenses)
    render = torch.compile(render) if compiled else render
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    while True:
        with torch.inference_mode():
            render(lenses)
        yield BATCH


def _caustics_jax() -> Iterator[int]:
    simulator, lenses = make_caustics(PRIORS, "jax", sample_lenses())
    render = jax.jit(jax.vmap(simulator))
    while True:
        jax.block_until_ready(render(lenses))
        yield BATCH


def _lenstronomy() -> Iterator[int]:
    lenses = jax.tree.map(np.asarray, sample_lenses())
    while True:
        for i in range(BATCH):
            lenstronomy_image({name: values[i] for name, values in lenses.items()}, PRIORS)
            yield 1


CODES: dict[str, Callable[[], Iterator[int]]] = {
    "gravlens_jax": lambda: _batches(partial(render_images, priors=PRIORS), jit=False),
    "gravlens_jax, inside jit": lambda: _batches(partial(render_lenses, priors=PRIORS)),
    "gravlens_jax, plain jax.vmap": lambda: _batches(jax.vmap(partial(render_lens, priors=PRIORS))),
    "gravlens_jax, with noise": lambda: map(len, simulate_images(10**9, 0, 0, PRIORS, ("sphere",))),
    "herculens": lambda: _batches(jax.vmap(make_herculens(PRIORS))),
    "caustics, JAX": _caustics_jax,
    "caustics, torch.compile": lambda: _caustics_torch(True),
    "caustics, PyTorch": lambda: _caustics_torch(False),
    "lenstronomy": _lenstronomy,
}


def rate(code: str, seconds: float) -> float:
    """Returns the images per second of one of CODES, on all cores that this process may use."""
    images = CODES[code]()
    next(images)  # compiles
    start, done, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        done, passed = done + next(images), time.perf_counter() - start
    return done / passed


def rate_on_cores(code: str, seconds: float, groups: list[list[int]]) -> float:
    """Returns the summed `rate` of a process on each group of cores, all at once; Linux only."""
    pools = [ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, group)) for group in groups]
    futures = [pool.submit(rate, code, seconds) for pool in pools]
    total = sum(future.result() for future in futures)
    for pool in pools:
        pool.shutdown()
    return total


def simulation_rates(seconds: float, repeats: int, codes: list[str], cores: list[int]) -> dict[str, dict[int, float]]:
    """Measures the codes alternately, on the first of `cores` and on all; of lenstronomy, one process on each.

    Args:
      seconds: length of one measurement.
      repeats: measurements of each figure.
      codes: names of CODES.
      cores: numbers of those to use.

    Returns:
      code -> number of cores -> median of the images per second.
    """
    rates: dict[str, dict[int, list[float]]] = {code: {1: [], len(cores): []} for code in codes}
    for _ in range(repeats):
        for code in codes:
            for used in (cores[:1], cores)[: len(rates[code])]:
                groups = [[core] for core in used] if code == "lenstronomy" else [used]
                rates[code][len(used)].append(rate_on_cores(code, seconds, groups))
    return {code: {n: float(np.median(some)) for n, some in own.items()} for code, own in rates.items()}


def rates_table(rates: dict[str, dict[int, float]]) -> str:
    """Returns the result of `simulation_rates` as a text table."""
    counts = next(iter(rates.values()))
    lines = [f"{'images/s':30}" + "".join(f"{n:>6} core{'s' * (n > 1):1}" for n in counts)]
    return "\n".join(lines + [f"{code:30}" + "".join(f"{own[n]:12.1f}" for n in counts) for code, own in rates.items()])
