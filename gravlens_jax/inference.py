"""Predictions of a trained network: probabilities, logits, outlier scores, features and maps of the substructure.

Pixels are read batch by batch through `npz.read_rows`, which checks them on the host.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gravlens_jax.errors import check
from gravlens_jax.metrics import VISIBLE, outlier_scores
from gravlens_jax.model import ResNet, apply_head
from gravlens_jax.npz import MappedImages, read_rows
from gravlens_jax.preprocess import cell_means, check_images, prepare, to_unit

Images = np.ndarray | MappedImages


def logits(model: ResNet, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the logits of images, float32 (n, len(model.classes)): a pure function for jit, vmap and derivatives.

    `images` are float32 (n, height, width). They are scaled in float32, unlike by `predict_logits`, which checks them
    first and scales in float64 unless they are float32: here NaN and infinite pixels, and ranges beyond float32, are
    the caller's to exclude.
    """
    outputs: Any = model.apply(variables, prepare(to_unit(images), model.input))
    return outputs[0]


@partial(jax.jit, static_argnames=("model", "tta", "maps"))
def _outputs(variables, images: jax.Array, *, model: ResNet, tta: bool, maps: bool) -> dict[str, jax.Array]:
    """Returns the arrays of `outputs`, by their names."""
    unit = to_unit(images)
    x = prepare(unit, model.input)
    mirrors = itertools.product((1, -1), (1, -1)) if tta else [(1, 1)]  # of y and of x
    found: list[dict[str, jax.Array]] = []
    for y_sign, x_sign in mirrors:
        outputs: Any = model.apply(variables, x[:, ::y_sign, ::x_sign])
        found.append({"logits": outputs[0]})
        if maps:
            deflection = apply_head(outputs[1][-1], variables["deflection"])[:, ::y_sign, ::x_sign]
            found[-1]["deflection"] = deflection * jnp.float32([x_sign, y_sign])[None, None, None]
        if len(found) == 1:
            means = jnp.concatenate([x.astype(jnp.float32).mean((1, 2)) for x in outputs[1]], 1)
    light = {"light": cell_means(unit, model.input)[..., 0]} if maps else {}
    return jax.tree.map(_mean, *found) | {"means": means} | light


