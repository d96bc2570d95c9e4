from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import CLASSES, FILES, Config, InputConfig, SimulationConfig
from gravlens_jax.datasets import StreamSource, load_splits, open_splits, simulate_dataset
from gravlens_jax.errors import InputError
from gravlens_jax.lensing import images as lensing_images
from gravlens_jax.lensing.images import simulate_images
from gravlens_jax.lensing.priors import PRESETS
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.sharding import data_mesh

PRIORS = replace(PRESETS["ct1"], num_pixels=24)


def make_stream(size, batch_size, priors=PRIORS):
    return StreamSource(size, priors, 0, batch_size, 5, data_mesh())


def write(folder, split, images, labels=None):
    labels = np.arange(len(images)) % 3 if labels is None else labels
    write_npz(folder / f"{split}.npz", [images], images.shape, images.dtype, labels, CLASSES, {})


def test_stream_batches_are_the_images_of_a_file_in_order():
    images = np.concatenate(list(simulate_images(44, 5, 0, PRIORS)))
    batches = [batch for epoch in (0, 1) for _, batch in make_stream(24, 10).batches(epoch)]
    assert len(batches) == 4  # two per epoch; the next epoch begins with the images that are left over
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["images"], images[10 * i : 10 * i + 10])
        np.testing.assert_array_equal(batch["labels"], np.arange(10 * i, 10 * i + 10) % 3)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_stream_continues_from_any_batch(skip):
    whole, rest = (list(make_stream(24, 8).batches(1, k)) for k in (0, skip))
    assert len(rest) == 3 - skip
    for (_, a), (_, b) in zip(whole[skip:], rest, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_accelerators_and_cpus_simulate_the_same_lenses(monkeypatch):
    ((_, host),) = make_stream(8, 8, PRESETS["ct1"]).batches(1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ((_, device),) = make_stream(8, 8, PRESETS["ct1"]).batches(1)
    np.testing.assert_array_equal(device["labels"], host["labels"])
    assert device["images"].dtype == np.uint16 and device["images"].sharding == host["images"].sharding
    a, b = (np.asarray(batch["images"]).astype(float) for batch in (device, host))
    np.testing.assert_allclose(np.mean((a - b) ** 2 / (a + b), axis=(1, 2)), 1, atol=0.06)  # two draws of the noise


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


def test_splits_must_have_the_same_image_size(tmp_path):
    for split, size in (("train", 4), ("val", 5), ("test", 4)):
        write(tmp_path, split, np.zeros((3, size, size), np.uint8))
    with pytest.raises(InputError, match=r"val\.npz has classes .* and images of \(5, 5\) pixels"):
        load_splits(tmp_path)


@pytest.mark.parametrize("split", FILES)
@pytest.mark.parametrize("dtype, value", [(np.float32, np.nan), (np.float16, np.inf), (np.float64, 1e300)])
def test_pixels_that_are_not_finite_are_an_error_before_a_run_starts(tmp_path, split, dtype, value):
    for name in FILES:
        images = np.zeros((6, 16, 16), dtype)
        images[4, 3, 2] = value if name == split else 0
        write(tmp_path, name, images)
    config = Config(str(tmp_path / "run"), str(tmp_path), batch_size=2, input=InputConfig(crop=16))
    with pytest.raises(InputError, match=rf"{split}\.npz: images\[4\]"):
        open_splits(config, data_mesh())


def test_simulated_files_are_kept_if_they_come_from_the_same_arguments(tmp_path):
    config = SimulationConfig(train=7, easy=0, val=3, test=0, seed=1)
    simulate_dataset(tmp_path, config, priors=PRIORS, parameters=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train.npz", "val.npz"]
    before = (tmp_path / "train.npz").stat()
    simulate_dataset(tmp_path, config, priors=PRIORS, parameters=True)
    assert (tmp_path / "train.npz").stat().st_mtime_ns == before.st_mtime_ns
    dataset = open_npz(tmp_path / "train.npz")
    np.testing.assert_array_equal(dataset.images, np.concatenate(list(simulate_images(7, 1, 0, PRIORS))))
    with pytest.raises(InputError, match=r"train\.npz holds 7 other images; remove it or choose another folder"):
        simulate_dataset(tmp_path, replace(config, train=8), priors=PRIORS, parameters=True)
    with pytest.raises(InputError, match=r"train\.npz holds 7 other images"):
        simulate_dataset(tmp_path, config, priors=replace(PRIORS, shear_max=0.1), parameters=True)
