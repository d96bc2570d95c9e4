from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import mesh, simulate, stream
from gravlens_jax.config import Config, InputError
from gravlens_jax.priors import PRESETS

PRIORS = PRESETS["ct1"]
STREAM = stream.Stream(24, 5, "train", PRIORS)


def test_batches_are_the_images_of_a_file_in_order():
    images = np.concatenate(list(simulate.simulate_images(44, 5, "train", PRIORS)))
    devices = mesh.data_mesh()
    batches = [b for epoch in (0, 1) for b in stream.stream_batches(STREAM, 10, epoch, devices)]
    assert len(batches) == 4  # two an epoch; the rest of an epoch is not cut off, but begins the next
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["images"], images[10 * i : 10 * i + 10])
        np.testing.assert_array_equal(batch["labels"], np.arange(10 * i, 10 * i + 10) % 3)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_a_stream_goes_on_where_it_stopped(skip):
    devices = mesh.data_mesh()
    whole = list(stream.stream_batches(STREAM, 8, 1, devices))
    rest = list(stream.stream_batches(STREAM, 8, 1, devices, skip=skip))
    assert len(rest) == 3 - skip
    for a, b in zip(whole[skip:], rest, strict=True):
        np.testing.assert_array_equal(a["images"], b["images"])


def test_the_path_for_accelerators_makes_the_same_lenses(monkeypatch):
    devices = mesh.data_mesh()
    (host,) = stream.stream_batches(STREAM._replace(size=8), 8, 1, devices)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (device,) = stream.stream_batches(STREAM._replace(size=8), 8, 1, devices)
    np.testing.assert_array_equal(device["labels"], host["labels"])
    assert device["images"].dtype == np.uint16 and device["images"].sharding == host["images"].sharding
    a, b = (np.asarray(batch["images"]).astype(float) for batch in (device, host))
    np.testing.assert_allclose(np.mean((a - b) ** 2 / (a + b), axis=(1, 2)), 1, atol=0.06)  # two draws of noise


def test_each_accelerator_renders_its_own_share_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    priors, seen = replace(PRIORS, num_pixels=20), []

    def render_block(seed, split, indices, **_):
        seen.append(len(indices))
        return jnp.broadcast_to(indices.astype(jnp.uint16)[:, None, None], (len(indices), 20, 20))

    monkeypatch.setattr(stream, "render_block", render_block)
    own, devices = STREAM._replace(priors=priors), mesh.data_mesh(2)
    batches = [batch for epoch in (0, 1) for batch in stream.stream_batches(own, 12, epoch, devices)]
    assert seen == [2, 2, 2]  # of each class, on each of two devices, in a program that both epochs share
    for i, batch in enumerate(batches):
        numbers = 12 * i + np.arange(12)
        np.testing.assert_array_equal(batch["images"][:, 0, 0], numbers)
        np.testing.assert_array_equal(batch["labels"], numbers % 3)


def test_streams_are_named_by_their_preset():
    assert Config(data="simulate:ct1").stream == "ct1" and Config(data="packed").stream is None
    with pytest.raises(InputError, match="data=simulate:ct2: expected simulate: and one of ct1, model_a"):
        Config(data="simulate:ct2")
    with pytest.raises(InputError, match="leave one out"):
        Config(data="simulate:ct1", device_data=True)
