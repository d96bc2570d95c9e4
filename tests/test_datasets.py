import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import CLASSES, FILES, AugmentConfig, Config, InputConfig, SimulationConfig
from gravlens_jax.datasets import load_splits, open_splits, simulate_dataset
from gravlens_jax.errors import InputError
from gravlens_jax.lensing import images as lensing_images
from gravlens_jax.lensing.images import render_deflections, simulate_images
from gravlens_jax.lensing.priors import PRESETS, make_easy
from gravlens_jax.loader import StreamSource
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.sharding import data_mesh
from gravlens_jax.training import fit

PRIORS = replace(PRESETS["ct1"], num_pixels=24, pixel_scale=0.3)


def make_stream(size, batch_size):
    return StreamSource(size, PRIORS, 0, batch_size, 5, data_mesh(), (6, 1.2))


def write(folder, split, images):
    labels = np.arange(len(images)) % 3
    write_npz(folder / f"{split}.npz", [images], images.shape, images.dtype, labels, CLASSES, {})


def test_stream_batches_are_the_images_of_a_file_in_order_from_any_batch():
    images, stream = np.concatenate(list(simulate_images(44, 5, 0, PRIORS))), make_stream(24, 10)
    for epoch, skip in ((0, 0), (1, 0), (1, 1), (1, 2)):  # epoch 1 begins with the images that epoch 0 leaves over
        batches = [batch for _, batch in stream.batches(epoch, skip)]
        assert len(batches) == 2 - skip
        for number, batch in enumerate(batches, 2 * epoch + skip):
            np.testing.assert_array_equal(batch["images"], images[10 * number : 10 * number + 10])
            np.testing.assert_array_equal(batch["labels"], np.arange(10 * number, 10 * number + 10) % 3)
            maps = render_deflections(10 * number, 5, 0, n=10, priors=PRIORS, grid=(6, 1.2))
            np.testing.assert_array_equal(batch["deflections"], maps)


def test_streams_of_accelerators_and_cpus_show_the_same_lenses(monkeypatch):
    ((_, host),) = make_stream(8, 8).batches(1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ((_, device),) = make_stream(8, 8).batches(1)
    np.testing.assert_array_equal(device["labels"], host["labels"])
    np.testing.assert_allclose(device["deflections"], host["deflections"], atol=1e-5)
    assert device["images"].dtype == np.uint16 and device["images"].sharding == host["images"].sharding
    a, b = (np.asarray(batch["images"]).astype(float) for batch in (device, host))
    # Two draws of the noise: 576 pixels have a standard error of 0.06; two lenses differ by 1.8 or more.
    np.testing.assert_allclose(np.mean((a - b) ** 2 / (a + b), axis=(1, 2)), 1, atol=0.25)


def test_each_accelerator_renders_only_its_own_share(monkeypatch):
    seen = []

    def render_block(seed, split, indices, **_):
        seen.append(len(indices))
        return jnp.broadcast_to(indices.astype(jnp.uint16)[:, None, None], (len(indices), 24, 24))

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(lensing_images, "render_block", render_block)
    stream = make_stream(24, 12)
    batches = [batch for epoch in (0, 1) for _, batch in stream.batches(epoch)]
    assert seen == [2, 2, 2]  # of each class, on each of two devices, in a program that both epochs share
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["images"][:, 0, 0], 12 * i + np.arange(12))
        np.testing.assert_array_equal(batch["labels"], (12 * i + np.arange(12)) % 3)


def open_files(folder, **fields):
    """Returns the splits of a run on the files in `folder`, of 24 x 24 pixels."""
    return open_splits(Config(data=str(folder), batch_size=2, input=InputConfig(crop=16), **fields), data_mesh(1))


