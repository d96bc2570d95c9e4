"""Classify the dark-matter substructure of strong gravitational lenses in JAX.

Public names are imported when they are first used: `from gravlens_jax import ResNet20` needs jax and flax only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gravlens_jax.config import CLASSES, Config
    from gravlens_jax.errors import InputError
    from gravlens_jax.inference import deflection_grid, embed, logits, predict, predict_deflection, predict_logits
    from gravlens_jax.lensing.priors import PRIORS, Priors
    from gravlens_jax.lensing.render import render_lens, render_lenses, sample_lens
    from gravlens_jax.metrics import convergence
    from gravlens_jax.model import ResNet, ResNet20
    from gravlens_jax.network import load_network, load_pretrained
    from gravlens_jax.npz import open_npz
    from gravlens_jax.training import fit

__version__ = "0.8.0"
__all__ = ["CLASSES", "PRIORS", "Config", "InputError", "Priors", "ResNet", "ResNet20", "convergence"]
__all__ += ["deflection_grid", "embed", "fit", "load_network", "load_pretrained", "logits", "open_npz", "predict"]
__all__ += ["predict_deflection", "predict_logits", "render_lens", "render_lenses", "sample_lens"]
_NAMES = {
    "config": ("CLASSES", "Config"),
    "errors": ("InputError",),
    "inference": ("deflection_grid", "embed", "logits", "predict", "predict_deflection", "predict_logits"),
    "lensing.priors": ("PRIORS", "Priors"),
    "lensing.render": ("render_lens", "render_lenses", "sample_lens"),
    "metrics": ("convergence",),
    "model": ("ResNet", "ResNet20"),
    "network": ("load_network", "load_pretrained"),
    "npz": ("open_npz",),
    "training": ("fit",),
}
_MODULES = {name: f"gravlens_jax.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gravlens_jax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
