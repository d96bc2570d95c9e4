import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.layers import BatchNorm, Conv

RNG = np.random.default_rng(0)


def differentiate(module, variables, x):
    """Returns gradients for parameters and `x`, the output and the updated statistics, of a batch in training."""

    def loss(params, x):
        y, updated = module.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), (y, updated)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)


@pytest.mark.parametrize("shape, filters, stride", [
    *(((1, 6, 5, 1), 3, 1), ((3, 7, 5, 4), 2, 1), ((6, 6, 6, 3), 17, 1), ((4, 6, 5, 17), 2, 1), ((3, 4, 5, 64), 2, 1)),
    *(((1, 6, 5, 1), 3, 2), ((3, 7, 5, 4), 17, 2), ((6, 6, 6, 3), 4, 2), ((4, 5, 7, 17), 2, 2)),
])  # fmt: skip
def test_convolution_and_its_gradients_are_flax_s(shape, filters, stride):
    x, kernel = RNG.normal(size=shape), RNG.normal(size=(3, 3, shape[3], filters))
    with jax.enable_x64(True):
        flax = nn.Conv(filters, (3, 3), stride, padding=1, use_bias=False, dtype=jnp.float64)
        ours = Conv(filters, stride, jnp.float64, train=True)
        found, expected = (differentiate(module, {"params": {"kernel": kernel}}, x) for module in (ours, flax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


def test_convolution_is_initialized_as_flax_s_by_he_et_al():
    flax = nn.Conv(8, (3, 3), use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
    ours, expected = (module.init(jax.random.key(0), jnp.zeros((1, 5, 6, 3))) for module in (Conv(8), flax))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_other_platforms_have_xla_s_convolutions_alone():
    x, variables = jnp.ones((2, 4, 4, 1)), {"params": {"kernel": jnp.ones((3, 3, 1, 2))}}
    traced = jax.jit(differentiate, static_argnums=0).trace(Conv(2, 2, train=True), variables, x)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text and "while" not in text and "dot_general" not in text


NORM = {
    "params": {"scale": jnp.array([1.0, 0.5, -2]), "bias": jnp.array([0.1, 0.2, 0.3])},
    "batch_stats": {"mean": jnp.array([1.0, 2, 3]), "var": jnp.array([1.0, 2, 3])},
}
X = RNG.normal(3, 2, (4, 5, 6, 3))


def test_normalization_and_its_gradients_are_flax_s():
    options = {"momentum": 0.9, "epsilon": 1e-5}
    with jax.enable_x64(True):
        modules = BatchNorm(False, dtype=jnp.float64), nn.BatchNorm(False, **options, dtype=jnp.float64)
        ours, flax = (differentiate(module, jax.tree.map(np.float64, NORM), X) for module in modules)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, flax)
    by_running_statistics = nn.BatchNorm(True, **options).apply(NORM, X)
    np.testing.assert_allclose(BatchNorm(True).apply(NORM, X), by_running_statistics, rtol=1e-5, atol=1e-5)
