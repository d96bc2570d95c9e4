import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import AugmentConfig, InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.lensing.profiles import pixel_grid
from gravlens_jax.preprocess import augment, augment_vectors, check_images, flip, prepare, rotate_and_shift, to_unit

IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (8, 11, 9)).astype(np.float32)


@pytest.mark.parametrize("dtype, factor", [("u2", 500), ("f2", 10), ("f4", 1), ("f4", 1e-3)])
def test_each_image_is_scaled_by_its_own_minimum_and_maximum(dtype, factor):
    images = (IMAGES * factor).astype(dtype)
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    unit = to_unit(jnp.array(images))
    np.testing.assert_allclose(unit[..., 0], (images - low).astype("f4") / (high - low), atol=1e-3)
    np.testing.assert_allclose(to_unit(unit[..., 0]), unit, rtol=1e-6)
    assert np.isfinite(to_unit(jnp.full((1, 8, 8), 7, jnp.uint8))).all()


@pytest.mark.parametrize(
    "stretch, function", [("linear", lambda x: x), ("sqrt", np.sqrt), ("log", lambda x: np.log(x + 0.01))]
)
def test_prepare_is_crop_pool_stretch_standardize(stretch, function):
    config = InputConfig(crop=6, pool=3, stretch=stretch, mean=0.2, std=0.5)
    pooled = IMAGES[:, 2:8, 1:7].reshape(8, 2, 3, 2, 3).mean((2, 4))
    expected = (function(pooled) - 0.2) / 0.5
    np.testing.assert_allclose(prepare(jnp.array(IMAGES)[..., None], config)[..., 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape, message", [((16, 16), "expected .n, height"), ((2, 12, 20), "input.crop 10$")])
def test_images_that_cannot_be_cropped_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        check_images(shape, InputConfig(crop=15, pool=5))
    check_images((0, 15, 15), InputConfig(crop=15, pool=5))


def test_flips_are_the_four_mirror_images_equally_often():
    image = jnp.arange(6.0).reshape(1, 2, 3, 1)
    flipped = np.asarray(flip(jnp.repeat(image, 4000, 0), jax.random.key(0)))[..., 0]
    mirrors = [image[0, ::r, ::c, 0] for r in (1, -1) for c in (1, -1)]
    counts = [np.sum((flipped == np.asarray(m)).all((1, 2))) for m in mirrors]
    assert sum(counts) == 4000 and min(counts) > 900


def test_vectors_are_mirrored_with_the_images():
    x, y = pixel_grid(5, 1.0)
    potential = jnp.sin(x + 0.3) * jnp.cos(0.7 * y - 0.2)
    along_x, along_y = jnp.cos(x + 0.3) * jnp.cos(0.7 * y - 0.2), -0.7 * jnp.sin(x + 0.3) * jnp.sin(0.7 * y - 0.2)
    gradient = jnp.stack([along_x, along_y], axis=-1)
    key, config = jax.random.key(0), AugmentConfig()
    images = augment(jnp.repeat(potential[None, :, :, None], 100, 0), key, config)[..., 0]
    vectors = augment_vectors(jnp.repeat(gradient[None], 100, 0), key, config)
    assert len(np.unique(np.asarray(images).reshape(100, -1), axis=0)) == 4
    slopes = np.diff(images, axis=2)  # along x, of which the mean of two pixels' gradients is an approximation
    np.testing.assert_allclose((vectors[:, :, 1:, 0] + vectors[:, :, :-1, 0]) / 2, slopes, atol=0.1)
    slopes = -np.diff(images, axis=1)  # rows run towards -y
    np.testing.assert_allclose((vectors[:, 1:, :, 1] + vectors[:, :-1, :, 1]) / 2, slopes, atol=0.1)
    still = augment_vectors(vectors, key, AugmentConfig(flip=False))
    np.testing.assert_array_equal(still, vectors)


def test_rotation_by_90_degrees_and_shift_are_exact(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))  # the largest allowed
    image = jnp.array(IMAGES[:1, :7, :7, None])
    rotated = rotate_and_shift(image, jax.random.key(0), 90.0, 0.0)
    np.testing.assert_array_equal(rotated[0, ..., 0], np.rot90(image[0, ..., 0], -1))
    shifted = rotate_and_shift(image, jax.random.key(0), 0.0, 0.15)
    np.testing.assert_array_equal(shifted[0, 1:, 1:], image[0, :-1, :-1])
    assert not shifted[0, 0].any() and not shifted[0, :, 0].any()


def test_augmentation_is_a_function_of_the_key_and_may_be_off():
    images = jnp.array(IMAGES)[..., None]
    config = AugmentConfig(flip=True, max_rotation=90.0, max_shift=0.1)
    first, again, other = (jax.jit(augment, static_argnums=2)(images, jax.random.key(k), config) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(augment(images, jax.random.key(0), AugmentConfig(flip=False)), images)
