import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from gravlens_jax import simulate
from gravlens_jax.config import CLASSES, InputError, SimulationConfig
from gravlens_jax.npz import open_npz

PRIORS = simulate.Priors()


def images(n, seed=0, split="train", priors=PRIORS):
    return np.concatenate(list(simulate.simulate_images(n, seed, split, priors)))


@pytest.fixture(scope="module")
def ct1():
    """480 images as photon counts, and scaled to [0, 1]."""
    counts = images(480)
    low, high = counts.min((1, 2), keepdims=True), counts.max((1, 2), keepdims=True)
    return counts, (counts - low) / (high - low).astype(float)


def test_an_image_depends_on_seed_split_and_index_alone(ct1):
    np.testing.assert_array_equal(images(31), ct1[0][:31])
    assert (images(3, seed=1) != ct1[0][:3]).any((1, 2)).all()
    assert (images(3, split="val") != ct1[0][:3]).any((1, 2)).all()


def test_no_two_images_are_the_same(ct1):
    assert len({image.tobytes() for image in ct1[0]}) == len(ct1[0])


def test_statistics_are_those_of_the_public_images(ct1):
    # Public figures over 30,000 images; tolerances are 3 standard errors of 480 images.
    scaled = ct1[1]
    assert scaled.mean() == pytest.approx(0.0617, abs=0.0015)
    assert scaled.std() == pytest.approx(0.1173, abs=0.003)
    fractions = np.histogram(scaled, 100, (0, 1))[0][:3] / scaled.size
    np.testing.assert_allclose(fractions, [0.1593, 0.4143, 0.1117], atol=0.01)


def test_mass_is_conserved_between_classes(ct1):
    means = [ct1[1][simulate.labels_of(480) == k].mean() for k in range(3)]
    assert max(means) / min(means) < 1.06  # 160 images each: 2 % standard error


def test_labels_are_balanced():
    assert np.bincount(simulate.labels_of(100)).tolist() == [34, 33, 33]


def test_noise_is_poisson():
    # Without a source only the sky is left: 10 counts per pixel, whose variance is its mean.
    dark = images(48, priors=replace(PRIORS, source_offset=(100.0, 101.0)))
    assert dark.mean() == pytest.approx(10, abs=0.02)
    assert dark.var() == pytest.approx(10, abs=0.1)
    assert np.mean((dark - 10.0) ** 3) == pytest.approx(10, abs=0.5)  # and so is its third moment


@pytest.mark.parametrize("substructure", CLASSES)
def test_parameters_lie_within_the_priors(substructure):
    keys = jax.random.split(jax.random.key(0), 2000)
    p = jax.vmap(lambda key: simulate.sample_lens(key, PRIORS, substructure))(keys)
    for name in ("z_lens", "z_source", "shear", "shear_angle", "source_axis_ratio", "source_angle"):
        low, high = getattr(PRIORS, name)
        assert low <= p[name].min() and p[name].max() <= high
        assert np.mean(p[name]) == pytest.approx((low + high) / 2, abs=4 * (high - low) / np.sqrt(12 * 2000))
    assert np.hypot(*p["source"].T).max() <= 0.5
    if substructure == "sphere":
        number = (p["subhalo_masses"] > 0).sum(1)
        assert np.mean(number) == pytest.approx(25, abs=0.4) and np.var(number) == pytest.approx(25, abs=3)
        masses = p["subhalo_masses"][p["subhalo_masses"] > 0]
        assert masses.min() >= 0.999e6 and masses.max() <= 1.001e10
        uniform = (masses**0.1 - 1e6**0.1) / (1e10**0.1 - 1e6**0.1)
        np.testing.assert_allclose(np.histogram(uniform, 10, (0, 1))[0] / len(masses), 0.1, atol=0.008)
        assert np.mean(1 - p["halo_mass"] / 1e12) == pytest.approx(0.038, abs=0.001)
    if substructure == "vort":
        np.testing.assert_allclose(p["halo_mass"] + p["vortex_mass"], 1e12, rtol=1e-6)
        assert p["vortex_length"].min() >= 1 and p["vortex_length"].max() <= 4


def test_data_set_is_written_once_and_never_overwritten(tmp_path):
    config = SimulationConfig(train=7, val=3, test=0)
    simulate.simulate_dataset(tmp_path, config)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train.npz", "val.npz"]
    train = open_npz(tmp_path / "train.npz")
    assert train.images.dtype == np.uint16 and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    before = (tmp_path / "train.npz").stat().st_mtime_ns
    simulate.simulate_dataset(tmp_path, config)
    assert (tmp_path / "train.npz").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"train\.npz holds 7 other images"):
        simulate.simulate_dataset(tmp_path, replace(config, seed=1))


def test_an_interrupted_simulation_leaves_nothing(tmp_path):
    def stop(chunks, *_):
        yield from itertools.islice(chunks, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.simulate_dataset(tmp_path, SimulationConfig(train=100, val=3, test=3), stop)
    assert list(tmp_path.iterdir()) == []
