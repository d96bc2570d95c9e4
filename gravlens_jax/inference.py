"""Predictions of a trained network: probabilities, logits, outlier scores, features and saliency maps.

Pixels are read batch by batch through `npz.read_rows`, which checks them on the host.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.errors import check
from gravlens_jax.metrics import outlier_scores
from gravlens_jax.model import ResNet
from gravlens_jax.npz import MappedImages, read_rows
from gravlens_jax.preprocess import check_images, prepare, to_unit

Images = np.ndarray | MappedImages


def logits(model: ResNet, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the logits of images, float32 (n, len(model.classes)): a pure function for jit, vmap and derivatives.

    `images` are float32 (n, height, width). They are scaled in float32, unlike by `predict_logits`, which checks them
    first and scales in float64: here NaN and infinite pixels, and ranges beyond float32, are the caller's to exclude.
    """
    outputs: Any = model.apply(variables, prepare(to_unit(images), model.input))
    return outputs[0]


@partial(jax.jit, static_argnames=("model", "tta"))
def _outputs(variables, images: jax.Array, *, model: ResNet, tta: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the logits and the channel means: see `outputs`."""
    x = prepare(to_unit(images), model.input)
    outputs: Any = model.apply(variables, x)
    logits, feature_maps = outputs
    if tta:
        mirrored = (x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1])
        logits = jnp.stack([logits, *(model.apply(variables, image)[0] for image in mirrored)]).mean(0)
    return logits, jnp.concatenate([x.astype(jnp.float32).mean((1, 2)) for x in feature_maps], 1)


@partial(jax.jit, static_argnames="model")
def _maps(variables, images: jax.Array, labels: jax.Array | None, *, model: ResNet) -> jax.Array:
    n, height, width = images.shape
    crop, pool = model.input.crop, model.input.pool
    x = prepare(to_unit(images), model.input)

    def explained(perturbation):
        outputs: Any = model.apply(variables, x, perturbation=perturbation)
        logits, feature_maps = outputs
        chosen = logits.argmax(-1) if labels is None else labels
        return jnp.take_along_axis(logits, chosen[:, None], 1).sum(), feature_maps[2]

    cells = -(-x.shape[1] // 2)  # of the feature map after stage 2
    zeros = jnp.zeros((n, cells, cells, 2 * model.width), model.dtype)
    gradient, activations = jax.grad(explained, has_aux=True)(zeros)
    coarse = jnp.sum(activations * jax.nn.relu(gradient), axis=-1, keepdims=True, dtype=jnp.float32)
    coarse = nn.avg_pool(coarse, (3, 3), padding="SAME")[..., 0]
    # The centre of pixel j of this map is pooled pixel 2 j, because of its stride of 2 and padding of 1.
    scale = jnp.float32([2 * pool, 2 * pool])
    shift = jnp.float32([(height - crop) // 2, (width - crop) // 2]) - pool / 2
    return jax.image.scale_and_translate(coarse, (n, height, width), (1, 2), scale, shift, "linear")


def predict(
    model: ResNet,
    variables: Any,
    images: Images,
    batch_size: int = 128,
    tta: bool = False,
    return_outlier: bool = False,
) -> Any:
    """Returns the probability of each class, float32 (n, len(model.classes)); arguments as in `predict_logits`.

    With `return_outlier` also the outlier scores, float32 (n,): the distance from the network's training population
    (`metrics.outlier_scores`), above 1 for 1 % of images like those; the class of an image far above 1 means nothing.
    NaN if the network has no population: see `load_network`.
    """
    logits, means = outputs(model, variables, images, batch_size, tta)
    probabilities = np.asarray(jax.nn.softmax(logits))
    return (probabilities, outlier_scores(variables.get("population"), means)) if return_outlier else probabilities


def predict_logits(
    model: ResNet, variables: Any, images: Images, batch_size: int = 128, tta: bool = False
) -> np.ndarray:
    """Returns the logits of `images`, float32 (n, len(model.classes)).

    Args:
      model, variables: as `load_network` returns them.
      images: (n, height, width), any real dtype and unit: each is scaled by its own minimum and maximum. A memory map
        is read batch by batch.
      batch_size: images per step.
      tta: test-time augmentation: the mean over an image and its three mirror images, at four times the cost.

    Raises:
      InputError: not (n, height, width), smaller than the crop, or NaN or infinite pixels.
    """
    return outputs(model, variables, images, batch_size, tta)[0]


def embed(model: ResNet, variables: Any, images: Images, batch_size: int = 128) -> np.ndarray:
    """Returns the features before the head, float32 (n, 4 * model.width); arguments as in `predict_logits`."""
    return outputs(model, variables, images, batch_size)[1][:, -4 * model.width :]


def outputs(
    model: ResNet, variables: Any, images: Images, batch_size: int = 128, tta: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits, and the channel means: the mean over all pixels of each channel after the first convolution
    and after each stage, float32 (n, 8 * model.width). The last half of them are the features of `embed`.

    Arguments as in `predict_logits`. The channel means are those of the images themselves, also with `tta`.
    """
    logits = np.empty((len(images), len(model.classes)), np.float32)
    means = np.empty((len(images), 8 * model.width), np.float32)
    for rows, batch in _batches(images, model, batch_size):
        results = _outputs(variables, batch, model=model, tta=tta)
        logits[rows], means[rows] = (array[: rows.stop - rows.start] for array in results)
    return logits, means


def saliency(
    model: ResNet, variables: Any, images: Images, labels: np.ndarray | None = None, batch_size: int = 64
) -> np.ndarray:
    """Returns saliency maps (LayerCAM) of `images`, float32 (n, height, width), not negative.

    LayerCAM (Jiang et al. 2021, IEEE Trans. Image Process. 30, 5875) after stage 2: activations times the positive part
    of the logit's gradient with respect to them, summed over channels, averaged over 3 x 3 pixels.

    `labels`, int (n,), are the classes to explain, by default the predicted ones. Other arguments and errors are those
    of `predict_logits`.
    """
    if labels is not None:
        expected = (len(images),)
        check(np.shape(labels) == expected, f"labels have shape {np.shape(labels)}, expected {expected}: one per image")
        known = bool(np.isin(labels, range(len(model.classes))).all())
        check(known, f"labels are {np.unique(labels)}, expected 0 to {len(model.classes) - 1}")
    maps = np.empty(np.shape(images), np.float32)
    for rows, batch in _batches(images, model, batch_size):
        n = rows.stop - rows.start
        explained = None if labels is None else np.pad(labels[rows], (0, len(batch) - n))
        maps[rows] = _maps(variables, batch, explained, model=model)[:n]
    return maps


def _batches(images: Images, model: ResNet, batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, images[rows]); the last batch is padded with zeros, so that all have one shape and compile once."""
    if not isinstance(images, MappedImages):
        check(not np.ma.isMaskedArray(images), "images are a masked array; fill it first, for example with its median")
        images = np.asarray(images)
    check(images.dtype.kind in "uif", f"images have dtype {images.dtype}, expected real numbers")
    check_images(images.shape, model.input)
    check(batch_size >= 1, f"batch_size={batch_size}: expected at least 1")
    batch_size = max(1, min(batch_size, len(images)))
    for start in range(0, len(images), batch_size):
        rows = slice(start, min(start + batch_size, len(images)))
        batch = read_rows(images, rows)
        yield rows, np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0)))
