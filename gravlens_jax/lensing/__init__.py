"""A simulator of strong gravitational lenses in pure JAX, usable alone; see README.md in this folder.

`profiles` has deflections and light, `priors` populations of lenses, `render` one lens from its parameters to its
expected image, `images` sets of images with photon noise.
"""

from gravlens_jax.lensing.images import render_images, simulate_images, simulate_parameters
from gravlens_jax.lensing.priors import PRESETS, Priors
from gravlens_jax.lensing.render import render_lens, render_lenses, sample_lens

__all__ = [
    "PRESETS",
    "Priors",
    "render_images",
    "render_lens",
    "render_lenses",
    "sample_lens",
    "simulate_images",
    "simulate_parameters",
]
