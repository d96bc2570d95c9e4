import json
import sys
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from export import FORMATS, export_network
from gravlens_jax import __version__
from gravlens_jax.checkpoint import save_variables
from gravlens_jax.config import CLASSES, PRESETS
from gravlens_jax.folders import list_folder, load_labelled
from gravlens_jax.inference import predict, predict_logits
from gravlens_jax.metrics import fit_population
from gravlens_jax.model import ResNet, variable_shapes
from gravlens_jax.network import PRETRAINED, describe, load_network, load_pretrained, read_record, write_network
from gravlens_jax.preprocess import prepare
from gravlens_jax.run_files import create_run, write_calibration
from helpers import TINY_INFO, TINY_MODEL, assert_equal, make_network, make_run, refuse, run_code
from import_torch import load_state_dict, to_variables
from learning_curve import load_history

IMAGES = np.random.default_rng(0).poisson(50, (5, 16, 16)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    """The file of `make_network()`, whose variables `make_run(..., [loss])` saves at step 1."""
    write_network(tmp_path / "net.npz", make_network(), describe(make_network()))
    return tmp_path / "net.npz"


def test_a_calibrated_run_and_its_exported_file_give_the_same_network(tmp_path):
    make_run(tmp_path / "run", [0.5])
    population = fit_population(np.random.default_rng(0).random((30, 32)), np.arange(30) % 3, 3)
    added = {f"population/{name}": x for name, x in population.items()}
    added |= {"deflection/kernel": np.ones((16, 2), np.float32), "deflection/bias": np.ones(2, np.float32)}
    write_calibration(tmp_path / "run", {1: (2.0, added)})
    export_network(tmp_path / "run", tmp_path / "net.npz")
    expected = predict_logits(*make_network(), IMAGES) / 2
    for loaded in map(load_network, (tmp_path / "run", tmp_path / "net.npz")):
        np.testing.assert_allclose(predict_logits(*loaded, IMAGES), expected, atol=1e-6)
        assert loaded.image_shape == (16, 16) and loaded.temperature == 2 and loaded.model == TINY_MODEL
        assert_equal(loaded.variables["population"], population)
        assert_equal(loaded.variables["deflection"], {"kernel": np.ones((16, 2)), "bias": np.ones(2)})
        assert repr(loaded) == "Network(ResNet-8, no, sphere, vort, 16 x 16 pixels)"
    export_network(tmp_path / "net.npz", tmp_path / "again.npz")
    assert read_record(tmp_path / "again.npz") == read_record(tmp_path / "net.npz") == read_record(tmp_path / "run")
    config = read_record(tmp_path / "run")["config"]  # without the folders of its author
    assert (config["run_dir"], config["simulation"]["folder"]) == ("default", "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "net.npz", "run"]
    write_calibration(tmp_path / "run", {1: (2.0, {"population/radii": np.ones(3)})})
    refuse(r"calibration\.npz does not fit the network; make it again by", load_network, tmp_path / "run")


def test_files_that_are_not_networks_are_refused_but_unknown_fields_and_a_missing_temperature_do_not_matter(file):
    arrays, bias = dict(np.load(file)), "params/head/bias"
    about = json.loads(str(arrays["about"]))
    about["model"]["depth"] = "x"
    changes = [{bias: np.zeros(7, np.float32)}, {bias: np.array(["a", "b", "c"])}, {"params/other": np.zeros(7)}]
    changes += [{"about": np.array(text)} for text in ("[1]", json.dumps(about))]
    damaged = [arrays | change for change in changes]
    damaged += [{name: arrays[name] for name in arrays if name != left_out} for left_out in (bias, "about")]
    for contents in damaged:
        np.savez(file, **contents)
        refuse(r"net\.npz", load_network, file)
    about = describe(make_network()) | {"from a later version": [1, {"a": None}]}
    assert about.pop("version") == __version__ and about.pop("temperature") == 1
    write_network(file, make_network(), about)
    loaded = load_network(file)
    assert loaded.model == TINY_MODEL and loaded.temperature == 1
    assert_equal(loaded.variables, make_network().variables)
    write_network(file, make_network(), about | {"input": about["input"] | {"mean": 0.0}})  # as up to 0.7
    refuse(r"npz \(of version unknown\): about.input: field 'mean' is unknown; it was written by", load_network, file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_neither_written_nor_loaded(file, value):
    variables = make_network().variables
    head = variables["params"]["head"] | {"bias": np.array([0, value, 0], np.float32)}
    bad = replace(make_network(), variables=variables | {"params": variables["params"] | {"head": head}})
    refuse(r"parameters that are not finite; train again with a lower learning", write_network, file, bad, {})
    assert_equal(load_network(file).variables, variables)
    create_run(file.with_name("run"), TINY_INFO)
    save_variables(file.with_name("run"), bad.variables)
    arrays = dict(np.load(file)) | {"params/head/bias": np.array([0, min(value, 1e300), 0])}  # float64
    np.savez(file, **arrays)
    for name, suffix in product(("run", "net.npz"), FORMATS):
        message = f"{name}: the network has parameters that are not finite"
        refuse(message, export_network, file.with_name(name), file.with_name(f"other{suffix}"))
    assert sorted(path.name for path in file.parent.iterdir()) == ["net.npz", "run"]


@pytest.fixture
def real(shared):
    return load_labelled(shared / "real/dataset/val", dict(zip(CLASSES, CLASSES, strict=True)))


def test_the_pretrained_network_classifies_real_images(real):
    probabilities = predict(*load_pretrained(), real.images[::2])
    assert (probabilities.argmax(1) == real.labels[::2]).mean() > 0.9


def test_the_pretrained_network_has_the_documented_size_and_record():
    network, history = load_network("pretrained"), load_history("pretrained")
    assert sum(x.size for x in jax.tree.leaves(network.variables["params"])) == 268_979
    assert PRETRAINED.stat().st_size < 2**21
    assert network.model.classes == CLASSES and network.temperature == pytest.approx(0.946, abs=1e-3)
    assert history[-1]["image_steps"] > 100_000 and history[-1]["val_accuracy"] > 0.9


def test_a_run_without_an_epoch_has_no_history(file):
    make_run(file.with_name("dir.npz"), [None])
    export_network(file.with_name("dir.npz"), file.with_name("run.npz"))
    for name, message in (
        ("dir.npz", "no epoch of training"),
        ("run.npz", "no epoch"),
        ("net.npz", "no record of"),
    ):
        refuse(message, load_history, file.with_name(name))


WITHOUT_THE_PACKAGE = """
import os, sys
os.chdir(sys.argv[1])
sys.modules["gravlens_jax"] = None
import numpy as np
from jax import export
program = export.deserialize(open("net.stablehlo", "rb").read())
assert program.platforms == ("cpu", "cuda", "tpu")
assert [str(size) for size in program.in_avals[0].shape] == ["n", "16", "16"]
images, probabilities = np.load("images.npz").values()
for n in (1, 5):
    np.testing.assert_allclose(program.call(images[:n]), probabilities[:n], atol=1e-5)
"""


def test_exported_network_predicts_without_this_package_and_safetensors_hold_the_same_arrays(file):
    for suffix in (".stablehlo", ".safetensors"):
        export_network(file, file.with_suffix(suffix))
    np.savez(file.with_name("images.npz"), IMAGES, predict(*make_network(), IMAGES))
    run_code(WITHOUT_THE_PACKAGE, file.parent)
    with np.load(file) as npz, safe_open(file.with_suffix(".safetensors"), "numpy") as safetensors:
        tensors = {name: safetensors.get_tensor(name) for name in safetensors.keys()}  # noqa: SIM118 - it is no dict
        assert_equal(tensors | safetensors.metadata(), {name: npz[name] for name in npz.files})


def test_a_file_that_cannot_be_written_is_refused_before(file, monkeypatch):
    for package in ("safetensors", "flatbuffers"):
        monkeypatch.setitem(sys.modules, package, None)
    message = r'needs safetensors; .*pip install "gravlens_jax\[export\]"'
    refuse(message, export_network, file, file.with_name("other.safetensors"))
    refuse("needs flatbuffers", export_network, file, file.with_name("other.stablehlo"))
    refuse("no folder", export_network, file, file.parent / "none/other.npz")
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name, depth, correct", [("Train_1", 20, 106), ("Train_3_best", 32, 121)])
def test_published_networks_give_their_pytorch_logits_on_real_images(shared, real, name, depth, correct):
    order = [("no", "vort", "sphere").index(c) for c in CLASSES]
    variables = to_variables(load_state_dict(shared / "reference" / f"{name}.npz"), depth, order)
    model = ResNet(depth=depth, activation="relu", input=PRESETS["published"].input)
    with np.load(shared / "reference" / "logits.npz", allow_pickle=False) as reference:
        rows = {file: row for row, file in enumerate(reference["files"].tolist())}
        expected = reference[name][[rows[f"dataset/val/{file}"] for file in real.info["files"]]][:, order]
    assert np.sum(expected.argmax(1) == real.labels) == correct  # 78.5 % and 89.6 % of 135
    files, _ = list_folder(shared / "real/dataset/val", CLASSES)
    images = jnp.concatenate([np.load(file) for file in files[::3]])[..., None]  # not scaled, as `predict` would do
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(partial(model.apply, variables))(prepare(images, model.input))
    np.testing.assert_allclose(logits, expected[::3], atol=1e-3)


def test_each_array_of_a_state_dict_is_used_and_belongs_to_the_network(tmp_path, monkeypatch):
    state_dict, channels = {"linear.weight": np.ones((3, 64)), "linear.bias": np.arange(3.0)}, 1
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    blocks = [(f"block{stage}.0.features.conv_{i}", 8 * 2**stage) for stage, i in product((1, 2, 3), (1, 2))]
    for name, filters in [("conv0", 16), *blocks]:
        state_dict[f"{name}.weight"] = np.ones((filters, channels, 3, 3))
        state_dict |= {f"{name.replace('conv', 'bn')}.{part}": np.ones(filters) for part in parts}
        channels = filters
    variables = to_variables(state_dict, 8, [0, 2, 1])
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, variable_shapes(ResNet(depth=8)))
    assert variables["params"]["head"]["bias"].tolist() == [0, 2, 1]
    refuse("has no .* not of depth 14", to_variables, state_dict, 14, [0, 1, 2])
    refuse("is left over: .* not of depth 8", to_variables, state_dict | {"block1.1.weight": np.ones(3)}, 8, [0, 1, 2])
    refuse("the head has 3 classes, --classes names 2", to_variables, state_dict, 8, [0, 1])
    (tmp_path / "a.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    refuse("needs torch", load_state_dict, tmp_path / "a.pth")
