from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.model import ResNet20, variable_shapes
from helpers import TINY_MODEL, make_variables


@pytest.mark.parametrize("depth, parameters", [(20, 268_979), (32, 463_411)])
def test_parameter_counts_of_the_published_networks(depth, parameters):
    shapes = variable_shapes(ResNet20(depth=depth))
    assert shapes.keys() == {"params", "batch_stats"}
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == parameters


@pytest.mark.parametrize("size, width", [((16, 16), 6), ((17, 13), 3), ((50, 50), 1)])
def test_any_image_size_width_and_number_of_classes(size, width):
    model = TINY_MODEL.clone(classes=("a", "b", "c", "d"), width=width)
    logits, feature_maps = jax.eval_shape(model.apply, variable_shapes(model), jnp.zeros((2, *size, 1)))
    scaled = [tuple(-(-length // factor) for length in size) for factor in (1, 1, 2, 4)]
    expected = [(2, *pixels, width * factor) for pixels, factor in zip(scaled, (1, 1, 2, 4), strict=True)]
    assert [x.shape for x in (logits, *feature_maps)] == [(2, 4), *expected]


def test_bfloat16_leaves_logits_float32():
    model, variables = TINY_MODEL.clone(dtype=jnp.bfloat16), make_variables(0)
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    logits, feature_maps = jax.jit(model.apply)(variables, x)
    assert logits.dtype == jnp.float32 and {x.dtype for x in feature_maps} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(logits, jax.jit(TINY_MODEL.apply)(variables, x)[0], atol=0.05)  # bfloat16 has 8 bits


def test_activations_are_those_of_their_names():
    variables, bias = make_variables(0), np.linspace(-4, 4, 4, dtype=np.float32)
    variables["params"]["norm0"] = {"scale": 0 * bias, "bias": bias}
    for name, expected in {"relu": np.maximum(bias, 0), "hard_swish": bias * np.clip(bias + 3, 0, 6) / 6}.items():
        feature_map = TINY_MODEL.clone(activation=name).apply(variables, jnp.zeros((1, 16, 16, 1)))[1][0]
        np.testing.assert_allclose(feature_map[0, 0, 0], expected, atol=1e-6)


def test_training_keeps_97_percent_of_the_running_statistics():
    apply = jax.jit(partial(TINY_MODEL.apply, train=True, mutable=["batch_stats"]))
    _, updated = apply(make_variables(0), jnp.zeros((2, 16, 16, 1)))  # every layer has mean and variance 0
    for statistics in updated["batch_stats"].values():
        np.testing.assert_allclose(statistics["mean"], 0, atol=1e-6)
        np.testing.assert_allclose(statistics["var"], 0.97, rtol=1e-6)
