import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gravlens_jax import CLASSES, predict_logits, report
from gravlens_jax.network import calibrated
from gravlens_jax.npz import Dataset
from helpers import make_network, refuse

IMAGES = np.random.default_rng(0).poisson(50, (8, 20, 20)).astype(np.uint16)
DATASET = Dataset(IMAGES, np.arange(8, dtype=np.int32) % 3, CLASSES, {})


def test_a_report_gives_the_calibration_error_before_and_after_calibration():
    network = make_network(20)
    divided = replace(network, variables=calibrated(network.variables, 2.0, {}), temperature=2.0)
    values, before = (report.evaluate_network(x, DATASET, checkpoint="final") for x in (divided, network))
    assert values["checkpoint"] == "final" and values["temperature"] == 2
    assert values["ece_uncalibrated"] == pytest.approx(before["ece"])


def test_a_report_has_predictions_and_dashes_for_a_class_without_images(tmp_path):
    dataset = DATASET._replace(labels=np.array([0, 2] * 4, np.int32))
    values = report.evaluate_network(make_network(20), dataset, out=tmp_path / "a/b")
    assert json.loads((tmp_path / "a/b/metrics.json").read_text()) == values
    with np.load(tmp_path / "a/b/predictions.npz") as predictions:
        np.testing.assert_array_equal(predictions["logits"], predict_logits(*make_network(20), IMAGES), strict=True)
        np.testing.assert_array_equal(predictions["labels"], dataset.labels, strict=True)
        assert np.isnan(predictions["outlier"]).all() and values["outliers"] is None  # it has no population
    text = report.table(values, Path("there"))
    assert [line.count("sphere -") for line in text.splitlines()] == [0, 0, 0, 0, 1, 1, 0]
    assert text.endswith("report: there")
    other = replace(make_network(), image_shape=(30, 20))
    message = "the images: 20 x 20 pixels, but the network was trained on 30 x 20"
    refuse(message, report.evaluate_network, other, DATASET)
