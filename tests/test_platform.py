"""Numbers at the sizes that users run, from programs compiled with XLA's default flags or those of `cli`.

conftest.py sets flags that make the other tests compile faster, so these programs run in a process of their own.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import model as model_module
from gravlens_jax.cli import CPU_FLAGS, has_cpu_flags
from gravlens_jax.layers import BatchNorm, Conv
from helpers import run_code

SHAPES = [  # size, channels, filters and stride of the convolutions of ResNet-20 for images of 50 x 50 pixels
    *((50, 1, 16, 1), (50, 16, 16, 1), (50, 16, 32, 2)),
    *((25, 32, 32, 1), (25, 32, 64, 2), (13, 64, 64, 1)),
]


def flax_conv(filters, size=3, stride=1, train=True, **options):
    return nn.Conv(filters, (size, size), stride, padding=size // 2, use_bias=False, **options)


def layers(conv, norm, dtype):
    """Returns a function: gradients of one convolution and normalization of each of SHAPES."""

    def loss(params, images):
        total = 0.0
        for (_, _, filters, stride), kernel, x in zip(SHAPES, params, images, strict=True):
            y = conv(filters, stride=stride, dtype=dtype, train=True).apply({"params": {"kernel": kernel}}, x)
            y, _ = norm(False, dtype=dtype).init_with_output(jax.random.key(0), y)
            total += jnp.mean(jnp.sin(y) * (jnp.arange(y.size) % 7 - 3).reshape(y.shape))
        return total

    return jax.grad(loss, (0, 1))


def network(conv, norm, dtype):
    """Returns a function: value and gradient of the loss of ResNet-20."""
    model_module.Conv, model_module.BatchNorm = conv, norm
    model = model_module.ResNet20(dtype=dtype)

    def loss(params, variables, images):
        (logits, _), _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    return lambda variables, images: jax.value_and_grad(loss)(variables["params"], variables, images)


def relative_errors(make, params, x):
    """Returns the errors of our layers in float32 by name; flax's in float64 are taken for exact."""
    ours = jax.device_get(jax.jit(make(Conv, BatchNorm, jnp.float32))(params, x))
    with jax.enable_x64(True):
        exact = jax.jit(make(flax_conv, nn.BatchNorm, jnp.float64))(*jax.tree.map(np.float64, (params, x)))
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), ours, jax.device_get(exact))
    return {jax.tree_util.keystr(path): float(error) for path, error in jax.tree_util.tree_leaves_with_path(errors)}


def measure():
    """Prints what the tests check as JSON."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(3, 3, *shape[1:3])).astype(np.float32) for shape in SHAPES]
    images = [rng.normal(1, 1, (16, size, size, channels)).astype(np.float32) for size, channels, _, _ in SHAPES]
    shapes = model_module.variable_shapes(model_module.ResNet20())
    variables = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32), shapes)  # init compiles for long
    rows = np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    identity = jnp.eye(3)
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((identity @ row) ** 2)))(rows)
    results = {
        "layers": relative_errors(layers, kernels, images),
        "network": relative_errors(network, variables, images[0][:8]),
        "sums": float(np.abs(sums / np.maximum(rows[:, 0] ** 2, 1) - (rows[:, 0] > 0)).max()),
    }
    print(json.dumps(results))


@pytest.mark.parametrize("flags", ["", CPU_FLAGS])
def test_gradients_have_the_accuracy_of_float32_and_sums_over_many_rows_are_right(flags):
    if flags and not has_cpu_flags():
        pytest.skip("jaxlib may not know these flags")
    measured = json.loads(run_code("import test_platform; test_platform.measure()", XLA_FLAGS=flags))
    layers, network = (measured[name].values() for name in ("layers", "network"))
    assert len(layers) == 2 * len(SHAPES) and max(layers) < 2e-5  # sums of 40,000 products
    assert len(network) == 1 + 19 * 3 + 2 and max(network) < 0.03  # rounding puts a few pixels beyond a ReLU
    assert measured["sums"] < 1e-6  # jaxlib 0.10.2 is wrong by 2e-3 beyond 32,768 rows; pyproject.toml excludes it
