"""A simulator of strong gravitational lenses in pure JAX, usable alone; see README.md in this folder.

`profiles` has deflections and light, `priors` populations of lenses, `render` one lens from its parameters to its
expected image, `images` sets of images with photon noise. Names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "images": ("render_images", "simulate_images", "simulate_parameters"),
    "priors": ("PRIORS", "Priors"),
    "render": ("render_lens", "render_lenses", "sample_lens", "significance"),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
