"""Numbers at the sizes that users run, from programs compiled with XLA's default flags or those of `cli`.

conftest.py sets flags that make the other tests compile faster, so these programs run in a process of their own.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.cli import CPU_FLAGS, has_cpu_flags
from gravlens_jax.layers import BatchNorm, Conv
from helpers import run_code

SHAPES = [  # size, channels, filters and stride of the convolutions of ResNet-20 for images of 50 x 50 pixels
    *((50, 1, 16, 1), (50, 16, 16, 1), (50, 16, 32, 2)),
    *((25, 32, 32, 1), (25, 32, 64, 2), (13, 64, 64, 1)),
]


def flax_conv(filters, stride, dtype, train):
    return nn.Conv(filters, (3, 3), stride, padding=1, use_bias=False, dtype=dtype)


def differentiate(conv, norm, dtype, kernels, images):
    """Returns gradients of one convolution and normalization of each of SHAPES."""

    def loss(kernels, images):
        total = 0.0
        for (_, _, filters, stride), kernel, x in zip(SHAPES, kernels, images, strict=True):
            y = conv(filters, stride=stride, dtype=dtype, train=True).apply({"params": {"kernel": kernel}}, x)
            y, _ = norm(False, dtype=dtype).init_with_output(jax.random.key(0), y)
            total += jnp.mean(jnp.sin(y) * (jnp.arange(y.size) % 7 - 3).reshape(y.shape))
        return total

    return jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(kernels, images))


def measure():
    """Prints the errors of our gradients in float32, those of flax in float64 are taken for exact, and of sums."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(3, 3, *shape[1:3])).astype(np.float32) for shape in SHAPES]
    images = [rng.normal(1, 1, (16, size, size, channels)).astype(np.float32) for size, channels, _, _ in SHAPES]
    ours = differentiate(Conv, BatchNorm, jnp.float32, kernels, images)
    with jax.enable_x64(True):
        exact = differentiate(flax_conv, nn.BatchNorm, jnp.float64, *jax.tree.map(np.float64, (kernels, images)))
    errors = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), ours, exact)
    rows = np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    identity = jnp.eye(3)
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((identity @ row) ** 2)))(rows)
    error = np.abs(sums / np.maximum(rows[:, 0] ** 2, 1) - (rows[:, 0] > 0)).max()
    print(json.dumps([jax.tree.leaves(errors), float(error)]))


@pytest.mark.parametrize("flags", ["", CPU_FLAGS])
def test_gradients_have_the_accuracy_of_float32_and_sums_over_many_rows_are_right(flags):
    if flags and not has_cpu_flags():
        pytest.skip("jaxlib may not know these flags")
    gradients, sums = json.loads(run_code("import test_platform; test_platform.measure()", XLA_FLAGS=flags))
    assert len(gradients) == 2 * len(SHAPES) and max(gradients) < 2e-5  # sums of 40,000 products
    assert sums < 1e-6  # jaxlib 0.10.2 is wrong by 2e-3 beyond 32,768 rows; pyproject.toml excludes it
