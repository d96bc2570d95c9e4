"""Images per second of the simulator, compared with other codes."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from bench.harness import Row, alternate, time_calls
from bench.simulators import lenstronomy_image, make_herculens
from gravlens_jax.lensing.images import render_images, simulate_images
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.lensing.render import render_lens, render_lenses, sample_lens

CT1 = PRIORS["ct1"]
EXACT = replace(CT1, subhalo_poisson=False, subhalo_padding=round(CT1.subhalo_number))  # exactly 25 subhalos
BATCH = 32  # lenses that are rendered together
COLUMNS = "code                         {code}  images/s{images_per_second:.1f}"
Renderer = tuple[Callable[[Any], Any], Any]  # a function of a batch of lenses, and their parameters


def sample_lenses() -> dict[str, jax.Array]:
    """Returns the parameters of a batch of `sphere` lenses."""
    sample = partial(sample_lens, priors=EXACT, substructure="sphere")
    return jax.vmap(sample)(jax.random.split(jax.random.key(0), BATCH))


def _lenstronomy(lenses: dict[str, jax.Array]) -> list[np.ndarray]:
    own = jax.tree.map(np.asarray, lenses)
    return [lenstronomy_image({name: values[i] for name, values in own.items()}, EXACT) for i in range(BATCH)]


def _simulate(n: int) -> np.ndarray:
    return np.concatenate(list(simulate_images(n, 0, 0, EXACT, ("sphere",))))


CODES: dict[str, Callable[[], Renderer]] = {
    "gravlens_jax": lambda: (partial(render_images, priors=EXACT), sample_lenses()),
    "gravlens_jax, inside jit": lambda: (jax.jit(partial(render_lenses, priors=EXACT)), sample_lenses()),
    "gravlens_jax, plain jax.vmap": lambda: (jax.jit(jax.vmap(partial(render_lens, priors=EXACT))), sample_lenses()),
    "gravlens_jax, with noise": lambda: (_simulate, 16 * BATCH),
    "herculens": lambda: (jax.jit(jax.vmap(make_herculens(EXACT))), sample_lenses()),
    "lenstronomy": lambda: (_lenstronomy, sample_lenses()),
}


def simulation_rates(seconds: float, repeats: int, codes: list[str]) -> Iterator[Row]:
    """Yields code, a name of CODES, and images_per_second, the median of measurements of some seconds, in turn."""
    renderers = {code: CODES[code]() for code in codes}
    sizes = {code: len(jax.block_until_ready(render(lenses))) for code, (render, lenses) in renderers.items()}

    def rate(code: str) -> float:
        render, lenses = renderers[code]
        times = time_calls(partial(render, lenses), 1, 10**9, seconds)
        return sizes[code] * len(times) / sum(times)

    for code, rates in alternate(codes, rate, repeats).items():
        yield {"code": code, "images_per_second": statistics.median(rates)}
