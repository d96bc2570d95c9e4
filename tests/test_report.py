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
DATASET = Dataset(IMAGES, np.arange(8, dtype=np.int32) % 3, CLASSES, {})


def test_a_report_gives_the_calibration_error_before_and_after_calibration():
    values = report.evaluate_network(NETWORK, DATASET, checkpoint="final")
    assert values["checkpoint"] == "final" and values["temperature"] == 2
    uncalibrated = report.evaluate_network(Network(MODEL, VARIABLES, (20, 20)), DATASET)
    assert uncalibrated["ece"] == pytest.approx(values["ece_uncalibrated"])


def test_a_report_has_predictions_and_dashes_for_a_class_without_images(tmp_path):
    dataset = DATASET._replace(labels=np.array([0, 2] * 4, np.int32))
    values = report.evaluate_network(NETWORK, dataset, out=tmp_path / "a/b")
    assert json.loads((tmp_path / "a/b/metrics.json").read_text()) == values
    with np.load(tmp_path / "a/b/predictions.npz") as predictions:
        np.testing.assert_array_equal(predictions["logits"], predict_logits(*NETWORK, IMAGES))
        np.testing.assert_array_equal(predictions["labels"], dataset.labels)
        assert np.isnan(predictions["outlier"]).all() and values["outliers"] is None  # it has no population
    text = report.table(values, Path("there"))
    assert [line.count("sphere -") for line in text.splitlines()] == [0, 0, 0, 0, 1, 1, 0]
    assert text.endswith("report: there")


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="the images: 20 x 20 pixels, but the network was trained on 30 x 20"):
        report.evaluate_network(replace(NETWORK, image_shape=(30, 20)), DATASET)


def test_matplotlib_is_imported_only_for_drawing():
    code = "import gravlens_jax.report, sys; print([name for name in sys.modules if name == 'matplotlib'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
