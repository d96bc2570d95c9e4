from dataclasses import replace

import jax
import numpy as np
import pytest

from gravlens_jax.config import InputConfig, InputError
from gravlens_jax.finetune import finetune
from gravlens_jax.model import ResNet, predict
from gravlens_jax.npz import Dataset
from gravlens_jax.weights import Network

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear", 0.3, 0.2))


def bars(n, seed):
    """Horizontal and vertical bars; flips leave them what they are."""
    labels = np.arange(n, dtype=np.int32) % 2
    images = np.random.default_rng(seed).random((n, 18, 18)).astype(np.float32) * 0.2
    images[labels == 0, 4:12] += 0.5
    images[labels == 1, :, 4:12] += 0.5
    return Dataset(images, labels, ("flat", "tall"), {})


@pytest.fixture(scope="module")
def network():
    return Network(MODEL, MODEL.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32)), (20, 20))


def test_the_new_classes_are_learnt_and_the_old_network_stays(network):
    before = jax.tree.map(np.array, network.variables)
    lines = []
    model, variables, shape, _ = finetune(network, bars(40, 0), epochs=5, batch_size=8, show=lines.append)
    assert model.classes == ("flat", "tall") and shape == (18, 18)
    test = bars(20, 1)
    assert (predict(model, variables, test.images).argmax(1) == test.labels).mean() > 0.9
    assert len(lines) == 5 and lines[0].startswith("epoch 1/5: train loss")
    jax.tree.map(np.testing.assert_array_equal, network.variables, before)
    assert (variables["params"]["conv0"]["kernel"] != before["params"]["conv0"]["kernel"]).any()


def test_what_cannot_be_learnt_from_is_refused(network):
    with pytest.raises(InputError, match="only one class, flat"):
        finetune(network, bars(4, 0)._replace(classes=("flat",)))
    with pytest.raises(InputError, match="crop of 32 x 32"):
        finetune(network._replace(model=MODEL.clone(input=replace(MODEL.input, crop=32))), bars(4, 0))
    with pytest.raises(InputError, match="epochs=0"):
        finetune(network, bars(4, 0), epochs=0)
    with pytest.raises(FloatingPointError, match="training loss is nan at step 1"):  # in its only batch, of 4 images
        finetune(network, bars(4, 0)._replace(images=np.full((4, 18, 18), np.nan, np.float32)))
