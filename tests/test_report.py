import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gravlens_jax import report
from gravlens_jax.config import CLASSES, InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.inference import predict_logits
from gravlens_jax.model import ResNet
from gravlens_jax.npz import Dataset
from gravlens_jax.weights import Network, calibrated

MODEL = ResNet(depth=8, width=4, input=InputConfig(crop=16, pool=2))
VARIABLES = MODEL.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
NETWORK = Network(MODEL, calibrated(VARIABLES, 2.0), (20, 20), temperature=2.0)
IMAGES = np.random.default_rng(0).poisson(50, (8, 20, 20)).astype(np.uint16)
LINE = {
    "epoch": 1,
    "learning_rate": 0.1,
    "train_loss": 1.0,
    "val_loss": 1.0,
    "train_accuracy": 0.5,
    "val_accuracy": 0.5,
}


def test_the_report_holds_metrics_predictions_and_figures(tmp_path):
    dataset = Dataset(IMAGES, np.arange(8, dtype=np.int32) % 3, CLASSES, {})
    values = report.evaluate_network(NETWORK, dataset, checkpoint="final", out=tmp_path / "a/b", history=[LINE])
    figures = {f"{name}.png" for name in ("roc", "confusion", "examples", "history", "saliency")}
    assert {f.name for f in (tmp_path / "a/b").iterdir()} == figures | {"metrics.json", "predictions.npz"}
    for name in figures:
        assert (tmp_path / "a/b" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "a/b/metrics.json").read_text()) == values
    assert values["checkpoint"] == "final" and values["temperature"] == 2
    with np.load(tmp_path / "a/b/predictions.npz") as predictions:
        np.testing.assert_array_equal(predictions["logits"], predict_logits(*NETWORK, IMAGES))
        np.testing.assert_array_equal(predictions["labels"], dataset.labels)
    assert values == report.evaluate_network(NETWORK, dataset, checkpoint="final")
    uncalibrated = Network(MODEL, VARIABLES, (20, 20))
    assert report.evaluate_network(uncalibrated, dataset)["ece"] == pytest.approx(values["ece_uncalibrated"])


def test_the_recall_and_auc_of_a_class_without_images_are_dashes(tmp_path):
    dataset = Dataset(IMAGES, np.array([0, 2] * 4, np.int32), CLASSES, {})
    values = report.evaluate_network(NETWORK, dataset, out=tmp_path)
    text = report.table(values, Path("there"))
    assert [line.count("sphere -") for line in text.splitlines()] == [0, 0, 0, 1, 1, 0]
    assert "no 0.000" in text or "vort 0.000" in text or "no 1.000" in text
    assert text.endswith("report: there")


def test_images_of_another_size_are_refused():
    dataset = Dataset(IMAGES, np.zeros(8, np.int32), CLASSES, {})
    with pytest.raises(InputError, match="the images: 20 x 20 pixels, but the network was trained on 30 x 20"):
        report.evaluate_network(replace(NETWORK, image_shape=(30, 20)), dataset)


def test_matplotlib_is_imported_only_for_drawing():
    code = "import gravlens_jax.report, sys; print([name for name in sys.modules if name == 'matplotlib'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
