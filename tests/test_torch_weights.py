import json

import jax
import numpy as np
import pytest

from gravlens_jax.config import CLASSES, InputConfig, InputError
from gravlens_jax.evaluate import load_labelled
from gravlens_jax.model import ResNet, predict_logits
from gravlens_jax.torch_weights import load_state_dict, to_variables

RAW = InputConfig(crop=150, pool=1, stretch="linear", mean=0.0, std=1.0)
THEIR_CLASSES = ("no", "vort", "sphere")


@pytest.mark.parametrize("name, depth, correct", [("Train_1", 20, 106), ("Train_3_best", 32, 121)])
def test_published_networks_give_their_pytorch_logits_on_real_images(shared, name, depth, correct):
    order = [THEIR_CLASSES.index(c) for c in CLASSES]
    variables = to_variables(load_state_dict(shared / "reference" / f"{name}.npz"), depth, order)
    dataset = load_labelled(shared / "real" / "dataset" / "val", CLASSES)
    with jax.default_matmul_precision("highest"):
        logits = predict_logits(ResNet(depth=depth, input=RAW), variables, dataset.images, batch_size=45)
    with np.load(shared / "reference" / "logits.npz", allow_pickle=False) as reference:
        rows = {file: row for row, file in enumerate(reference["files"].tolist())}
        expected = reference[name][[rows[f"dataset/val/{file}"] for file in dataset.info["files"]]][:, order]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.sum(logits.argmax(1) == dataset.labels) == correct  # 78.5 % and 89.6 % of 135


def fake_state_dict(depth=8):
    rng = np.random.default_rng(0)
    arrays = {}

    def convolution(name, channels, filters):
        arrays[f"{name}.weight"] = rng.normal(size=(filters, channels, 3, 3))

    def norm(name, filters):
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name}.{part}"] = rng.random(filters)
        arrays[f"{name}.num_batches_tracked"] = np.array(7)

    convolution("conv0", 1, 16)
    norm("bn0", 16)
    channels = 16
    for stage, filters in ((1, 16), (2, 32), (3, 64)):
        for block in range((depth - 2) // 6):
            for i in (1, 2):
                convolution(f"block{stage}.{block}.features.conv_{i}", channels, filters)
                norm(f"block{stage}.{block}.features.bn_{i}", filters)
                channels = filters
    arrays |= {"linear.weight": rng.normal(size=(3, 64)), "linear.bias": rng.normal(size=3)}
    return arrays


def test_every_array_finds_its_place():
    variables = to_variables(fake_state_dict(14), 14, [0, 2, 1])
    expected = jax.eval_shape(ResNet(depth=14).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)
    np.testing.assert_allclose(
        variables["params"]["head"]["bias"], fake_state_dict(14)["linear.bias"][[0, 2, 1]], rtol=1e-6
    )


@pytest.mark.parametrize("depth, message", [(14, "has no .* not of depth 14"), (8, "is left over: .* not of depth 8")])
def test_a_wrong_depth_is_named(depth, message):
    with pytest.raises(InputError, match=message):
        to_variables(fake_state_dict(8 if depth == 14 else 14), depth, [0, 1, 2])


def test_a_head_of_another_size_is_named():
    with pytest.raises(InputError, match="the head has 3 classes, --classes names 2"):
        to_variables(fake_state_dict(), 8, [0, 1])


def test_unreadable_weights_are_refused(tmp_path):
    (tmp_path / "a.npz").write_text(json.dumps({}))
    np.savez(tmp_path / "b.npz", x=np.array([{}], object))
    for name, message in (("a.npz", "not a readable .npz"), ("b.npz", "holds Python objects")):
        with pytest.raises(InputError, match=message):
            load_state_dict(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load_state_dict(tmp_path / "c.npz")
