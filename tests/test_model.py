import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import InputConfig, ModelConfig
from gravlens_jax.model import ResNet, ResNet20, make_model, variable_shapes

SMALL = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=1, stretch="linear", mean=0.0, std=1.0))


def shapes_and_dtypes(variables):
    return jax.tree.map(lambda x: (x.shape, x.dtype), variables)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))


@pytest.mark.parametrize("depth, parameters", [(20, 268_979), (32, 463_411)])
def test_parameter_counts_of_the_published_networks(depth, parameters):
    params = variable_shapes(ResNet20(depth=depth))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


def test_config_describes_every_attribute_of_the_network():
    config, input_config = ModelConfig(depth=14, width=8, projection=True, dtype="bfloat16"), InputConfig(crop=50)
    assert make_model(config, input_config, ("a", "b")) == ResNet(
        depth=14,
        width=8,
        classes=("a", "b"),
        projection=True,
        dtype=jnp.dtype("bfloat16"),
        input=input_config.resolve(),
    )


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("size, width", [((16, 16), 6), ((17, 13), 3), ((50, 50), 1)])
def test_any_image_size_width_and_number_of_classes(size, width, projection):
    model = SMALL.clone(classes=("a", "b", "c", "d"), width=width, projection=projection)
    logits = jax.eval_shape(model.apply, variable_shapes(model), jnp.zeros((2, *size, 1)))
    assert logits.shape == (2, 4)


def test_bfloat16_leaves_parameters_statistics_and_logits_float32(variables):
    model = SMALL.clone(dtype=jnp.bfloat16)
    assert shapes_and_dtypes(variable_shapes(model)) == shapes_and_dtypes(variables)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    logits = jax.jit(model.apply)(variables, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(SMALL.apply)(variables, x), atol=0.05)  # bfloat16 has 8 bits


def test_projection_shortcuts_add_two_convolutions():
    plain, projected = (variable_shapes(SMALL.clone(projection=p))["params"] for p in (False, True))
    names = [f"stage{stage}_block1_projection{suffix}" for stage in (2, 3) for suffix in ("", "_norm")]
    assert sorted(projected.keys() - plain.keys()) == names
    assert projected["stage2_block1_projection"]["kernel"].shape == (1, 1, 4, 8)


def numpy_forward(variables, x):
    """The network of depth 8, written with loops in float64: an independent reference."""
    params, statistics = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))

    def convolve(x, name, stride):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
        return np.einsum("nrscij,ijcf->nrsf", windows, params[name]["kernel"])

    def norm(x, name):
        s, p = statistics[name], params[name]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    x = np.maximum(norm(convolve(x, "conv0", 1), "norm0"), 0)
    for stage in (1, 2, 3):
        name, stride = f"stage{stage}_block1", 1 if stage == 1 else 2
        y = np.maximum(norm(convolve(x, f"{name}_conv1", stride), f"{name}_norm1"), 0)
        y = norm(convolve(y, f"{name}_conv2", 1), f"{name}_norm2")
        if stride == 2:
            zeros = np.zeros((*y.shape[:3], y.shape[3] // 4))
            x = np.concatenate([zeros, x[:, ::2, ::2], zeros], -1)
        x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("size", [8, 9])
def test_network_is_the_one_described(size):
    rng = np.random.default_rng(0)
    shapes = variable_shapes(SMALL)
    variables = jax.tree.map(lambda v: rng.uniform(0.3, 1.0, v.shape) * rng.choice([-1, 1], v.shape), shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    x = rng.normal(size=(3, size, size, 1))
    logits = jax.jit(SMALL.apply)(jax.tree.map(np.float32, variables), jnp.float32(x))
    np.testing.assert_allclose(logits, numpy_forward(variables, x), rtol=1e-4)


def test_parts_of_the_network_make_the_whole(variables):
    whole = part = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
    for number in range(6):
        part = SMALL.apply(variables, part, parts=slice(number, number + 1))
    np.testing.assert_array_equal(part, SMALL.apply(variables, whole))


def test_importing_the_network_needs_little_more_than_flax():
    code = """
import sys, time
start = time.perf_counter()
import flax.linen
flax, loaded = time.perf_counter(), set(sys.modules)
from gravlens_jax import ResNet20
print(flax - start, time.perf_counter() - flax)
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
print(*new & {"matplotlib", "optax", "orbax", "rich", "scipy", "sklearn", "tyro", "zipfile"})
print(*sorted(name for name in sys.modules if name.startswith("gravlens_jax.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    seconds, libraries, modules = done.stdout.splitlines()
    flax, ours = map(float, seconds.split())
    assert ours < max(0.2, flax / 10)  # seconds; the second for a busy machine
    assert libraries == ""
    assert modules.split() == [f"gravlens_jax.{name}" for name in ("config", "errors", "layers", "model")]