def test_files_of_simulated_images_have_the_deflections_of_their_lenses(tmp_path):
    simulate_dataset(tmp_path, SimulationConfig(train=7, easy=5, val=3, test=3, seed=4), priors=PRIORS)
    for split, index, priors in (("train", 0, PRIORS), ("easy", 3, make_easy(PRIORS))):
        source = getattr(open_files(tmp_path), split)
        maps = render_deflections(0, 4, index, n=source.size, priors=priors, grid=(2, 8 * PRIORS.pixel_scale))
        assert np.abs(maps).max() > 1e-3
        np.testing.assert_array_equal(source.dataset.deflections, maps)
        images = np.asarray(source.dataset.images).tolist()
        for _, batch in source.batches(0):
            for image, deflection in zip(np.asarray(batch["images"]).tolist(), batch["deflections"], strict=True):
                np.testing.assert_array_equal(deflection, maps[images.index(image)])


@pytest.mark.parametrize(
    "changes",
    [None, {"seed": -1}, {"seed": "4"}, {"seed": None}, {"priors": 3}, {"priors": {"shear_max": 0.3}}, {"split": 1}],
)
def test_images_of_unknown_origin_have_no_deflections(tmp_path, changes):
    simulate_dataset(tmp_path, SimulationConfig(train=7, easy=0, val=3, test=3, seed=4), priors=PRIORS)
    train = open_npz(tmp_path / "train.npz")
    info = {"simulated": "x" if changes is None else train.info["simulated"] | changes}
    images = np.array(train.images)
    write_npz(tmp_path / "train.npz", [images], images.shape, images.dtype, train.labels, train.classes, info)
    assert not open_files(tmp_path).has_deflections


def test_other_images_have_no_deflections(tmp_path):
    simulate_dataset(tmp_path, SimulationConfig(train=7, easy=0, val=3, test=3, seed=4), priors=PRIORS)
    assert open_files(tmp_path).has_deflections
    assert not open_files(tmp_path, deflection_weight=0.0).has_deflections
    assert not open_files(tmp_path, augment=AugmentConfig(max_rotation=10.0)).has_deflections
    shutil.copy(tmp_path / "val.npz", tmp_path / "train.npz")  # the lenses of another split
    assert not open_files(tmp_path).has_deflections
    write(tmp_path, "train", np.zeros((6, 24, 24), np.uint16))
    assert not open_files(tmp_path).has_deflections


def test_splits_must_have_the_same_image_size(tmp_path):
    for split, size in (("train", 4), ("val", 5), ("test", 4)):
        write(tmp_path, split, np.zeros((3, size, size), np.uint8))
    with pytest.raises(InputError, match=r"val\.npz has classes .* and images of \(5, 5\) pixels"):
        load_splits(tmp_path)


@pytest.mark.parametrize(
    "split, dtype, value",
    [("train", "f4", np.nan), ("easy", "f2", np.inf), ("val", "f8", np.inf), ("test", "f4", -np.inf)],
)
def test_pixels_that_are_not_finite_are_an_error_before_a_run_starts(tmp_path, split, dtype, value):
    for name in FILES:
        images = np.zeros((6, 16, 16), dtype)
        images[4, 3, 2] = value if name == split else 0
        write(tmp_path, name, images)
    config = Config(str(tmp_path / "run"), str(tmp_path), batch_size=2, input=InputConfig(crop=16))
    with pytest.raises(InputError, match=rf"{split}\.npz: images\[4\]"):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_simulated_files_are_kept_if_they_come_from_the_same_arguments(tmp_path):
    config = SimulationConfig(train=7, easy=0, val=0, test=0, seed=1)
    simulate_dataset(tmp_path, config, priors=PRIORS, parameters=True)
    before = (tmp_path / "train.npz").stat()
    simulate_dataset(tmp_path, config, priors=PRIORS, parameters=True)
    assert (tmp_path / "train.npz").stat().st_mtime_ns == before.st_mtime_ns
    expected = np.concatenate(list(simulate_images(7, 1, 0, PRIORS)))
    np.testing.assert_array_equal(open_npz(tmp_path / "train.npz").images, expected)
    for other, priors in ((replace(config, train=8), PRIORS), (config, replace(PRIORS, shear_max=0.1))):
        message = r"train\.npz holds 7 other images, or another version's; remove it or choose another folder"
        with pytest.raises(InputError, match=message):
            simulate_dataset(tmp_path, other, priors=priors, parameters=True)
