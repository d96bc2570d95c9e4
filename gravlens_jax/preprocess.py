"""Preprocessing of stored images: scaling, augmentation, crop, pooling and stretch. Pure functions."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from gravlens_jax.config import AugmentConfig, InputConfig
from gravlens_jax.errors import check


def check_images(shape: tuple[int, ...], config: InputConfig) -> None:
    """Raises InputError unless `shape` is (n, height, width) and the crop fits into the images."""
    check(len(shape) == 3, f"images have shape {tuple(shape)}; expected (n, height, width)")
    largest = min(shape[1:]) // config.pool * config.pool
    small = f"images are {shape[1]} x {shape[2]} pixels, the network's input is a crop of {config.crop} x {config.crop}"
    advice = "give larger images" + (f", or train with --input.crop {largest}" if largest else "")
    check(largest >= config.crop, f"{small}; {advice}")


def check_image_shape(shape: tuple[int, ...], expected: tuple[int, int], where: str) -> None:
    """Raises InputError unless images have the (height, width) that a network was trained on."""
    trained = f"the network was trained on {expected[0]} x {expected[1]}; give images of that size and pixel scale"
    check(tuple(shape) == expected, f"{where}: {shape[0]} x {shape[1]} pixels, but {trained}")


def to_unit(images: jax.Array) -> jax.Array:
    """Returns images (n, height, width), of any real dtype, scaled to [0, 1] by their own minimum and maximum.

    The result is float32 (n, height, width, 1); a constant image becomes 0. The public images were scaled so too.
    `npz.read_rows` has already done this, on the host, for more than 16 bits a pixel.
    """
    images = images.astype(jnp.float32)[..., None]
    low, high = (limit(images, (1, 2, 3), keepdims=True) for limit in (jnp.min, jnp.max))
    return (images - low) / jnp.where(high > low, high - low, 1)


def flip(images: jax.Array, key: jax.Array, vectors: bool = False) -> jax.Array:
    """Mirrors each image (n, height, width, channels) along each axis with probability 1/2.

    With `vectors`, the two channels are the x and y components of vectors, which are mirrored too.
    """
    for axis, axis_key in zip((1, 2), jax.random.split(key), strict=True):
        mirrored = jax.random.bernoulli(axis_key, jnp.float32(0.5), (images.shape[0], 1, 1, 1))
        mirror = jnp.flip(images, axis)
        if vectors:  # rows are along y
            mirror *= jnp.array([1, -1] if axis == 1 else [-1, 1], images.dtype)[None, None, None]
        images = jnp.where(mirrored, mirror, images)
    return images


def rotate_and_shift(images: jax.Array, key: jax.Array, max_rotation: float, max_shift: float) -> jax.Array:
    """Rotates and shifts each image, float (n, height, width, 1), at random: nearest neighbour, zero outside.

    Angles are uniform in [-max_rotation, max_rotation] degrees, shifts in [-max_shift, max_shift] of height and width.
    """
    n, height, width, _ = images.shape
    angle_key, shift_key = jax.random.split(key)
    uniform = partial(jax.random.uniform, dtype=jnp.float32, minval=-1, maxval=1)
    angles = uniform(angle_key, (n,)) * jnp.deg2rad(jnp.float32(max_rotation))
    shifts = uniform(shift_key, (n, 2)) * max_shift
    rows = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    columns = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2

    def one(image, angle, shift):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        r, c = rows - shift[0] * height, columns - shift[1] * width
        places = [cos * r - sin * c + (height - 1) / 2, sin * r + cos * c + (width - 1) / 2]
        return map_coordinates(image[..., 0], places, order=0, mode="constant", cval=0)[..., None]

    return jax.vmap(one)(images, angles, shifts)


def augment(images: jax.Array, key: jax.Array, config: AugmentConfig, crop: int) -> jax.Array:
    """Applies the random changes that `config` enables to images, float (n, height, width, 1), and crops them.

    Flips are about the centre of the crop, which is half a pixel from that of the images if only one size is odd.
    """
    flip_key, affine_key = jax.random.split(key)
    if config.max_rotation or config.max_shift:
        images = rotate_and_shift(images, affine_key, config.max_rotation, config.max_shift)
    images = _crop(images, crop)
    return flip(images, flip_key) if config.flip else images


def augment_vectors(vectors: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """Applies the changes of `augment` with the same key to maps of vectors (n, height, width, 2): flips only."""
    assert not config.max_rotation and not config.max_shift
    flip_key, _ = jax.random.split(key)
    return flip(vectors, flip_key, vectors=True) if config.flip else vectors


def _crop(images: jax.Array, size: int) -> jax.Array:
    top, left = ((length - size) // 2 for length in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def prepare(images: jax.Array, config: InputConfig) -> jax.Array:
    """Crops, pools and stretches images in [0, 1], float32 (n, height, width, 1).

    Height and width are at least `config.crop`; those of the result, float32 too, are crop / pool.
    """
    size = config.crop // config.pool
    images = _crop(images, config.crop).reshape(-1, size, config.pool, size, config.pool, 1).mean((2, 4))
    return jnp.log(images + 0.01) + 2.3 if config.stretch == "log" else images


def cell_means(images: jax.Array, config: InputConfig) -> jax.Array:
    """Returns the mean pixel in each cell of the network's last feature map: float32 (n, cells, cells, 1).

    `images` and `config` are those of `prepare`. Cells that reach over the crop's edge count 0 there.
    """
    window = config.cell, config.cell
    return nn.avg_pool(_crop(images, config.crop), window, strides=window, padding="SAME")
