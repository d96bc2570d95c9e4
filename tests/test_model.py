import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import InputConfig, InputError
from gravlens_jax.explain import saliency
from gravlens_jax.model import ResNet, ResNet20, embed, predict, predict_logits

SMALL = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=1, stretch="linear", mean=0.0, std=1.0))


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def initialise(model, size=16):
    return model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))


@pytest.mark.parametrize("depth, parameters", [(20, 268_979), (32, 463_411)])
def test_parameter_counts_of_the_published_networks(depth, parameters):
    assert count(initialise(ResNet20(depth=depth))["params"]) == parameters


@pytest.mark.parametrize("size", [(16, 16), (17, 13), (50, 50)])
def test_any_image_size_and_number_of_classes(size):
    model = SMALL.clone(classes=("a", "b", "c", "d"))
    assert model.apply(initialise(model), jnp.zeros((2, *size, 1))).shape == (2, 4)


def test_bfloat16_leaves_parameters_statistics_and_logits_float32():
    model = SMALL.clone(dtype=jnp.bfloat16)
    variables = initialise(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 1))
    logits = model.apply(variables, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, SMALL.apply(variables, x), atol=0.05)  # bfloat16 has 8 bits


def test_projection_shortcuts_add_two_convolutions():
    plain, projected = (initialise(SMALL.clone(projection=p))["params"] for p in (False, True))
    assert sorted(projected.keys() - plain.keys()) == [
        f"stage{stage}_block1_projection{suffix}" for stage in (2, 3) for suffix in ("", "_norm")
    ]
    assert projected["stage2_block1_projection"]["kernel"].shape == (1, 1, 4, 8)


def numpy_forward(variables, x):
    """The same network written with loops in float64: an independent reference."""
    params, statistics = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))

    def convolve(x, name, stride):
        kernel = params[name]["kernel"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
        return np.stack(
            [
                np.stack([np.einsum("nijc,ijcf->nf", padded[:, r : r + 3, c : c + 3], kernel) for c in columns], 1)
                for r in rows
            ],
            1,
        )

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
    variables = jax.tree.map(
        lambda v: jnp.array(rng.uniform(0.3, 1.0, v.shape) * rng.choice([-1, 1], v.shape)), initialise(SMALL)
    )
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    variables = jax.tree.map(jnp.float32, variables)
    x = rng.normal(size=(3, size, size, 1))
    np.testing.assert_allclose(SMALL.apply(variables, jnp.float32(x)), numpy_forward(variables, x), rtol=1e-4)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_predict_pads_and_agrees_with_apply(n):
    variables = initialise(SMALL)
    images = np.random.default_rng(0).random((n, 16, 16))
    probabilities = predict(SMALL, variables, images, batch_size=4)
    expected = jax.nn.softmax(SMALL.apply(variables, jnp.float32(images)[..., None]))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)


def test_pixels_of_either_byte_order_are_the_same():
    variables, images = initialise(SMALL), np.random.default_rng(0).random((2, 16, 16)).astype(np.float32)
    for function in (predict_logits, embed, saliency):
        np.testing.assert_array_equal(
            function(SMALL, variables, images.astype(">f4")), function(SMALL, variables, images)
        )


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_head_of_the_features_is_the_logits(n):
    variables = initialise(SMALL)
    images = np.random.default_rng(0).random((n, 16, 16))
    features = embed(SMALL, variables, images, batch_size=4)
    assert features.shape == (n, 16) and features.dtype == np.float32
    head = variables["params"]["head"]
    logits = predict_logits(SMALL, variables, images, batch_size=4)
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], logits, atol=1e-5)


@pytest.mark.parametrize("cut", range(7))
def test_the_parts_of_the_network_make_the_whole(cut):
    model = SMALL.clone(projection=True)
    variables = initialise(model)
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 1))
    first = model.apply(variables, x, parts=slice(0, cut))
    np.testing.assert_array_equal(model.apply(variables, first, parts=slice(cut, None)), model.apply(variables, x))


def test_tta_does_not_see_mirrors_and_is_the_mean_over_them():
    model = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=2))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    images = np.random.default_rng(0).random((2, 18, 18))
    mirrors = [images, images[:, ::-1], images[:, :, ::-1], images[:, ::-1, ::-1]]
    expected = np.mean([predict_logits(model, variables, some) for some in mirrors], axis=0)
    for some in mirrors:
        np.testing.assert_allclose(predict_logits(model, variables, some, tta=True), expected, atol=1e-5)


def test_predict_refuses_what_it_cannot_crop():
    for shape, message in (((16, 16), r"expected \(n, height, width\)"), ((2, 12, 20), "crop of 16 x 16")):
        with pytest.raises(InputError, match=message):
            predict_logits(SMALL, initialise(SMALL), np.zeros(shape))
        with pytest.raises(InputError, match=message):
            embed(SMALL, initialise(SMALL), np.zeros(shape))
