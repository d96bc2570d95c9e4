from dataclasses import replace

import jax
import numpy as np
import pytest

from finetune import finetune
from gravlens_jax.config import InputConfig
from gravlens_jax.errors import InputError
from gravlens_jax.inference import predict
from gravlens_jax.model import ResNet
from gravlens_jax.npz import Dataset, write_npz
from gravlens_jax.weights import Network, describe, load_network, write_network

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
    assert predict(*network, bars(40).images, return_outlier=True)[1].max() < 2
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


@pytest.fixture
def folder(tmp_path):
    """A folder with a network, net.npz; three.npz and folders of images that are smaller than its crop."""
    write_network(tmp_path / "net.npz", NETWORK, describe(NETWORK))
    images = np.random.default_rng(0).random((6, 12, 12)).astype(np.float32)
    write_npz(tmp_path / "three.npz", [images], images.shape, images.dtype, np.arange(6) % 3, ("a", "b", "c"), {})
    for name in ("cdm", "axion"):
        (tmp_path / "small" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            np.save(tmp_path / "small" / name / f"{number}.npy", image)
    return tmp_path


def test_images_of_another_size_and_renamed_classes(folder, run_here):
    finetune = "finetune.py", "net.npz", "small", "new.npz", "--epochs", "1", "--classes", "no=cdm,yes=axion"
    assert "train with --input.crop 12\n" in run_here(folder, *finetune, status=2)
    assert "crop=12 is not a multiple of pool=5" in run_here(
        folder, *finetune, "--input.crop", "12", "--input.pool", "5", status=2
    )
    assert run_here(folder, *finetune, "--input.crop", "12", "--input.pool", "2").endswith("classes no, yes\n")
    network = load_network(folder / "new.npz")
    assert network.model.input == replace(MODEL.input, crop=12, pool=2) and network.image_shape == (12, 12)
    run_here(folder, "export.py", "new.npz", "again.npz")
    assert len(run_here(folder, "predict.py", "again.npz", "small").splitlines()) == 13


@pytest.mark.parametrize("data, classes, found", [("three.npz", "a,b", "a, b, c"), ("small", "cdm,wdm", "axion, cdm")])
def test_classes_that_the_data_do_not_have_are_refused(data, classes, found, folder, run_here):
    error = run_here(folder, "finetune.py", "net.npz", data, "new.npz", "--classes", classes, status=2)
    assert error == f"error: --classes {classes}: {data} has the classes {found}; expected these names\n"
