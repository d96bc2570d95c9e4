import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.norm import BatchNorm


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(3, 2, (4, 5, 6, 3))


def results(module, variables, x, weights):
    """Output, running statistics and gradients, each of a batch in training."""

    def loss(params, x):
        y, updated = module.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(weights * nn.relu(y)), (y, updated)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)


def test_training_is_flax_s_batch_norm(x):
    with jax.enable_x64(True):
        stats = {"mean": jnp.array([1.0, 2, 3]), "var": jnp.array([1.0, 2, 3])}
        params = {"scale": jnp.array([1.0, 0.5, -2]), "bias": jnp.array([0.1, 0.2, 0.3])}
        variables = {"params": params, "batch_stats": stats}
        weights = np.random.default_rng(1).normal(size=x.shape)
        ours = results(BatchNorm(False, dtype=jnp.float64), variables, jnp.array(x), weights)
        flax = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, dtype=jnp.float64)
        theirs = results(flax, variables, jnp.array(x), weights)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_inference_is_flax_s_batch_norm(x):
    variables = {
        "params": {"scale": jnp.array([1.0, 0.5, -2]), "bias": jnp.array([0.1, 0.2, 0.3])},
        "batch_stats": {"mean": jnp.array([1.0, 2, 3]), "var": jnp.array([1.0, 2, 3])},
    }
    theirs = nn.BatchNorm(True, momentum=0.9, epsilon=1e-5).apply(variables, x)
    np.testing.assert_allclose(BatchNorm(True).apply(variables, x), theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_has_float32_statistics_and_gradients(x):
    module = BatchNorm(False, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    (_, (y, updated)), (grads, _) = results(module, variables, jnp.array(x, jnp.bfloat16), 1.0)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((updated, grads))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-2)
