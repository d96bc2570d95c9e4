import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, poisson

from gravlens_jax import simulate
from gravlens_jax.config import CLASSES, InputConfig, InputError, SimulationConfig
from gravlens_jax.model import ResNet, predict_logits
from gravlens_jax.npz import open_npz
from gravlens_jax.torch_weights import load_state_dict, to_variables

PRIORS = simulate.PRESETS["ct1"]


def images(n, seed=0, split="train", priors=PRIORS, classes=CLASSES):
    return np.concatenate(list(simulate.simulate_images(n, seed, split, priors, classes)))


def scale(counts):
    low, high = counts.min((1, 2), keepdims=True), counts.max((1, 2), keepdims=True)
    return (counts - low) / (high - low).astype(float)


@pytest.fixture(scope="module")
def ct1():
    """300 images of each class as photon counts, and scaled to [0, 1]."""
    counts = images(900)
    return counts, scale(counts)


def test_an_image_depends_on_seed_split_and_index_alone(ct1):
    np.testing.assert_array_equal(images(31), ct1[0][:31])
    assert (images(3, seed=1) != ct1[0][:3]).any((1, 2)).all()
    assert (images(3, split="val") != ct1[0][:3]).any((1, 2)).all()


def test_no_two_images_are_the_same(ct1):
    assert len({image.tobytes() for image in ct1[0]}) == len(ct1[0])


def test_pixels_are_distributed_as_in_the_public_images(ct1):
    # Public figures over all 30,000 training images.
    scaled = ct1[1]
    assert scaled.mean() == pytest.approx(0.0617, abs=0.0015)
    assert scaled.std() == pytest.approx(0.1173, abs=0.003)
    fractions = np.histogram(scaled, 100, (0, 1))[0][:3] / scaled.size
    np.testing.assert_allclose(fractions, [0.1593, 0.4143, 0.1117], atol=0.01)


def test_the_whole_histogram_is_the_public_one(ct1, shared):
    public = np.loadtxt(shared / "reference" / "pixel_histogram.csv", delimiter=",", comments="#")[:97, 1]
    fractions = np.histogram(ct1[1], 100, (0, 1))[0][:97] / ct1[1].size
    assert np.sqrt(np.mean(np.log(fractions / public) ** 2)) < 0.06


