from dataclasses import replace

import jax
import numpy as np
import pytest

from finetune import finetune
from gravlens_jax.config import InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.model import ResNet
from gravlens_jax.npz import Dataset
from gravlens_jax.weights import Network

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear", 0.3, 0.2))
NETWORK = Network(MODEL, MODEL.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32)), (20, 20))


def bars(n):
    """Horizontal and vertical bars; flips do not change their class."""
    labels = np.arange(n, dtype=np.int32) % 2
    images = np.random.default_rng(0).random((n, 18, 18)).astype(np.float32) * 0.2
    images[labels == 0, 4:12] += 0.5
    images[labels == 1, :, 4:12] += 0.5
    return Dataset(images, labels, ("flat", "tall"), {})


def test_a_network_for_other_classes_is_trained_from_the_old_one_which_is_not_changed():
    before, lines = jax.tree.map(np.array, NETWORK.variables), []
    network = finetune(NETWORK, bars(40), epochs=5, batch_size=8, show=lines.append)
    assert network.model.classes == ("flat", "tall") and network.image_shape == (18, 18) and network.temperature == 1
    assert len(lines) == 5 and float(lines[-1].split()[-1]) > 0.9  # accuracy
    old, new = (variables["params"]["conv0"]["kernel"] for variables in (before, network.variables))
    assert 0 < np.abs(new - old).max() < 0.1
    jax.tree.map(np.testing.assert_array_equal, NETWORK.variables, before)


def test_unsuitable_data_and_options_are_refused():
    dataset = bars(4)
    large = replace(NETWORK, model=MODEL.clone(input=replace(MODEL.input, crop=32)))
    bad = dataset._replace(images=np.full_like(dataset.images, np.nan))
    for network, data, epochs, message in (
        (NETWORK, dataset._replace(classes=("flat",)), 1, "only one class, flat"),
        (NETWORK, bad, 1, r"images\[0\] has NaN or infinite pixels"),
        (NETWORK, dataset, 0, "epochs=0"),
        (large, dataset, 1, "crop of 32 x 32"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(network, data, epochs=epochs)


@pytest.mark.parametrize(
    "scale, bias, message", [(1, 1e38, "is not finite at step 5"), (0, -1, "gradient.* 0 ")], ids=["broken", "dead"]
)
def test_broken_and_dead_networks_are_errors(scale, bias, message):
    norm = {"scale": np.full(4, scale, np.float32), "bias": np.full(4, bias, np.float32)}
    variables = {**NETWORK.variables, "params": {**NETWORK.variables["params"], "norm0": norm}}
    with pytest.raises(FloatingPointError, match=message):
        finetune(replace(NETWORK, variables=variables), bars(40), epochs=5, batch_size=8)
