"""Predictions of a trained network: probabilities, logits, outlier scores, features and saliency maps.

Pixels are read batch by batch through `pixels.read_rows`, which checks them on the host.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.errors import check
from gravlens_jax.lensing.profiles import blur
from gravlens_jax.metrics import outlier_scores
from gravlens_jax.model import AFTER_STAGE_2, HEAD, TO_STAGE_2, ResNet, forward
from gravlens_jax.pixels import read_rows
from gravlens_jax.preprocess import check_images, prepare, to_unit


@partial(jax.jit, static_argnames=("model", "tta"))
def _outputs(variables, images: jax.Array, *, model: ResNet, tta: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the logits and the channel means: see `outputs`."""
    x = prepare(to_unit(images), model.input)
    means = []
    for part in range(4):
        x = forward(model, variables, x, slice(part, part + 1))
        means.append(x.astype(jnp.float32).mean((1, 2)))
    logits = forward(model, variables, means[-1], HEAD)
    if tta:
        x = prepare(to_unit(images), model.input)
        mirrored = (x[:, ::-1], x[:, :, ::-1], x[:, ::-1, ::-1])
        logits = jnp.stack([logits, *(forward(model, variables, some) for some in mirrored)]).mean(0)
    return logits, jnp.concatenate(means, 1)


@partial(jax.jit, static_argnames="model")
def _maps(variables, images: jax.Array, labels: jax.Array | None, *, model: ResNet) -> jax.Array:
    n, height, width = images.shape
    crop, pool = model.input.crop, model.input.pool
    activations = forward(model, variables, prepare(to_unit(images), model.input), TO_STAGE_2)
    logits, pull_back = jax.vjp(lambda a: forward(model, variables, a, AFTER_STAGE_2), activations)
    labels = logits.argmax(-1) if labels is None else labels
    (gradient,) = pull_back(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
    coarse = jnp.sum(activations * jax.nn.relu(gradient), axis=-1, dtype=jnp.float32)
    # The centre of pixel j of stage 2 is pooled pixel 2 j, because of its stride of 2 and padding of 1.
    scale = jnp.float32([2 * pool, 2 * pool])
    shift = jnp.float32([(height - crop) // 2, (width - crop) // 2]) - pool / 2
    maps = jax.image.scale_and_translate(coarse, (n, height, width), (1, 2), scale, shift, "linear")
    return jax.vmap(partial(blur, sigma=2 * pool, size=8 * pool + 1))(maps)  # the resolution of stage 2


def predict(
    model: ResNet,
    variables: Any,
    images: np.ndarray,
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
    model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128, tta: bool = False
) -> np.ndarray:
    """Returns the logits of `images`, float32 (n, len(model.classes)).

    Args:
      model: the network.
      variables: {"params": ..., "batch_stats": ...}, as `model.init` and `load_network` return them.
      images: (n, height, width), any real dtype and unit: each is scaled by its own minimum and maximum. A memory map
        is read batch by batch.
      batch_size: images per step.
      tta: test-time augmentation: the mean over an image and its three mirror images, at four times the cost.

    Raises:
      InputError: not (n, height, width), smaller than the crop, or NaN or infinite pixels.
    """
    return outputs(model, variables, images, batch_size, tta)[0]


def embed(model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Returns the features before the head, float32 (n, 4 * model.width); arguments as in `predict_logits`."""
    return outputs(model, variables, images, batch_size)[1][:, -4 * model.width :]


def outputs(
    model: ResNet, variables: Any, images: np.ndarray, batch_size: int = 128, tta: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits, and the channel means: the mean over all pixels of each channel after the first convolution
    and after each stage, float32 (n, 8 * model.width). The last half of them are the features of `embed`.

    Arguments as in `predict_logits`. The channel means are those of the images themselves, also with `tta`.
    """
    logits = np.empty((len(images), len(model.classes)), np.float32)
    means = np.empty((len(images), 8 * model.width), np.float32)
    for rows, batch in _batches(images, model, batch_size):
        own = _outputs(variables, batch, model=model, tta=tta)
        logits[rows], means[rows] = (array[: rows.stop - rows.start] for array in own)
    return logits, means


def saliency(
    model: ResNet, variables: Any, images: np.ndarray, labels: np.ndarray | None = None, batch_size: int = 64
) -> np.ndarray:
    """Returns saliency maps (LayerCAM) of `images`, float32 (n, height, width), not negative.

    LayerCAM (Jiang et al. 2021, IEEE Trans. Image Process. 30, 5875) after stage 2: activations times the positive part
    of the logit's gradient with respect to them, summed over channels. On simulated lenses its maps peak at the
    substructure more often than those of Grad-CAM.

    Args:
      model, variables, images: as in `predict_logits`.
      labels: int (n,), the classes to explain; if not given, the predicted ones.
      batch_size: images per step.

    Raises:
      InputError: as in `predict_logits`; `labels` has another length.
    """
    if labels is not None:
        expected = (len(images),)
        check(np.shape(labels) == expected, f"labels have shape {np.shape(labels)}, expected {expected}: one per image")
    maps = np.empty(np.shape(images), np.float32)
    for rows, batch in _batches(images, model, batch_size):
        n = rows.stop - rows.start
        own = None if labels is None else np.pad(labels[rows], (0, len(batch) - n))
        maps[rows] = _maps(variables, batch, own, model=model)[:n]
    return maps


def export_program(model: ResNet, variables: Any, image_shape: tuple[int, int]) -> bytes:
    """Returns `predict` as a serialized StableHLO program for CPU, CUDA and TPU, which needs JAX but not this package.

    `jax.export.deserialize(program).call(images)` takes float32 (n, *image_shape) for any n, pixels as on disk, and
    returns the probabilities, float32 (n, len(model.classes)).
    """
    from jax import export  # jax does not import it by itself

    (n,) = export.symbolic_shape("n")
    function = jax.jit(lambda images: jax.nn.softmax(_outputs(variables, images, model=model, tta=False)[0]))
    images = jax.ShapeDtypeStruct((n, *image_shape), jnp.float32)
    return bytes(export.export(function, platforms=("cpu", "cuda", "tpu"))(images).serialize())


def _batches(images: np.ndarray, model: ResNet, batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, images[rows]); the last batch is padded with zeros, so that all have one shape and compile once."""
    images = np.asanyarray(images)  # keeps a memory map
    check_images(images.shape, model.input)
    check(batch_size >= 1, f"batch_size={batch_size}: expected at least 1")
    batch_size = max(1, min(batch_size, len(images)))
    for start in range(0, len(images), batch_size):
        rows = slice(start, min(start + batch_size, len(images)))
        batch = read_rows(images, rows)
        yield rows, np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0)))
