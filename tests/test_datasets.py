import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from gravlens_jax.config import SPLITS, AugmentConfig, Config, InputConfig, SimulationConfig
from gravlens_jax.datasets import fingerprint, load_splits, map_renderer, open_splits, simulate_dataset
from gravlens_jax.lensing import images as lensing_images
from gravlens_jax.lensing.images import render_deflections, simulate_images, simulate_parameters
from gravlens_jax.lensing.priors import make_easy
from gravlens_jax.lensing.render import Grid
from gravlens_jax.npz import PARAMETERS, open_npz, write_npz
from gravlens_jax.sharding import data_mesh
from gravlens_jax.training import fit
from helpers import TINY_PRIORS, refuse, save_npz

SIZES = SimulationConfig(train=12, easy=12, val=12, test=12, seed=4)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A folder of simulated images."""
    return simulate_dataset(tmp_path_factory.mktemp("simulated"), SIZES, priors=TINY_PRIORS)


def edit(folder, out, **fields):
    """Copies a folder of simulated images with other `fields` of the training images; returns those."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    data = open_npz(out / "train.npz")
    images, labels, classes, info, lens_params = data._replace(**{"images": data.images[:]} | fields)
    arrays = {f"{PARAMETERS}{name}": array for name, array in (lens_params or {}).items()}
    write_npz(out / "train.npz", [images], images.shape, images.dtype, labels, classes, info, arrays)
    return open_npz(out / "train.npz")


def open_files(folder, **fields):
    return open_splits(Config(data=str(folder), batch_size=2, input=InputConfig(crop=16), **fields), data_mesh(1))


def maps_of(folder):
    """Returns the deflection maps of the first epoch, in its order."""
    return np.concatenate([batch["deflections"] for _, batch in open_files(folder).train.batches(0)])


@pytest.mark.parametrize("split, index, priors", [("train", 0, TINY_PRIORS), ("easy", 3, make_easy(TINY_PRIORS))])
def test_simulated_file_has_lens_parameters_a_version_and_the_maps_of_its_lenses(simulated, split, index, priors):
    data, lens_params = open_npz(simulated / f"{split}.npz"), simulate_parameters(12, 4, index, priors)
    np.testing.assert_array_equal(data.images[:], np.concatenate(list(simulate_images(12, 4, index, priors))))
    assert data.info["simulated"]["version"] == lensing_images.SIMULATOR_VERSION
    assert data.lens_params.keys() == lens_params.keys()
    for name, values in lens_params.items():
        np.testing.assert_array_equal(data.lens_params[name], values)
    maps, images = render_deflections(0, 4, index, n=12, priors=priors, grid=Grid(2, 2.4)), data.images[:].tolist()
    assert np.abs(maps).max() > 1e-3
    for _, batch in getattr(open_files(simulated), split).batches(0):
        for image, found in zip(np.asarray(batch["images"]).tolist(), batch["deflections"], strict=True):
            np.testing.assert_allclose(found, maps[images.index(image)], atol=1e-5)


def test_simulated_files_are_kept_if_they_come_from_the_same_arguments(simulated):
    before = (simulated / "train.npz").stat()
    simulate_dataset(simulated, SIZES, priors=TINY_PRIORS)
    assert (simulated / "train.npz").stat().st_mtime_ns == before.st_mtime_ns
    for config, priors in ((replace(SIZES, train=8), TINY_PRIORS), (SIZES, replace(TINY_PRIORS, shear_max=0.1))):
        message = r"train\.npz holds 12 other images, or another version's; remove it or choose another folder"
        refuse(message, simulate_dataset, simulated, config, priors=priors)


def test_images_do_not_depend_on_the_random_generator_that_jax_is_set_to(simulated):
    jax.clear_caches()
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        images = np.concatenate(list(simulate_images(12, 4, 0, TINY_PRIORS)))
    jax.clear_caches()
    np.testing.assert_array_equal(images, open_npz(simulated / "train.npz").images[:])


def test_deflection_maps_are_a_function_of_the_parameters_in_the_file_alone(simulated, tmp_path):
    data, maps = open_npz(simulated / "train.npz"), maps_of(simulated)
    masses = data.lens_params["vortex_mass"].copy()
    masses[8] *= 2
    info = {"simulated": data.info["simulated"] | {"seed": 5}}
    edit(simulated, tmp_path, info=info, lens_params=data.lens_params | {"vortex_mass": masses})
    changed = np.abs(maps_of(tmp_path) - maps).max((1, 2, 3)) > 0
    labels = np.concatenate([batch["labels"] for _, batch in open_files(tmp_path).train.batches(0)])
    assert labels[changed].tolist() == [8 % 3]
    many = {name: np.concatenate([values] * 50) for name, values in data.lens_params.items()}
    alone, together = (lensing_images.deflection_maps(x, TINY_PRIORS, Grid(6, 1.2)) for x in (data.lens_params, many))
    np.testing.assert_array_equal(alone, together[-12:])  # or a resumed epoch would differ in the last bits


