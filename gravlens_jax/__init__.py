"""Classify the dark-matter substructure of strong gravitational lenses in JAX.

Public names are imported when they are first used: `from gravlens_jax import ResNet20` needs jax and flax only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gravlens_jax.config import CLASSES as CLASSES
    from gravlens_jax.config import Config as Config
    from gravlens_jax.errors import InputError as InputError
    from gravlens_jax.inference import deflection_grid as deflection_grid
    from gravlens_jax.inference import embed as embed
    from gravlens_jax.inference import logits as logits
    from gravlens_jax.inference import predict as predict
    from gravlens_jax.inference import predict_deflection as predict_deflection
    from gravlens_jax.inference import predict_logits as predict_logits
    from gravlens_jax.lensing.priors import PRIORS as PRIORS
    from gravlens_jax.lensing.priors import Priors as Priors
    from gravlens_jax.lensing.render import render_lens as render_lens
    from gravlens_jax.lensing.render import sample_lens as sample_lens
    from gravlens_jax.metrics import convergence as convergence
    from gravlens_jax.model import ResNet as ResNet
    from gravlens_jax.model import ResNet20 as ResNet20
    from gravlens_jax.network import load_network as load_network
    from gravlens_jax.network import load_pretrained as load_pretrained
    from gravlens_jax.npz import open_npz as open_npz
    from gravlens_jax.training import fit as fit

__version__ = "0.8.0"
_NAMES = {
    "config": ("CLASSES", "Config"),
    "errors": ("InputError",),
    "inference": ("deflection_grid", "embed", "logits", "predict", "predict_deflection", "predict_logits"),
    "lensing.priors": ("PRIORS", "Priors"),
    "lensing.render": ("render_lens", "sample_lens"),
    "metrics": ("convergence",),
    "model": ("ResNet", "ResNet20"),
    "network": ("load_network", "load_pretrained"),
    "npz": ("open_npz",),
    "training": ("fit",),
}
_MODULES = {name: f"gravlens_jax.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gravlens_jax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
