import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.augment import augment, flip, prepare, rotate_and_shift, to_unit
from gravlens_jax.config import AugmentConfig, InputConfig

RNG = np.random.default_rng(0)


def test_counts_are_scaled_by_their_own_minimum_and_maximum():
    counts = RNG.poisson(50, (3, 8, 8)).astype(np.uint16)
    expected = (counts - counts.min((1, 2), keepdims=True)) / np.ptp(counts, axis=(1, 2))[:, None, None]
    np.testing.assert_allclose(to_unit(jnp.array(counts))[..., 0], expected, rtol=1e-6)


def test_images_within_0_and_1_are_kept_as_they_are():
    images = RNG.uniform(0.1, 0.9, (2, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(to_unit(jnp.array(images))[..., 0], images)


def test_constant_images_stay_finite():
    assert jnp.isfinite(to_unit(jnp.full((1, 4, 4), 7, jnp.uint8))).all()


@pytest.mark.parametrize(
    "stretch, function", [("linear", lambda x: x), ("sqrt", np.sqrt), ("log", lambda x: np.log(x + 0.01))]
)
def test_prepare_is_crop_pool_stretch_standardise(stretch, function):
    images = RNG.random((2, 11, 9)).astype(np.float32)
    config = InputConfig(crop=6, pool=3, stretch=stretch, mean=0.2, std=0.5)
    cropped = images[:, 2:8, 1:7]
    pooled = [[cropped[:, r : r + 3, c : c + 3].mean((1, 2)) for c in (0, 3)] for r in (0, 3)]
    expected = (function(np.moveaxis(np.array(pooled), 2, 0)) - 0.2) / 0.5
    np.testing.assert_allclose(prepare(jnp.array(images)[..., None], config)[..., 0], expected, rtol=1e-5, atol=1e-6)


def test_flips_are_the_four_mirror_images_equally_often():
    image = jnp.arange(6.0).reshape(1, 2, 3, 1)
    flipped = np.asarray(flip(jnp.repeat(image, 4000, 0), jax.random.key(0)))[..., 0]
    mirrors = [image[0, ::r, ::c, 0] for r in (1, -1) for c in (1, -1)]
    counts = [np.sum((flipped == np.asarray(m)).all((1, 2))) for m in mirrors]
    assert sum(counts) == 4000 and min(counts) > 900


def test_a_rotation_by_90_degrees_is_a_transposed_mirror_image(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))  # the largest angle allowed
    image = jnp.array(RNG.random((1, 7, 7, 1)))
    rotated = rotate_and_shift(image, jax.random.key(0), 90.0, 0.0)
    np.testing.assert_array_equal(rotated[0, ..., 0], np.rot90(image[0, ..., 0], -1))


def test_a_shift_moves_pixels_and_fills_with_zero(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))
    image = jnp.array(RNG.random((1, 10, 10, 1)))
    shifted = rotate_and_shift(image, jax.random.key(0), 0.0, 0.1)
    np.testing.assert_array_equal(shifted[0, 1:, 1:], image[0, :-1, :-1])
    assert not shifted[0, 0].any() and not shifted[0, :, 0].any()


def test_augmentation_is_a_function_of_the_key_and_off_when_off():
    images = jnp.array(RNG.random((8, 6, 6, 1)))
    config = AugmentConfig(flip=True, max_rotation=90.0, max_shift=0.1)
    first, again, other = (augment(images, jax.random.key(k), config) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(augment(images, jax.random.key(0), AugmentConfig(flip=False)), images)
