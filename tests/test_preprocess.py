import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import AugmentConfig, InputConfig
from gravlens_jax.lensing.profiles import pixel_grid
from gravlens_jax.preprocess import augment, augment_vectors, check_images, flip, prepare, rotate_and_shift, to_unit
from helpers import refuse

IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (8, 11, 9)).astype(np.float32)


@pytest.mark.parametrize("dtype, factor", [("u2", 500), ("f2", 10), ("f4", 1), ("f4", 1e-3)])
def test_each_image_is_scaled_by_its_own_minimum_and_maximum(dtype, factor):
    images = (IMAGES * factor).astype(dtype)
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    unit = to_unit(jnp.array(images))
    np.testing.assert_allclose(unit[..., 0], (images - low).astype("f4") / (high - low), atol=1e-3)
    np.testing.assert_allclose(to_unit(unit[..., 0]), unit, rtol=1e-6)
    assert np.isfinite(to_unit(jnp.full((1, 8, 8), 7, jnp.uint8))).all()


@pytest.mark.parametrize("stretch, function", [("linear", lambda x: x), ("log", lambda x: np.log(x + 0.01) + 2.3)])
def test_prepare_is_crop_pool_stretch(stretch, function):
    config = InputConfig(crop=6, pool=3, stretch=stretch)
    pooled = IMAGES[:, 2:8, 1:7].reshape(8, 2, 3, 2, 3).mean((2, 4))
    prepared = prepare(jnp.array(IMAGES)[..., None], config)[..., 0]
    np.testing.assert_allclose(prepared, function(pooled), rtol=1e-5, atol=1e-6)


def test_images_that_cannot_be_cropped_are_refused():
    refuse("input.crop 10$", check_images, (2, 12, 20), InputConfig(crop=15, pool=5))


def test_flips_are_the_four_mirror_images_equally_often():
    image = jnp.arange(6.0).reshape(1, 2, 3, 1)
    flipped = np.asarray(flip(jnp.repeat(image, 4000, 0), jax.random.key(0)))[..., 0]
    mirrors = [image[0, ::r, ::c, 0] for r in (1, -1) for c in (1, -1)]
    counts = [np.sum((flipped == np.asarray(m)).all((1, 2))) for m in mirrors]
    assert sum(counts) == 4000 and min(counts) > 900


def test_vectors_are_mirrored_with_the_images():
    x, y = pixel_grid(5, 1.0)
    potential, gradient = x * y + x + 2 * y, jnp.stack([y + 1, x + 2], axis=-1)
    key, config = jax.random.key(0), AugmentConfig()
    surrounded = jnp.pad(potential, (0, 1), constant_values=9)  # the crop is not central
    images = augment(jnp.repeat(surrounded[None, :, :, None], 100, 0), key, config, 5)[..., 0]
    vectors = augment_vectors(jnp.repeat(gradient[None], 100, 0), key, config)
    assert len(np.unique(np.asarray(images).reshape(100, -1), axis=0)) == 4
    np.testing.assert_allclose(vectors[:, :, 1:, 0], np.diff(images, axis=2), atol=1e-6)  # slope along x
    np.testing.assert_allclose(vectors[:, 1:, :, 1], -np.diff(images, axis=1), atol=1e-6)  # rows run towards -y
    np.testing.assert_array_equal(augment(images[..., None], key, AugmentConfig(flip=False), 5)[..., 0], images)
    np.testing.assert_array_equal(augment_vectors(vectors, key, AugmentConfig(flip=False)), vectors)


def test_rotations_are_uniform_and_turn_about_the_centre():
    x, y = pixel_grid(21, 1.0)
    ramps = jnp.repeat(x[None, :, :, None], 400, 0)  # turned by an angle, x becomes cos x + sin y
    turned = np.asarray(rotate_and_shift(ramps, jax.random.key(0), 60.0, 0.0))[..., 0]
    inside = np.hypot(x, y) < 10
    slopes = np.stack([x[inside], y[inside]], 1)
    cos_sin, *_ = np.linalg.lstsq(slopes, turned[:, inside].T)
    assert np.abs(slopes @ cos_sin - turned[:, inside].T).max() < 0.8  # nearest neighbour: at most half a diagonal
    np.testing.assert_allclose(np.hypot(*cos_sin), 1, atol=0.02)
    degrees = np.rad2deg(np.arctan2(*cos_sin[::-1]))
    np.testing.assert_allclose(np.quantile(degrees, [0, 0.25, 0.5, 0.75, 1]), [-60, -30, 0, 30, 60], atol=6)


def test_shifts_are_whole_pixels_with_zeros_outside():
    images = jnp.array(IMAGES[:1, :9, :9, None]).at[0, 4, 4].set(1.0)
    shifted = np.asarray(rotate_and_shift(jnp.repeat(images, 200, 0), jax.random.key(0), 0.0, 0.3))[..., 0]
    padded, places = np.pad(images[0, ..., 0], 9), np.argwhere(shifted == 1)[:, 1:] - 4
    assert set(places[:, 0]) == set(places[:, 1]) == {-3, -2, -1, 0, 1, 2, 3}  # 0.3 of 9 pixels is 2.7
    for image, (down, right) in zip(shifted, places, strict=True):
        np.testing.assert_array_equal(image, padded[9 - down : 18 - down, 9 - right : 18 - right])