def _mean(*arrays: jax.Array) -> jax.Array:
    """Returns the mean of one, or of four in an order in which those of mirrored images have the same bits."""
    return arrays[0] if len(arrays) == 1 else ((arrays[0] + arrays[1]) + (arrays[2] + arrays[3])) / 4


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
    (`metrics.outlier_scores`), above 1 for 1 % of images like those; the class of an image far above 1 is unreliable.
    NaN if the network has no population: an unfinished run, or weights of PyTorch.
    """
    logits, means = outputs(model, variables, images, batch_size, tta)[:2]
    probabilities = np.asarray(jax.nn.softmax(logits))
    return (probabilities, outlier_scores(variables.get("population"), means)) if return_outlier else probabilities


def predict_logits(
    model: ResNet, variables: Any, images: Images, batch_size: int = 128, tta: bool = False
) -> np.ndarray:
    """Returns the logits of `images`, float32 (n, len(model.classes)); `model, variables = load_network(...)`.

    `images` are (n, height, width), any real dtype and unit: each is scaled by its own minimum and maximum. A memory
    map is read batch by batch, `batch_size` images per step. `tta` is test-time augmentation: the mean over an image
    and its three mirror images, at four times the cost. InputError if images are not (n, height, width), smaller than
    the crop, or have NaN or infinite pixels.
    """
    return outputs(model, variables, images, batch_size, tta)[0]


def embed(model: ResNet, variables: Any, images: Images, batch_size: int = 128) -> np.ndarray:
    """Returns the features before the head, float32 (n, 4 * model.width); arguments as in `predict_logits`."""
    return outputs(model, variables, images, batch_size)[1][:, -4 * model.width :]


def outputs(
    model: ResNet, variables: Any, images: Images, batch_size: int = 128, tta: bool = False, maps: bool = False
) -> tuple[np.ndarray, ...]:
    """Returns logits, channel means and, if `maps`, two maps; arguments as in `predict_logits`.

    The channel means, float32 (n, 8 * model.width), are the means over all pixels of each channel after the first
    convolution and after each stage, of the images themselves also with `tta`; the last half are those of `embed`.
    The maps are that of `predict_deflection`, and the light in its cells, float32 (n, cells, cells): the mean pixel of
    the image scaled to [0, 1].
    """
    if maps:
        check_deflection(model, variables)
    n, cells = len(images), model.input.cells
    shapes: dict[str, tuple[int, ...]] = {"logits": (n, len(model.classes)), "means": (n, 8 * model.width)}
    shapes |= {"deflection": (n, cells, cells, 2), "light": (n, cells, cells)} if maps else {}
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for rows, batch in _batches(images, model, batch_size):
        for name, array in _outputs(variables, batch, model=model, tta=tta, maps=maps).items():
            arrays[name][rows] = array[: rows.stop - rows.start]
    return tuple(arrays.values())


def predict_deflection(
    model: ResNet, variables: Any, images: Images, batch_size: int = 128, tta: bool = False
) -> np.ndarray:
    """Returns maps of the deflection of light by dark substructure, float32 (n, cells, cells, 2), x and y in arcsec.

    The substructure's own deflection *minus that of the same mass in the smooth halo*, so 0 for a lens without. Cells
    have a quarter of the network's resolution (`deflection_grid`); maps are softened by 3/8 of a cell. +x is right, +y
    up, row 0 at +y. A linear function of the last feature map, which training taught to predict it. It is an
    expectation: it shrinks toward 0 where the image says little, and is an extrapolation in cells without light.

    Angles are those of the training images' pixel scale: multiply them by the ratio for another one. Masses: theta_E^2
    in the preset `ct1` follows the public images (luminosity distances), and is 1.56 to 1.80 times smaller than the
    textbook's for the same mass.

    Arguments and errors as in `predict_logits`; InputError also for a network without deflections. With `tta` mirrored
    images have mirrored maps.
    """
    return outputs(model, variables, images, batch_size, tta, maps=True)[2]


def has_deflection(model: ResNet, variables: Any) -> bool:
    """Whether a network predicts deflections."""
    return "deflection" in variables and model.pixel_scale is not None


def check_deflection(model: ResNet, variables: Any) -> None:
    """Raises InputError unless a network predicts deflections."""
    without = "the network predicts no deflections: its training images had no lens parameters, or it is unfinished"
    check(has_deflection(model, variables), without)


def deflection_grid(model: ResNet, image_shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y of the cells' centres, float32 (cells, cells), arcsec from the centre of the image.

    `image_shape` is (height, width); where the crop cannot be central, the cells are off by half a pixel.
    """
    check(model.pixel_scale is not None, "the pixel scale of the network's training images is not known")
    assert model.pixel_scale is not None
    cells, crop = model.input.cells, model.input.crop
    centres = (np.arange(cells) - (cells - 1) / 2) * model.input.cell
    y, x = ((centres - (length - crop) % 2 / 2) * model.pixel_scale for length in image_shape)
    return tuple(array.astype(np.float32) for array in np.meshgrid(x, -y))


def fit_deflection(
    model: ResNet, variables: Any, images: Images, render: Callable[[np.ndarray], np.ndarray], batch_size: int = 128
) -> dict[str, np.ndarray]:
    """Returns kernel and bias of the linear function from the last feature map to the deflection in its cells.

    Least squares over all cells, weighted by their visible light as in training, with a little regularization for
    channels that are always 0. `render` returns the true maps of rows.
    """
    size = 4 * model.width + 1
    products, targets = np.zeros((size, size)), np.zeros((size, 2))
    for rows, batch in _batches(images, model, batch_size):
        n = rows.stop - rows.start
        found = (np.asarray(x[:n], np.float64) for x in _features(variables, batch, model=model))
        features, light = (x.reshape(-1, x.shape[-1]) for x in found)
        features = np.pad(features, ((0, 0), (0, 1)), constant_values=1)
        weighted = features * np.minimum(1, light / VISIBLE)
        products += weighted.T @ features
        targets += weighted.T @ render(np.arange(rows.start, rows.stop)).reshape(-1, 2)
    products += 1e-6 * np.trace(products) / size * np.eye(size)
    solution = np.linalg.solve(products, targets).astype(np.float32)
    return {"kernel": solution[:-1], "bias": solution[-1]}


@partial(jax.jit, static_argnames="model")
def _features(variables, images: jax.Array, *, model: ResNet) -> tuple[jax.Array, jax.Array]:
    """Returns the last feature map, and the light in its cells with an axis of length 1."""
    unit = to_unit(images)
    outputs: Any = model.apply(variables, prepare(unit, model.input))
    return outputs[1][-1], cell_means(unit, model.input)


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
