"""gravlens_jax tells from one image of a gravitational lens which substructure the lens holds."""

from gravlens_jax.checkpoint import load_run
from gravlens_jax.config import CLASSES, Config, InputError
from gravlens_jax.explain import saliency
from gravlens_jax.fit import fit
from gravlens_jax.model import ResNet, ResNet20, embed, predict, predict_logits
from gravlens_jax.npz import open_npz
from gravlens_jax.priors import Priors
from gravlens_jax.render import render_lens, sample_lens
from gravlens_jax.weights import load_network, load_pretrained

__all__ = [
    "CLASSES",
    "Config",
    "InputError",
    "Priors",
    "ResNet",
    "ResNet20",
    "embed",
    "fit",
    "load_network",
    "load_pretrained",
    "load_run",
    "open_npz",
    "predict",
    "predict_logits",
    "render_lens",
    "saliency",
    "sample_lens",
]
