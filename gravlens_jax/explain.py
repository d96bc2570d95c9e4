"""Where in an image the network sees what it names, and how often substructure is really there.

The map is LayerCAM (Jiang et al. 2021, IEEE Trans. Image Process. 30, 5875) after stage 2: activations times the
positive part of the logit's gradient by them, summed over channels. Of the methods tried, its maps most often peak at
the substructure of simulated lenses; Grad-CAM, whose gradient is averaged over the pixels, loses the place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.augment import prepare, to_unit
from gravlens_jax.lens import Pair, blur, pixel_grid
from gravlens_jax.model import ResNet, check_images, forward
from gravlens_jax.npz import native

BEFORE, AFTER = slice(0, 3), slice(3, None)  # the parts of the network up to stage 2, and the rest


@partial(jax.jit, static_argnames="model")
def _maps(variables, images: jax.Array, labels: jax.Array | None, *, model: ResNet) -> jax.Array:
    n, height, width = images.shape
    crop, pool = model.input.crop, model.input.pool
    activations = forward(model, variables, prepare(to_unit(images), model.input), BEFORE)
    logits, pull_back = jax.vjp(lambda a: forward(model, variables, a, AFTER), activations)
    labels = logits.argmax(-1) if labels is None else labels
    (gradient,) = pull_back(jax.nn.one_hot(labels, logits.shape[-1]))
    coarse = jnp.sum(activations * jax.nn.relu(gradient), axis=-1, dtype=jnp.float32)
    # Pixel j of stage 2 is centred on pooled pixel 2 j, as its stride of 2 with a padding of 1 has it.
    scale = jnp.float32([2 * pool, 2 * pool])
    shift = jnp.float32([(height - crop) // 2, (width - crop) // 2]) - pool / 2
    maps = jax.image.scale_and_translate(coarse, (n, height, width), (1, 2), scale, shift, "linear")
    return jax.vmap(partial(blur, sigma=2 * pool, size=8 * pool + 1))(maps)  # finer than that it does not see


def saliency(model: ResNet, variables: Any, images: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Returns how much each place of an image speaks for a class, float32 (n, height, width), 0 or more.

    Args:
      model, variables, images: as in `predict_logits`; all images at once, so give hundreds rather than thousands.
      labels: int (n,), the classes to explain; those that the network predicts if not given.

    Raises:
      InputError: not (n, height, width), or smaller than the crop.
    """
    check_images(images.shape, model.input)
    return np.asarray(_maps(variables, native(images), labels, model=model))


def distance_to_substructure(x: jax.Array, y: jax.Array, lens_params: dict, heaviest: int = 5) -> jax.Array:
    """Returns the distance (arcsec) of each place `x`, `y` to the vortex, or to the nearest of the heaviest subhalos.

    Args:
      x, y: float, any shape, arcsec.
      lens_params: of one lens with substructure, as `sample_lens` returns them.
      heaviest: number of subhalos that count.
    """
    p = lens_params
    if "subhalo_masses" in p:
        centres = p["subhalo_centres"][jax.lax.top_k(p["subhalo_masses"], heaviest)[1]]
        return jnp.stack([jnp.hypot(x - cx, y - cy) for cx, cy in centres]).min(0)
    dx, dy = x - p["vortex_centre"][0], y - p["vortex_centre"][1]
    cos, sin = jnp.cos(p["vortex_angle"]), jnp.sin(p["vortex_angle"])
    beyond = jnp.maximum(jnp.abs(cos * dx + sin * dy) - p["vortex_length"] / 2, 0)
    return jnp.hypot(beyond, cos * dy - sin * dx)


def find_peaks(maps: np.ndarray, pixel_scale: float) -> Pair:
    """Returns x, y (n,), arcsec from the centre, of the largest value of each map (n, size, size)."""
    x, y = pixel_grid(maps.shape[1], pixel_scale)
    places = maps.reshape(len(maps), -1).argmax(1)
    return x.ravel()[places], y.ravel()[places]


def hit_rates(maps: np.ndarray, lenses: dict, pixel_scale: float, radius: float) -> tuple[float, float]:
    """Returns the fraction of maps that peak on the substructure of their own lens, and of the other lenses: chance.

    Args:
      maps: (n, size, size), n > 1.
      lenses: parameters as `sample_lens` returns them, (n, ...) each, all of one class.
      pixel_scale: arcsec per pixel.
      radius: arcsec; a peak nearer than that is on the substructure.
    """
    distances = jax.vmap(distance_to_substructure, (None, None, 0))(*find_peaks(maps, pixel_scale), lenses)
    hits = np.asarray(distances) < radius
    n = len(hits)
    return float(hits.trace() / n), float((hits.sum() - hits.trace()) / (n * (n - 1)))
