import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import InputConfig, ModelConfig
from gravlens_jax.model import ResNet, ResNet20, make_model, variable_shapes
from helpers import TINY_MODEL, make_variables


@pytest.mark.parametrize("depth, parameters", [(20, 268_979), (32, 463_411)])
def test_parameter_counts_of_the_published_networks(depth, parameters):
    shapes = variable_shapes(ResNet20(depth=depth))
    assert shapes.keys() == {"params", "batch_stats"}
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == parameters


def test_config_describes_every_attribute_of_the_network():
    config, input_config = ModelConfig(depth=14, width=8, projection=True, dtype="bfloat16"), InputConfig(crop=50)
    expected = {"depth": 14, "width": 8, "classes": ("a", "b"), "projection": True, "dtype": jnp.dtype("bfloat16")}
    assert make_model(config, input_config, ("a", "b")) == ResNet(**expected, input=input_config.resolve())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("size, width", [((16, 16), 6), ((17, 13), 3), ((50, 50), 1)])
def test_any_image_size_width_and_number_of_classes(size, width, projection):
    model = TINY_MODEL.clone(classes=("a", "b", "c", "d"), width=width, projection=projection)
    logits, feature_maps = jax.eval_shape(model.apply, variable_shapes(model), jnp.zeros((2, *size, 1)))
    assert logits.shape == (2, 4)
    scaled = [tuple(-(-length // factor) for length in size) for factor in (1, 1, 2, 4)]
    expected = [(2, *pixels, width * factor) for pixels, factor in zip(scaled, (1, 1, 2, 4), strict=True)]
    assert [x.shape for x in feature_maps] == expected


def test_bfloat16_leaves_parameters_statistics_and_logits_float32():
    model, variables = TINY_MODEL.clone(dtype=jnp.bfloat16), make_variables(0)
    assert variable_shapes(model) == jax.eval_shape(lambda: variables)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    logits, feature_maps = jax.jit(model.apply)(variables, x)
    assert logits.dtype == jnp.float32 and {x.dtype for x in feature_maps} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(logits, jax.jit(TINY_MODEL.apply)(variables, x)[0], atol=0.05)  # bfloat16 has 8 bits


def test_projection_shortcuts_add_two_convolutions():
    plain, projected = (variable_shapes(TINY_MODEL.clone(projection=p))["params"] for p in (False, True))
    names = [f"stage{stage}_block1_projection{suffix}" for stage in (2, 3) for suffix in ("", "_norm")]
    assert sorted(projected.keys() - plain.keys()) == names
    assert projected["stage2_block1_projection"]["kernel"].shape == (1, 1, 4, 8)


def numpy_network(variables, x, train):
    """Returns logits, feature maps and statistics of depth 8, written with loops in float64: a reference."""
    params, statistics = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))

    def convolve(x, name, stride):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
        return np.einsum("nrscij,ijcf->nrsf", windows, params[name]["kernel"])

    def norm(x, name):
        s, p = statistics[name], params[name]
        if train:
            batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
            s, statistics[name] = batch, {part: 0.9 * s[part] + 0.1 * batch[part] for part in s}
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    feature_maps = [np.maximum(norm(convolve(x, "conv0", 1), "norm0"), 0)]
    for stage in (1, 2, 3):
        name, stride, x = f"stage{stage}_block1", 1 if stage == 1 else 2, feature_maps[-1]
        y = np.maximum(norm(convolve(x, f"{name}_conv1", stride), f"{name}_norm1"), 0)
        y = norm(convolve(y, f"{name}_conv2", 1), f"{name}_norm2")
        if stride == 2:
            zeros = np.zeros((*y.shape[:3], y.shape[3] // 4))
            x = np.concatenate([zeros, x[:, ::2, ::2], zeros], -1)
        feature_maps.append(np.maximum(x + y, 0))
    logits = feature_maps[-1].mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return logits, tuple(feature_maps), statistics


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [8, 9])
def test_network_is_the_one_described(size, train):
    rng = np.random.default_rng(0)
    shapes = variable_shapes(TINY_MODEL)
    variables = jax.tree.map(lambda v: rng.uniform(0.3, 1.0, v.shape) * rng.choice([-1, 1], v.shape), shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    x = rng.normal(size=(3, size, size, 1))
    apply = jax.jit(lambda *arguments: TINY_MODEL.apply(*arguments, train=train, mutable=["batch_stats"]))
    (logits, feature_maps), updated = apply(jax.tree.map(np.float32, variables), jnp.float32(x))
    expected = numpy_network(variables, x, train)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-4),
        (logits, feature_maps, updated["batch_stats"]),
        expected,
    )


def test_importing_the_network_needs_little_more_than_flax():
    code = """
import sys
import flax.linen
loaded = set(sys.modules)
from gravlens_jax import ResNet20
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
print(*new & {"matplotlib", "optax", "orbax", "rich", "scipy", "sklearn", "tyro", "zipfile"})
print(*sorted(name for name in sys.modules if name.startswith("gravlens_jax.")))
import gravlens_jax.report
print("matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    libraries, modules, draws = done.stdout.splitlines()
    assert libraries == "" and draws == "False"  # matplotlib is imported only for drawing
    assert modules.split() == [f"gravlens_jax.{name}" for name in ("config", "errors", "layers", "model")]
