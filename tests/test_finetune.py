from dataclasses import replace

import jax
import numpy as np
import pytest

from finetune import finetune
from gravlens_jax.config import InputConfig, SimulationConfig
from gravlens_jax.datasets import simulate_dataset
from gravlens_jax.inference import predict, predict_deflection
from gravlens_jax.network import describe, load_network, write_network
from gravlens_jax.npz import Dataset, open_npz
from gravlens_jax.preprocess import prepare, to_unit
from helpers import TINY_PRIORS, make_bars, make_folders, make_mapping_network, make_network, refuse, save_npz

INPUT = InputConfig(16, 1, "linear")


def bars(n):
    return Dataset(*make_bars(n, 2, side=18), ("flat", "tall"), {})


def test_a_network_for_other_classes_is_trained_from_the_old_one_which_is_not_changed():
    network, lines = make_network(input=INPUT), []
    before = jax.tree.map(np.array, network.variables)
    new = finetune(network, bars(40), epochs=5, batch_size=8, show=lines.append)
    assert new.model.classes == ("flat", "tall") and new.image_shape == (18, 18) and new.temperature == 1
    assert predict(*new, bars(40).images, return_outlier=True)[1].max() < 2
    assert len(lines) == 5 and float(lines[-1].split()[-1]) > 0.9  # accuracy
    change = new.variables["params"]["conv0"]["kernel"] - before["params"]["conv0"]["kernel"]
    assert 0 < np.abs(change).max() < 0.1
    jax.tree.map(np.testing.assert_array_equal, network.variables, before)


def test_the_head_of_the_maps_is_dropped_or_fitted_again_to_images_with_lens_parameters(tmp_path):
    mapping = make_mapping_network(0.3, 24, input=INPUT)
    new = finetune(mapping, bars(40), epochs=1, show=str)
    assert "deflection" not in new.variables and new.model.pixel_scale is None
    sizes = SimulationConfig(train=0, easy=0, val=24, test=0)
    dataset = open_npz(simulate_dataset(tmp_path, sizes, priors=TINY_PRIORS) / "val.npz")
    new = finetune(mapping, dataset, epochs=1, show=str)
    assert new.model.pixel_scale == TINY_PRIORS.pixel_scale and predict_deflection(*new, dataset.images).any()


def test_normalization_statistics_are_those_of_the_new_images_after_a_few_steps():
    network = make_network(input=INPUT)  # whose own are still means of 0 and variances of 1
    new = finetune(network, bars(40), epochs=2, batch_size=20, learning_rate=1e-9, show=str)
    x = prepare(to_unit(bars(40).images), INPUT)
    _, expected = new.model.clone(momentum=0).apply(new.variables, x, train=True, mutable=["batch_stats"])
    for found, wanted in zip(*(v["batch_stats"]["norm0"].values() for v in (new.variables, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0.1)


def test_unsuitable_data_and_options_are_refused():
    network, dataset = make_network(input=INPUT), bars(4)
    bad = dataset._replace(images=np.full_like(dataset.images, np.nan))
    refuse("only one class, flat", finetune, network, dataset._replace(classes=("flat",)), epochs=1)
    refuse(r"images\[0\] has NaN or infinite pixels", finetune, network, bad, epochs=1)
    refuse("epochs=0", finetune, network, dataset, epochs=0)


@pytest.mark.parametrize("scale, bias, message", [(1, 1e38, "is not finite at step 5"), (0, -4, "dead network")])
def test_broken_and_dead_networks_are_errors(scale, bias, message):
    network = make_network(input=INPUT)
    norm = {"scale": np.full(4, scale, np.float32), "bias": np.full(4, bias, np.float32)}
    variables = network.variables | {"params": network.variables["params"] | {"norm0": norm}}
    with pytest.raises(FloatingPointError, match=message):
        finetune(replace(network, variables=variables), bars(40), epochs=5, batch_size=8)


@pytest.fixture
def folder(tmp_path):
    """A folder with a network, net.npz; three.npz and folders of images that are smaller than its crop."""
    network = make_network(input=INPUT)
    write_network(tmp_path / "net.npz", network, describe(network))
    save_npz(tmp_path / "three.npz", np.ones((6, 12, 12), np.float32))
    make_folders(tmp_path / "small", train=6, val=0, shape=(12, 12), classes=("cdm", "axion"))
    return tmp_path


def test_images_of_another_size_and_renamed_classes(folder, run_here):
    finetune = "finetune.py", "net.npz", "small/train", "new.npz", "--epochs", "1", "--classes", "no=cdm,yes=axion"
    assert "train with --input.crop 12\n" in run_here(folder, *finetune, status=2)
    assert run_here(folder, *finetune, "--input.crop", "12", "--input.pool", "2").endswith("classes no, yes\n")
    new = load_network(folder / "new.npz")
    assert new.model.input == replace(INPUT, crop=12, pool=2) and new.image_shape == (12, 12)
    run_here(folder, "export.py", "new.npz", "again.npz")
    first, *rows = run_here(folder, "predict.py", "again.npz", "small/train").splitlines()
    assert first == "file,class,p_no,p_yes,outlier,peak_convergence" and len(rows) == 12


@pytest.mark.parametrize(
    "data, classes, found", [("three.npz", "no,vort", "no, sphere, vort"), ("small/train", "cdm,wdm", "axion, cdm")]
)
def test_unknown_classes_and_other_formats_are_refused(folder, run_here, data, classes, found):
    error = run_here(folder, "finetune.py", "net.npz", data, "new.npz", "--classes", classes, status=2)
    assert error == f"error: --classes {classes}: {data} has the classes {found}; expected these names\n"
    error = run_here(folder, "finetune.py", "net.npz", data, "new.pth", status=2)
    assert "new.pth: expected a name that ends in .npz; export.py writes other formats" in error
