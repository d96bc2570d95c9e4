"""gravlens_jax tells from one image of a gravitational lens which substructure the lens holds."""

from gravlens_jax.checkpoint import load_run
from gravlens_jax.config import CLASSES, Config, InputError
from gravlens_jax.fit import fit
from gravlens_jax.model import ResNet, ResNet20, predict, predict_logits

__all__ = ["CLASSES", "Config", "InputError", "ResNet", "ResNet20", "fit", "load_run", "predict", "predict_logits"]
