from dataclasses import replace

import jax
import numpy as np
import pytest

from finetune import finetune
from gravlens_jax.config import InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.inference import predict
from gravlens_jax.model import ResNet
from gravlens_jax.npz import Dataset
from gravlens_jax.weights import Network

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear", 0.3, 0.2))
NETWORK = Network(MODEL, MODEL.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32)), (20, 20))


def bars(n, seed):
    """Horizontal and vertical bars; flips do not change their class."""
    labels = np.arange(n, dtype=np.int32) % 2
    images = np.random.default_rng(seed).random((n, 18, 18)).astype(np.float32) * 0.2
    images[labels == 0, 4:12] += 0.5
    images[labels == 1, :, 4:12] += 0.5
    return Dataset(images, labels, ("flat", "tall"), {})


def test_new_classes_are_learned_and_the_old_network_is_not_changed():
    before = jax.tree.map(np.array, NETWORK.variables)
    lines = []
    network = finetune(NETWORK, bars(40, 0), epochs=5, batch_size=8, show=lines.append)
    assert network.model.classes == ("flat", "tall") and network.image_shape == (18, 18) and network.temperature == 1
    test = bars(20, 1)
    assert (predict(*network, test.images).argmax(1) == test.labels).mean() > 0.9
    assert len(lines) == 5 and lines[0].startswith("epoch 1/5: train loss")
    jax.tree.map(np.testing.assert_array_equal, NETWORK.variables, before)
    assert (network.variables["params"]["conv0"]["kernel"] != before["params"]["conv0"]["kernel"]).any()


def test_unsuitable_data_and_options_are_refused():
    with pytest.raises(InputError, match="only one class, flat"):
        finetune(NETWORK, bars(4, 0)._replace(classes=("flat",)))
    with pytest.raises(InputError, match="crop of 32 x 32"):
        finetune(replace(NETWORK, model=MODEL.clone(input=replace(MODEL.input, crop=32))), bars(4, 0))
    with pytest.raises(InputError, match="epochs=0"):
        finetune(NETWORK, bars(4, 0), epochs=0)
    dataset = bars(4, 0)
    dataset.images[2, 3, 3] = np.nan
    with pytest.raises(InputError, match=r"images\[2\] has NaN or infinite pixels"):
        finetune(NETWORK, dataset)


@pytest.mark.parametrize(
    "layer, parameters, message",
    [
        ("conv0", {"kernel": np.full((3, 3, 1, 4), 1e38, np.float32)}, "is not finite at step 5"),
        ("norm0", {"scale": np.zeros(4, np.float32), "bias": np.full(4, -1, np.float32)}, "the gradient is 0 in all"),
    ],
    ids=["broken", "dead"],
)
def test_broken_and_dead_networks_are_errors(layer, parameters, message):
    variables = {**NETWORK.variables, "params": {**NETWORK.variables["params"], layer: parameters}}
    with pytest.raises(FloatingPointError, match=message):
        finetune(replace(NETWORK, variables=variables), bars(40, 0), epochs=5, batch_size=8)
