import json

import jax
import numpy as np
import pytest

from gravlens_jax import weights
from gravlens_jax.checkpoint import load_run, save_variables
from gravlens_jax.config import CLASSES, Config, InputConfig, InputError, ModelConfig
from gravlens_jax.evaluate import load_labelled
from gravlens_jax.model import make_model, predict, predict_logits
from gravlens_jax.run import RunInfo, create_run

CONFIG = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=1))


@pytest.fixture
def run_dir(tmp_path):
    model = make_model(CONFIG.model, CONFIG.input, CLASSES)
    create_run(tmp_path / "run", RunInfo(CONFIG, CLASSES, (20, 20)))
    save_variables(tmp_path / "run", model.init(jax.random.key(1), np.zeros((1, 16, 16, 1), np.float32)))
    return tmp_path / "run"


def test_an_exported_network_is_the_run_s(run_dir, tmp_path):
    weights.export_run(run_dir, tmp_path / "net.npz")
    model, variables, shape, _ = weights.load_network(tmp_path / "net.npz")
    images = np.random.default_rng(0).random((3, 20, 20))
    np.testing.assert_array_equal(predict_logits(model, variables, images), predict_logits(*load_run(run_dir), images))
    assert shape == (20, 20) and model.classes == CLASSES
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


@pytest.mark.parametrize("change", ["shape", "missing", "about", "bytes", "nothing", "other"])
def test_a_damaged_file_is_refused(run_dir, tmp_path, change):
    path = tmp_path / "net.npz"
    weights.export_run(run_dir, path)
    arrays = dict(np.load(path))
    if change == "shape":
        arrays["params/head/bias"] = np.zeros(7, np.float32)
    if change == "missing":
        del arrays["params/head/bias"]
    if change == "about":
        about = json.loads(str(arrays["about"]))
        arrays["about"] = np.array(json.dumps(about | {"model": about["model"] | {"depth": "x"}}))
    if change == "other":
        del arrays["about"]
    np.savez(path, **arrays)
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:500])
    if change == "nothing":
        path.unlink()
    with pytest.raises(InputError, match=r"net\.npz|model\.depth"):
        weights.load_network(path)


def test_the_pretrained_network_knows_real_images(shared):
    dataset = load_labelled(shared / "real/dataset/val", CLASSES)
    probabilities = predict(*weights.load_pretrained(), dataset.images)
    assert (probabilities.argmax(1) == dataset.labels).mean() > 0.9


def test_the_pretrained_file_says_how_it_was_made():
    with np.load(weights.PRETRAINED) as file:
        about = json.loads(str(file["about"]))
    assert about["classes"] == list(CLASSES) and about["config"]["seed"] >= 0 and about["history"][-1]["step"] > 0
    assert weights.PRETRAINED.stat().st_size < 2**21


def test_the_history_of_a_file_counts_image_steps():
    history = weights.load_history("pretrained")
    assert history[-1]["image_steps"] > 100_000 and history[-1]["val_accuracy"] > 0.9


def test_a_run_without_an_epoch_has_no_history(run_dir, tmp_path):
    weights.export_run(run_dir, tmp_path / "net.npz")
    for source in (run_dir, tmp_path / "net.npz"):
        with pytest.raises(InputError, match="has no epoch of training yet"):
            weights.load_history(source)