@pytest.mark.parametrize("change", [lambda x: x[:, ::-1], lambda x: x[::-1], np.float32], ids=["flip", "order", "type"])
def test_edited_images_have_no_deflections_and_a_notice_says_so(simulated, tmp_path, capsys, change):
    edit(simulated, tmp_path, images=change(open_npz(simulated / "train.npz").images[:]))
    assert not open_files(tmp_path).has_deflections
    notice = "the images are not those of their lens parameters: no deflection maps of their substructure\n"
    assert capsys.readouterr().err == f"{tmp_path / 'train.npz'}: {notice}"


@pytest.mark.parametrize("change", [{"version": 0}, {"version": None}, {"priors": 3}, {"priors": {"shear_max": 0.3}}])
def test_images_of_another_version_have_no_deflections_and_are_not_simulated_over(simulated, tmp_path, capsys, change):
    info = {"simulated": open_npz(simulated / "train.npz").info["simulated"] | change}
    for fields in ({}, {"lens_params": None}):
        edit(simulated, tmp_path, info=info, **fields)
        assert not open_files(tmp_path).has_deflections and capsys.readouterr().err == ""
        refuse("holds 12 other images, or another version", simulate_dataset, tmp_path, SIZES, priors=TINY_PRIORS)


def test_maps_belong_to_one_pixel_scale(simulated):
    dataset, scale = open_npz(simulated / "train.npz"), TINY_PRIORS.pixel_scale
    assert map_renderer(dataset, InputConfig(crop=16), scale)(np.arange(3)).shape[0] == 3
    assert map_renderer(dataset, InputConfig(crop=16), 2 * scale) is None
    assert map_renderer(dataset, InputConfig(crop=16, pool=4)) is None  # a single cell has no convergence


def test_training_without_deflections(simulated, tmp_path):
    assert open_files(simulated).has_deflections
    for fields in ({"deflection_weight": 0.0}, {"augment": AugmentConfig(max_rotation=10.0)}):
        assert not open_files(simulated, **fields).has_deflections
    shutil.copytree(simulated, tmp_path, dirs_exist_ok=True)
    save_npz(tmp_path / "easy.npz", np.zeros((12, 24, 24), np.uint16))  # without deflections: then train has none too
    splits = open_files(tmp_path)
    assert not splits.has_deflections and not any("deflections" in batch for _, batch in splits.train.batches(0))


def test_fingerprint_is_that_of_the_origin_of_simulated_images_or_of_pixels_and_labels(simulated, tmp_path):
    data, same = open_npz(simulated / "train.npz"), edit(simulated, tmp_path, images=np.zeros((12, 24, 24), np.uint16))
    (tmp_path / "train.npz").unlink()  # no pixel can be read
    assert fingerprint(same) == fingerprint(data)
    assert fingerprint(data._replace(info={"simulated": data.info["simulated"] | {"seed": 5}})) != fingerprint(data)
    images = np.random.default_rng(0).integers(9, size=(70, 16, 16)).astype(np.uint16)
    data = open_npz(save_npz(tmp_path / "a.npz", images))
    assert fingerprint(data._replace(images=images.copy(), info={})) == fingerprint(data)
    last = np.where(np.arange(70)[:, None, None] == 69, 0, images).astype(np.uint16)
    changes = [{"images": last}, {"images": images.astype("u4")}, {"labels": data.labels + 1}, {"classes": ("a", "b")}]
    for fields in changes:
        assert fingerprint(data._replace(**fields)) != fingerprint(data)


def test_splits_must_have_the_same_image_size(tmp_path):
    for split, size in (("train", 4), ("val", 5), ("test", 4)):
        save_npz(tmp_path / f"{split}.npz", np.zeros((3, size, size), np.uint8))
    refuse(r"val\.npz has classes .* and images of \(5, 5\) pixels", load_splits, tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_that_are_not_finite_are_an_error_before_a_run_starts(tmp_path, split):
    for name, dtype in zip(SPLITS, ("f4", "f2", "f8", "f4"), strict=True):
        images = np.zeros((6, 16, 16), dtype)
        images[4, 3, 2] = np.inf if name == split else 0  # test_inference has NaN and others
        save_npz(tmp_path / f"{name}.npz", images)
    config = Config(str(tmp_path / "run"), str(tmp_path), batch_size=2, input=InputConfig(crop=16))
    refuse(rf"{split}\.npz: images\[4\]", fit, config)
    assert not (tmp_path / "run").exists()
