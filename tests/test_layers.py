import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.layers import BatchNorm, Conv, conv

X = np.random.default_rng(0).normal(3, 2, (4, 5, 6, 3))
NORM = {
    "params": {"scale": jnp.array([1.0, 0.5, -2]), "bias": jnp.array([0.1, 0.2, 0.3])},
    "batch_stats": {"mean": jnp.array([1.0, 2, 3]), "var": jnp.array([1.0, 2, 3])},
}


def gradients(module, variables, x):
    """Returns gradients for parameters and `x`, the output and the updated statistics, of a batch in training."""

    def loss(params, x):
        y, updated = module.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape)), (y, updated)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, theirs)  # float64


@pytest.mark.parametrize("n, size", [(1, (6, 5)), (3, (7, 5)), (4, (6, 6))])
@pytest.mark.parametrize("channels, filters, kernel, stride", [
    *((1, 3, 3, 1), (4, 2, 3, 1), (3, 17, 3, 1), (17, 2, 3, 1)),
    *((1, 3, 3, 2), (4, 17, 3, 2), (2, 4, 1, 2), (2, 4, 1, 1)),
])  # fmt: skip
def test_convolution_and_its_gradients_are_flax_s(n, size, channels, filters, kernel, stride):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(n, *size, channels)), rng.normal(size=(kernel, kernel, channels, filters))
        flax = nn.Conv(filters, (kernel, kernel), stride, padding=kernel // 2, use_bias=False, dtype=jnp.float64)
        ours = Conv(filters, kernel, stride, dtype=jnp.float64)
        assert_same(*(gradients(module, {"params": {"kernel": w}}, x) for module in (ours, flax)))


def test_gradient_of_several_groups_of_images_is_flax_s(monkeypatch):
    monkeypatch.setattr("gravlens_jax.layers.GROUP_ELEMENTS", 2 * 5 * 6 * 2)  # two images in each group
    variables = {"params": {"kernel": np.random.default_rng(1).normal(size=(3, 3, 3, 2))}}
    with jax.enable_x64(True):
        flax = nn.Conv(2, (3, 3), padding=1, use_bias=False, dtype=jnp.float64)
        assert_same(*(gradients(module, variables, X) for module in (Conv(2, dtype=jnp.float64), flax)))


def test_convolution_is_initialized_as_flax_s_by_he_et_al():
    flax = nn.Conv(8, (3, 3), use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
    ours, theirs = (module.init(jax.random.key(0), jnp.float32(X)) for module in (Conv(8), flax))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_other_platforms_keep_xla_s_gradient():
    x, w = jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
    traced = jax.jit(jax.grad(lambda w: conv(x, w, 1).sum())).trace(w)
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        assert "while" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_normalization_in_training_and_its_gradients_are_flax_s():
    with jax.enable_x64(True):
        variables = jax.tree.map(np.float64, NORM)
        flax = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, dtype=jnp.float64)
        assert_same(*(gradients(module, variables, X) for module in (BatchNorm(False, dtype=jnp.float64), flax)))


def test_normalization_by_the_running_statistics_is_flax_s():
    theirs = nn.BatchNorm(True, momentum=0.9, epsilon=1e-5).apply(NORM, X)
    np.testing.assert_allclose(BatchNorm(True).apply(NORM, X), theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_has_float32_statistics_and_gradients():
    x = jnp.array(X, jnp.bfloat16)
    (grads, _), (y, updated) = gradients(BatchNorm(False, dtype=jnp.bfloat16), NORM, x)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((updated, grads))} == {jnp.dtype("float32")}
    expected = 0.9 * NORM["batch_stats"]["mean"] + 0.1 * X.mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["mean"], expected, rtol=1e-2)