def test_lenses_without_substructure_look_like_the_public_ones(ct1):
    # Read off 9,995 public `no` images; tolerances are three standard errors of 300 images.
    counts, scaled = (array[simulate.labels_of(900) == 0] for array in ct1)
    peak = np.ptp(counts, axis=(1, 2))
    np.testing.assert_allclose(np.quantile(peak, [0.05, 0.25, 0.5, 0.75, 0.95]), [724, 771, 799, 831, 886], atol=12)
    corner = scaled[:, :20, :20]
    assert corner.mean() == pytest.approx(0.01163, abs=0.0004)
    assert corner.std() == pytest.approx(0.0039, abs=0.0003)
    brightness = np.quantile(scaled.mean((1, 2)), [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(brightness, [0.0490, 0.0558, 0.0607, 0.0659, 0.0782], atol=0.0025)
    y, x = np.indices((150, 150)) - 74.5
    ring = (np.hypot(x, y) / 3).astype(int)
    profile = [scaled[:, ring == k].mean() for k in range(24)]
    public = [
        *(0.0355, 0.0448, 0.0627, 0.0927, 0.1390, 0.1982, 0.2564, 0.2940, 0.2958, 0.2647, 0.2156, 0.1651),
        *(0.1209, 0.0885, 0.0652, 0.0485, 0.0369, 0.0294, 0.0243, 0.0207, 0.0181, 0.0164, 0.0152, 0.0143),
    ]
    np.testing.assert_allclose(profile, public, rtol=0.06, atol=0.0005)


def test_mass_is_conserved_between_classes(ct1):
    # Means of 300 images scatter by 1 %; those of the expected images of 2,000 lenses do not.
    means = [ct1[1][simulate.labels_of(900) == k].mean() for k in range(3)]
    assert max(means) / min(means) < 1.04
    keys = jax.random.split(jax.random.key(0), 2000)
    for substructure in CLASSES[1:]:
        p = jax.vmap(lambda key, s=substructure: simulate.sample_lens(key, PRIORS, s))(keys)
        inside = p["subhalo_masses"].sum(1) if substructure == "sphere" else p["vortex_mass"]
        np.testing.assert_allclose(p["halo_mass"] + inside, 1e12, rtol=1e-6)


def test_einstein_radii_have_the_known_quantiles():
    keys = jax.random.split(jax.random.key(0), 20_000)
    theta_E = jax.vmap(lambda key: simulate.sample_lens(key, PRIORS, "no")["theta_E"])(keys)
    quantiles = np.quantile(theta_E, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, [0.99, 1.15, 1.28, 1.42, 1.56], atol=0.01)
    assert theta_E.min() > 0.83 - 0.01 and theta_E.max() < 1.66 + 0.01


def significance(priors, n=40):
    """Returns how many standard deviations of photon noise lie between each lens and the same without subhalos."""

    @jax.jit
    def one(key):
        p = simulate.sample_lens(key, priors, "sphere")
        smooth = p | {"subhalo_masses": jnp.zeros_like(p["subhalo_masses"])}
        smooth["theta_E"] = jnp.sqrt(simulate.lens.einstein_radius_squared(priors.mass, p["z_lens"], p["z_source"]))
        with_subhalos, without = (simulate.render_lens(q, priors) for q in (p, smooth))
        return jnp.sqrt(jnp.sum((with_subhalos - without) ** 2 / without))

    return np.array([one(key) for key in jax.random.split(jax.random.key(0), n)])


def test_subhalos_show_with_slope_minus_0_9_and_not_with_the_printed_minus_1_9():
    # The difference between images, in sigmas of the photon noise of the whole image, if all else were known.
    assert np.median(significance(PRIORS)) > 50
    assert np.median(significance(replace(PRIORS, subhalo_slope=-1.9))) < 5


def test_a_network_trained_by_others_on_public_images_reads_the_simulated_ones(shared, ct1):
    theirs = ("no", "vort", "sphere")
    weights = load_state_dict(shared / "reference" / "Train_3_best.npz")
    variables = to_variables(weights, 32, [theirs.index(name) for name in CLASSES])
    model = ResNet(depth=32, input=InputConfig(crop=150, pool=1, stretch="linear", mean=0.0, std=1.0))
    predicted = predict_logits(model, variables, ct1[0][:200], 50).argmax(1)
    assert 0.86 <= np.mean(predicted == simulate.labels_of(200)) <= 0.93  # it is right on 89.6 % of public images


@pytest.mark.parametrize("preset", simulate.PRESETS)
@pytest.mark.parametrize("substructure", CLASSES)
def test_every_preset_renders_finite_images(preset, substructure):
    priors = replace(simulate.PRESETS[preset], num_pixels=40)
    keys = jax.random.split(jax.random.key(0), 50)
    render = jax.vmap(lambda key: simulate.render_lens(simulate.sample_lens(key, priors, substructure), priors))
    rendered = jax.jit(render)(keys)
    assert np.isfinite(rendered).all() and rendered.min() >= priors.photons * priors.sky * 0.999
    assert rendered.max() < simulate.MAX_COUNTS


def test_the_image_is_differentiable_in_every_parameter():
    priors = replace(PRIORS, num_pixels=20)
    for substructure in CLASSES:
        p = simulate.sample_lens(jax.random.key(1), priors, substructure)
        gradients = jax.grad(lambda p: simulate.render_lens(p, priors).sum())(p)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_labels_are_balanced():
    assert np.bincount(simulate.labels_of(100)).tolist() == [34, 33, 33]


def dark(mean):
    """Lenses whose sources are far away: every pixel expects `mean` counts of sky."""
    far = {"source_offset_min": 100.0, "source_offset_max": 101.0}
    return replace(PRIORS, sky=mean / PRIORS.photons, num_pixels=32, supersampling=1, **far)


def assert_poisson(counts, mean):
    probabilities = poisson.pmf(np.arange(2 * mean + 50), mean)
    likely = np.flatnonzero(probabilities * counts.size > 20)  # a chi-square needs some counts in every bin
    observed = np.bincount(counts, minlength=probabilities.size)[likely]
    observed = np.append(observed, counts.size - observed.sum())
    expected = np.append(probabilities[likely], 1 - probabilities[likely].sum()) * counts.size
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("mean", [10, 50, 100, 800])
def test_noise_is_poisson(mean):
    assert_poisson(images(24, priors=dark(mean), classes=("no",)).ravel(), mean)


@pytest.mark.parametrize("mean", [10, 50, 100, 800])
def test_noise_drawn_on_an_accelerator_is_poisson(mean):
    assert_poisson(np.asarray(jax.random.poisson(jax.random.key(0), mean, (400_000,))), mean)


def test_the_path_for_accelerators_makes_the_same_lenses(monkeypatch, ct1):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(simulate, "ACCELERATOR_BLOCK", 2)
    on_device = images(6, priors=PRIORS).astype(float)
    difference = (on_device - ct1[0][:6]) / np.sqrt(on_device + ct1[0][:6])  # two draws of noise around one lens
    np.testing.assert_allclose(np.mean(difference**2, axis=(1, 2)), 1, atol=0.06)


@pytest.mark.parametrize("substructure", CLASSES)
def test_parameters_lie_within_the_priors(substructure):
    keys = jax.random.split(jax.random.key(0), 2000)
    p = jax.vmap(lambda key: simulate.sample_lens(key, PRIORS, substructure))(keys)
    for name in ("z_lens", "z_source", "shear", "shear_angle", "source_axis_ratio", "source_angle"):
        low, high = getattr(PRIORS, f"{name}_min"), getattr(PRIORS, f"{name}_max")
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
    config = SimulationConfig(train=7, easy=0, val=3, test=0)
    simulate.simulate_dataset(tmp_path, config)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train.npz", "val.npz"]
    train = open_npz(tmp_path / "train.npz")
    assert train.images.dtype == np.uint16 and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    before = (tmp_path / "train.npz").stat().st_mtime_ns
    simulate.simulate_dataset(tmp_path, config)
    assert (tmp_path / "train.npz").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"train\.npz holds 7 other images"):
        simulate.simulate_dataset(tmp_path, replace(config, seed=1))


def test_parameters_are_those_of_the_images(tmp_path):
    simulate.simulate_dataset(tmp_path, SimulationConfig(train=7, easy=0, val=0, test=0, seed=4), parameters=True)
    counts = open_npz(tmp_path / "train.npz").images
    with np.load(tmp_path / "train.npz", allow_pickle=False) as archive:
        stored = {name.split("/")[1]: archive[name] for name in archive.files if "/" in name}
    for index, substructure in enumerate((*CLASSES, *CLASSES, "no")):
        p = {name: jnp.array(value[index]) for name, value in stored.items() if np.isfinite(value[index]).all()}
        assert ("subhalo_masses" in p, "vortex_mass" in p) == (substructure == "sphere", substructure == "vort")
        expected = np.asarray(simulate.render_lens(p, PRIORS))
        chi_square = np.mean((counts[index] - expected) ** 2 / expected)
        assert chi_square == pytest.approx(1, abs=0.05)  # 22,500 pixels: one standard error is 0.01


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_too_bright_images_are_refused(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(simulate, "ACCELERATOR_BLOCK", 2)
    with pytest.raises(InputError, match="lower the prior `photons`"):
        images(1, priors=replace(PRIORS, photons=1e5))


def test_an_interrupted_simulation_leaves_nothing(tmp_path):
    def stop(chunks, *_):
        yield from itertools.islice(chunks, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.simulate_dataset(tmp_path, SimulationConfig(train=100, easy=0, val=3, test=3), stop)
    assert list(tmp_path.iterdir()) == []
