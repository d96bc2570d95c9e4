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


def assert_same(ours, theirs, variables, x):
    """Checks that two modules have the same outputs, gradients and updated statistics."""
    ours, theirs = (gradients(module, variables, x) for module in (ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, theirs)  # float64


@pytest.mark.parametrize("shape, filters, kernel, stride", [
    *(((1, 6, 5, 1), 3, 3, 1), ((3, 7, 5, 4), 2, 3, 1), ((4, 6, 6, 3), 17, 3, 1), ((4, 6, 5, 17), 2, 3, 1)),
    *(((1, 6, 5, 1), 3, 3, 2), ((3, 7, 5, 4), 17, 3, 2), ((4, 6, 6, 3), 4, 3, 2)),
    *(((4, 6, 5, 2), 4, 1, 2), ((3, 7, 5, 2), 4, 1, 1)),
])  # fmt: skip
def test_convolution_and_its_gradients_are_flax_s(monkeypatch, shape, filters, kernel, stride):
    # Of 4 images, the gradient then takes 1, 2 or 4 at a time.
    monkeypatch.setattr("gravlens_jax.layers.GROUP_ELEMENTS", 160)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape), rng.normal(size=(kernel, kernel, shape[3], filters))
    with jax.enable_x64(True):
        flax = nn.Conv(filters, (kernel, kernel), stride, padding=kernel // 2, use_bias=False, dtype=jnp.float64)
        assert_same(Conv(filters, kernel, stride, dtype=jnp.float64), flax, {"params": {"kernel": w}}, x)


def test_convolution_is_initialized_as_flax_s_by_he_et_al():
    flax = nn.Conv(8, (3, 3), use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
    ours, theirs = (module.init(jax.random.key(0), jnp.float32(X)) for module in (Conv(8), flax))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_other_platforms_keep_xla_s_gradient():
    x, w = jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
    traced = jax.jit(jax.grad(lambda w: conv(x, w, 1).sum())).trace(w)
    loops = {name: "while" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}
    assert loops == {"cpu": True, "cuda": False, "tpu": False}


def test_normalization_and_its_gradients_are_flax_s():
    options = {"momentum": 0.9, "epsilon": 1e-5}
    with jax.enable_x64(True):
        flax = nn.BatchNorm(False, **options, dtype=jnp.float64)
        assert_same(BatchNorm(False, dtype=jnp.float64), flax, jax.tree.map(np.float64, NORM), X)
    by_running_statistics = nn.BatchNorm(True, **options).apply(NORM, X)
    np.testing.assert_allclose(BatchNorm(True).apply(NORM, X), by_running_statistics, rtol=1e-5, atol=1e-5)


def test_bfloat16_has_float32_statistics_and_gradients():
    x = jnp.array(X, jnp.bfloat16)
    (grads, _), (y, updated) = gradients(BatchNorm(False, dtype=jnp.bfloat16), NORM, x)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((updated, grads))} == {jnp.dtype("float32")}
    expected = 0.9 * NORM["batch_stats"]["mean"] + 0.1 * X.mean((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["mean"], expected, rtol=1e-2)
