"""A simulator of strong gravitational lenses in pure JAX, usable alone; see README.md in this folder.

`profiles` has deflections and light, `priors` populations of lenses, `render` one lens from its parameters to its
expected image, `images` sets of images with photon noise.
"""

from gravlens_jax.lensing.images import (
    labels_of,
    lens_key,
    render_batch,
    render_block,
    simulate_images,
    simulate_parameters,
)
from gravlens_jax.lensing.priors import PRESETS, SUBSTRUCTURES, Priors, make_easy
from gravlens_jax.lensing.render import deflect_substructure, render_lens, render_lenses, sample_lens

__all__ = [
    "PRESETS",
    "SUBSTRUCTURES",
    "Priors",
    "deflect_substructure",
    "labels_of",
    "lens_key",
    "make_easy",
    "render_batch",
    "render_block",
    "render_lens",
    "render_lenses",
    "sample_lens",
    "simulate_images",
    "simulate_parameters",
]
