import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from gravlens_jax import weights
from gravlens_jax.checkpoint import save_variables
from gravlens_jax.config import CLASSES, Config, InputConfig, ModelConfig
from gravlens_jax.errors import InputError
from gravlens_jax.folders import list_folder, load_labelled, open_images
from gravlens_jax.inference import predict, predict_logits
from gravlens_jax.metrics import fit_population
from gravlens_jax.model import ResNet, forward, make_model, variable_shapes
from gravlens_jax.preprocess import prepare
from gravlens_jax.run_dir import RunInfo, create_run, write_calibration
from import_torch import load_state_dict, to_variables
from learning_curve import load_history

CONFIG = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=2))
MODEL = make_model(CONFIG.model, CONFIG.input, CLASSES)
VARIABLES = MODEL.init(jax.random.key(1), np.zeros((1, 8, 8, 1), np.float32))
NETWORK = weights.Network(MODEL, VARIABLES, (20, 20))
IMAGES = np.random.default_rng(0).poisson(50, (5, 20, 20)).astype(np.float32)


def make_run(run_dir, variables=VARIABLES):
    create_run(run_dir, RunInfo(CONFIG, CLASSES, (20, 20)))
    save_variables(run_dir, variables)
    return run_dir


def test_a_calibrated_run_and_its_exported_file_give_the_same_network(tmp_path):
    run_dir = make_run(tmp_path / "run")
    means = np.random.default_rng(0).random((30, 32))
    population = fit_population(means, np.arange(30) % 3, 3)
    write_calibration(run_dir, {0: (2.0, population)})
    weights.export_run(run_dir, tmp_path / "net.npz")
    expected = predict_logits(*NETWORK, IMAGES) / 2
    for network in map(weights.load_network, (run_dir, tmp_path / "net.npz")):
        np.testing.assert_allclose(predict_logits(*network, IMAGES), expected, atol=1e-6)
        assert network.image_shape == (20, 20) and network.temperature == 2 and network.model == MODEL
        jax.tree.map(np.testing.assert_array_equal, network.variables["population"], population)
    model, variables = weights.load_run(run_dir)
    np.testing.assert_allclose(predict_logits(model, variables, IMAGES), expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.npz", "run"]


def test_files_that_are_not_networks_are_refused(tmp_path):
    path = tmp_path / "net.npz"
    weights.write_network(path, NETWORK, weights.describe(NETWORK))
    arrays = dict(np.load(path))
    about = json.loads(str(arrays["about"]))
    about["model"]["depth"] = "x"
    bias = "params/head/bias"
    changes = [{bias: np.zeros(7, np.float32)}, {bias: np.array(["a", "b", "c"])}, {"params/other": np.zeros(7)}]
    changes += [{"about": np.array(text)} for text in ("[1]", json.dumps(about))]
    damaged = [arrays | change for change in changes]
    damaged += [{name: arrays[name] for name in arrays if name != left_out} for left_out in (bias, "about")]
    for contents in damaged:
        np.savez(path, **contents)
        with pytest.raises(InputError, match=r"net\.npz"):
            weights.load_network(path)


def test_unknown_fields_and_a_missing_temperature_do_not_matter(tmp_path):
    about = weights.describe(NETWORK) | {"from a later version": [1, {"a": None}]}
    del about["temperature"]
    weights.write_network(tmp_path / "net.npz", NETWORK, about)
    network = weights.load_network(tmp_path / "net.npz")
    assert network.model == MODEL and network.temperature == 1
    jax.tree.map(np.testing.assert_array_equal, network.variables, VARIABLES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_neither_exported_nor_loaded(tmp_path, value):
    head = VARIABLES["params"]["head"] | {"bias": np.array([0, value, 0], np.float32)}
    bad = weights.Network(MODEL, VARIABLES | {"params": VARIABLES["params"] | {"head": head}}, (20, 20))
    for suffix in weights.FORMATS:
        with pytest.raises(InputError, match=r"not finite, it cannot be exported; train again with a lower learning"):
            weights.write_network(tmp_path / f"net{suffix}", bad, weights.describe(bad))
    assert list(tmp_path.iterdir()) == []
    make_run(tmp_path / "run", bad.variables)
    weights.write_network(tmp_path / "net.npz", NETWORK, weights.describe(NETWORK))
    arrays = dict(np.load(tmp_path / "net.npz"))
    np.savez(tmp_path / "net.npz", **arrays | {"params/head/bias": np.array([0, min(value, 1e300), 0])})  # float64
    for name in ("run", "net.npz"):
        with pytest.raises(InputError, match=f"{name}: the network has parameters that are not finite"):
            weights.export_run(tmp_path / name, tmp_path / "other.npz")


@pytest.fixture
def real(shared):
    return load_labelled(shared / "real/dataset/val", CLASSES)


def test_the_pretrained_network_classifies_real_images(real):
    probabilities = predict(*weights.load_pretrained(), real.images[::2])
    assert (probabilities.argmax(1) == real.labels[::2]).mean() > 0.9


def test_the_pretrained_file_is_small_and_records_its_training():
    with np.load(weights.PRETRAINED) as file:
        about = json.loads(str(file["about"]))
    assert about["classes"] == list(CLASSES) and about["config"]["seed"] >= 0
    history = load_history("pretrained")
    assert history[-1]["image_steps"] > 100_000 and history[-1]["val_accuracy"] > 0.9
    assert weights.PRETRAINED.stat().st_size < 2**21


def test_a_run_without_an_epoch_has_no_history(tmp_path):
    run_dir = make_run(tmp_path / "run")
    weights.export_run(run_dir, tmp_path / "net.npz")
    weights.write_network(tmp_path / "other.npz", NETWORK, weights.describe(NETWORK))
    for name, message in (("run", "no epoch of training"), ("net.npz", "no epoch"), ("other.npz", "no record of its")):
        with pytest.raises(InputError, match=message):
            load_history(tmp_path / name)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["gravlens_jax"] = None
import numpy as np
from jax import export
program = export.deserialize(open("net.stablehlo", "rb").read())
assert program.platforms == ("cpu", "cuda", "tpu")
assert [str(size) for size in program.in_avals[0].shape] == ["n", "20", "20"]
images = np.load("images.npy")
np.savez("out.npz", all=program.call(images), one=program.call(images[:1]))
"""


def test_stablehlo_predicts_without_this_package(tmp_path):
    weights.write_network(tmp_path / "net.stablehlo", NETWORK, {})
    np.save(tmp_path / "images.npy", IMAGES)
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["all"], predict(*NETWORK, IMAGES), atol=1e-5)
        np.testing.assert_allclose(out["one"], predict(*NETWORK, IMAGES[:1]), atol=1e-5)


def test_safetensors_hold_the_same_arrays_as_the_npz(tmp_path):
    for name in ("net.npz", "net.safetensors"):
        weights.write_network(tmp_path / name, NETWORK, weights.describe(NETWORK))
    with np.load(tmp_path / "net.npz") as npz, safe_open(tmp_path / "net.safetensors", "numpy") as file:
        assert file.metadata() == {"about": str(npz["about"])}
        assert {*file.keys(), "about"} == set(npz.files)
        for name in file.keys():  # noqa: SIM118 - it is no dict
            np.testing.assert_array_equal(file.get_tensor(name), npz[name])


def test_a_file_that_cannot_be_written_is_refused_before(tmp_path, monkeypatch):
    for package in ("safetensors", "flatbuffers"):
        monkeypatch.setitem(sys.modules, package, None)
    messages = {
        "net.safetensors": r'needs safetensors; .*pip install "gravlens_jax\[export\]"',
        "net.stablehlo": "needs flatbuffers",
        "net.pth": r"ends in \.npz, \.safetensors, \.stablehlo",
        "none/net.npz": "no folder",
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            weights.write_network(tmp_path / name, NETWORK, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "net.npz").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        weights.write_network(tmp_path / "net.npz", NETWORK, {})
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("name, depth, correct", [("Train_1", 20, 106), ("Train_3_best", 32, 121)])
def test_published_networks_give_their_pytorch_logits_on_real_images(shared, real, name, depth, correct):
    order = [("no", "vort", "sphere").index(c) for c in CLASSES]
    variables = to_variables(load_state_dict(shared / "reference" / f"{name}.npz"), depth, order)
    model = ResNet(depth=depth, input=InputConfig(crop=150, pool=1, stretch="linear", mean=0.0, std=1.0))
    with np.load(shared / "reference" / "logits.npz", allow_pickle=False) as reference:
        rows = {file: row for row, file in enumerate(reference["files"].tolist())}
        expected = reference[name][[rows[f"dataset/val/{file}"] for file in real.info["files"]]][:, order]
    assert np.sum(expected.argmax(1) == real.labels) == correct  # 78.5 % and 89.6 % of 135
    files, _ = list_folder(shared / "real/dataset/val", CLASSES)
    images = jnp.concatenate([open_images(file) for file in files[::3]])[..., None]  # not scaled, as `predict` would do
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(partial(forward, model))(variables, prepare(images, model.input))
    np.testing.assert_allclose(logits, expected[::3], atol=1e-3)


def fake_state_dict(depth=8):
    rng, arrays, channels = np.random.default_rng(0), {}, 1
    layers = [("conv0", "bn0", 16)]
    for stage, block, i in product((1, 2, 3), range((depth - 2) // 6), (1, 2)):
        name = f"block{stage}.{block}.features"
        layers.append((f"{name}.conv_{i}", f"{name}.bn_{i}", 8 * 2**stage))
    for conv, norm, filters in layers:
        arrays[f"{conv}.weight"] = rng.random((filters, channels, 3, 3))
        parts = {part: rng.random(filters) for part in ("weight", "bias", "running_mean", "running_var")}
        arrays |= {f"{norm}.{part}": x for part, x in parts.items()} | {f"{norm}.num_batches_tracked": np.array(7)}
        channels = filters
    return arrays | {"linear.weight": rng.random((3, 64)), "linear.bias": rng.random(3)}


def test_each_array_of_a_state_dict_is_used_and_belongs_to_the_network():
    state_dict = fake_state_dict(14)
    variables = to_variables(state_dict, 14, [0, 2, 1])
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, variable_shapes(ResNet(depth=14)))
    bias = variables["params"]["head"]["bias"]
    np.testing.assert_allclose(bias, state_dict["linear.bias"][[0, 2, 1]], rtol=1e-6)
    for arrays, depth, order, message in (
        (fake_state_dict(8), 14, [0, 1, 2], "has no .* not of depth 14"),
        (state_dict, 8, [0, 1, 2], "is left over: .* not of depth 8"),
        (state_dict, 14, [0, 1], "the head has 3 classes, --classes names 2"),
    ):
        with pytest.raises(InputError, match=message):
            to_variables(arrays, depth, order)


def test_a_state_dict_of_pytorch_needs_pytorch(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="needs torch"):
        load_state_dict(tmp_path / "a.pth")
