"""Images per second of the simulator, beside other codes."""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from bench.harness import Row, alternate, call_apart, time_calls
from bench.simulators import lenstronomy_image, make_herculens
from gravlens_jax.lensing.images import render_images, simulate_images
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.lensing.render import render_lens, render_lenses, sample_lens

CT1 = PRIORS["ct1"]
EXACT = replace(CT1, subhalo_poisson=False, subhalo_padding=round(CT1.subhalo_number))  # exactly 25 subhalos
BATCH = 32  # lenses that are rendered together
COLUMNS = "code                         {code}  cores{cores}  images/s{images_per_second:.1f}"
Renderer = tuple[Callable[[Any], Any], Any]  # a function of a batch of lenses, and their parameters


def sample_lenses() -> dict[str, jax.Array]:
    """Returns the parameters of a batch of `sphere` lenses."""
    sample = partial(sample_lens, priors=EXACT, substructure="sphere")
    return jax.vmap(sample)(jax.random.split(jax.random.key(0), BATCH))


def _lenstronomy(lenses: dict[str, jax.Array]) -> list[np.ndarray]:
    own = jax.tree.map(np.asarray, lenses)
    return [lenstronomy_image({name: values[i] for name, values in own.items()}, EXACT) for i in range(BATCH)]


CODES: dict[str, Callable[[], Renderer]] = {
    "gravlens_jax": lambda: (partial(render_images, priors=EXACT), sample_lenses()),
    "gravlens_jax, inside jit": lambda: (jax.jit(partial(render_lenses, priors=EXACT)), sample_lenses()),
    "gravlens_jax, plain jax.vmap": lambda: (jax.jit(jax.vmap(partial(render_lens, priors=EXACT))), sample_lenses()),
    "gravlens_jax, with noise": lambda: (next, simulate_images(10**9, 0, 0, EXACT, ("sphere",))),
    "herculens": lambda: (jax.jit(jax.vmap(make_herculens(EXACT))), sample_lenses()),
    "lenstronomy": lambda: (_lenstronomy, sample_lenses()),
}


def rate(code: str, seconds: float, cores: list[int]) -> float:
    """Returns the images per second of one of CODES, measured for `seconds`; binds the process to `cores` (Linux)."""
    os.sched_setaffinity(0, cores)
    render, lenses = CODES[code]()
    n = len(jax.block_until_ready(render(lenses)))  # compiles
    times = time_calls(partial(render, lenses), 1, 10**9, seconds)
    return n * len(times) / sum(times)


def simulation_rates(seconds: float, repeats: int, codes: list[str], cores: list[int]) -> list[Row]:
    """Measures the codes alternately, on the first of `cores` and on all; of lenstronomy, one process on each.

    Args:
      seconds: length of one measurement.
      repeats: measurements of each figure.
      codes: names of CODES.
      cores: numbers of those to use.

    Returns:
      code, cores (how many), and images_per_second, the median.
    """

    def measure(case: tuple[str, int]) -> float:
        code, n = case
        groups = [[core] for core in cores[:n]] if code == "lenstronomy" else [cores[:n]]
        return sum(call_apart(rate, *((code, seconds, group) for group in groups)))

    rates = alternate([(code, n) for code in codes for n in sorted({1, len(cores)})], measure, repeats)
    return [{"code": code, "cores": n, "images_per_second": statistics.median(own)} for (code, n), own in rates.items()]
