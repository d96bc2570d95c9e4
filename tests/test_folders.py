import os

import numpy as np
import pytest
from astropy.io import fits

from gravlens_jax import CLASSES, folders
from gravlens_jax.folders import Planes, list_classes, list_folder, load_labelled, load_npz, open_images, read_images
from gravlens_jax.npz import MappedImages, open_npz, read_rows, scale
from helpers import make_folders, refuse, save_npz

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.random((3, 8, 6), np.float32), np.array([0, 1, 2])
SCALED = read_rows(IMAGES, slice(None))
STACK = Planes(stack=True)
SAME_NAMES = {name: name for name in CLASSES}


def write(path, images):
    """Writes images to a .npy or a FITS file."""
    if ".npy" in path.name.lower():
        with open(path, "wb") as file:  # np.save would append .npy to a.NPY
            np.save(file, images)
    else:
        extension = fits.CompImageHDU(images) if "comp" in path.name else fits.ImageHDU(images)
        fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.ones(3)), extension]).writeto(path)
    return path


@pytest.mark.parametrize("name", ["a.npy", "A.NPY", "a.fits", "a.FIT", "a.fts", "a.fits.gz", "a.fits.bz2", "comp.fits"])
@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (8, 6, 1), (3, 8, 6), (3, 1, 8, 6), (3, 8, 6, 1)])
def test_files_hold_one_image_or_several_with_or_without_a_channel(tmp_path, name, shape):
    for order, dtype in (("C", "f4"), ("F", ">f8"), ("C", "i2"), ("C", "u2")):
        path, images = tmp_path / f"{order}{dtype}{name}", np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        stored = np.asarray(images, order=order)
        opened = open_images(write(path, stored), STACK)
        expected = read_rows(images.reshape(3 if 3 in shape else 1, 8, 6), slice(None))
        np.testing.assert_array_equal(read_rows(opened, slice(None)), expected)
        np.testing.assert_array_equal(list(read_images(path, (8, 6), STACK)), expected)
        assert isinstance(opened, MappedImages) == (name.lower() == "a.npy" and stored.flags.c_contiguous)


@pytest.mark.parametrize("name", ["a.npy", "a.fits", "a.fits.gz", "Fortran.npy"])
def test_errors_name_file_and_image(tmp_path, name):
    images = np.ones((3, 8, 6), order="F" if "F" in name else "C")
    images[2, 3, 4] = np.nan
    path = write(tmp_path / name, images)
    refuse(rf"{name}: images\[2\] has NaN or infinite pixels", read_images, path, planes=STACK)
    refuse(rf"{name}: image has 8 x 6 pixels, expected 6 x 8", read_images, path, (6, 8), STACK)


def test_images_of_other_shapes_or_large_fits_or_fits_without_astropy_are_refused(tmp_path, monkeypatch):
    fits.PrimaryHDU().writeto(tmp_path / "a.fits")
    large = write(tmp_path / "a.fits.gz", np.ones((1024, 1024)))
    refuse(r"a\.fits: holds no image of 2 to 4 axes", open_images, tmp_path / "a.fits")
    for shape in ((5,), (3, 2, 8, 6), (1, 1, 1, 8, 6), (3, 8, 6, 3)):
        message = r"a.npy: images have shape .* expected \(height, width\), or several"
        refuse(message, open_images, write(tmp_path / "a.npy", np.ones(shape)))
    monkeypatch.setattr(folders, "FOREIGN_BYTES", 2**16)
    refuse(r"a\.fits\.gz would unpack to 8,388,608 bytes", open_images, large)
    monkeypatch.setattr("gravlens_jax.errors.find_spec", lambda _: None)
    refuse(r'a\.fits needs astropy; run: pip install "gravlens_jax\[fits\]"', open_images, tmp_path / "a.fits")


@pytest.mark.parametrize("name", ["a.npy", "Fortran.npy", "a.fits"])
@pytest.mark.parametrize("axis", [0, 2])
def test_one_band_or_all_of_a_stack_is_read_of_files_with_several_planes(tmp_path, name, axis):
    path = write(tmp_path / name, np.asarray(np.moveaxis(IMAGES, 0, axis), order="F" if "F" in name else "C"))
    several = rf"{name}: 3 planes in an array of shape .*; give --band 0 to 2, or --stack if they are images of"
    for planes, message in ((Planes(), several), (Planes(3), "but --band 3; expected 0 to 2")):
        refuse(message, open_images, path, planes)
    for planes, expected in ((STACK, SCALED), *((Planes(band), SCALED[band : band + 1]) for band in range(3))):
        np.testing.assert_array_equal(read_images(path, (8, 6), planes), expected)
    refuse("give --band for bands, or --stack for images of different lenses", Planes, 0, stack=True)


@pytest.mark.parametrize(
    "hdus, shape, expected",
    [
        ("ERR-8-6 SCI-8-6", None, 1),
        ("ERR-8-6 SCI-7-6", (8, 6), 1),
        ("A-9-6 B-8-6 C-3-8-6", (9, 6), 0),
        ("A-5-8-6 B-8-6", None, 1),
        ("A-8-6 B-8-6", (8, 6), r"a\.fits: has the images 1 A \(8 x 6\), 2 B \(8 x 6\); choose one with --hdu$"),
        ("SCI-8-6 SCI-8-6", None, "choose one with --hdu"),
    ],
)
def test_image_of_a_fits_file_is_chosen_by_name_or_size_and_named_or_asked_for(tmp_path, capsys, hdus, shape, expected):
    path, made = tmp_path / "a.fits", [fits.PrimaryHDU()]
    for i, hdu in enumerate(hdus.split()):
        name, *lengths = hdu.split("-")
        made.append(fits.ImageHDU(np.full(tuple(map(int, lengths)), i, np.float32), name=name))
    fits.HDUList(made).writeto(path)
    for wanted in ("2", made[2].name) if len(set(hdus.split())) > 1 else ("2",):
        assert (open_images(path, Planes(band=0, hdu=wanted.lower()), shape) == 1).all()
    if isinstance(expected, str):
        for planes, message in ((Planes(), expected), (Planes(hdu="NONE"), "choose one with --hdu, not NONE")):
            refuse(message, open_images, path, planes, shape)
    else:
        folders._name_hdu.cache_clear()
        capsys.readouterr()
        assert all((open_images(path, shape=shape) == expected).all() for _ in range(2))
        assert capsys.readouterr().err.count(f"HDU {expected + 1} {made[expected + 1].name} (") == 1


def test_identical_images_and_unequal_classes_are_noticed(capsys):
    keys = [folders.digest(image) for image in IMAGES]
    other, again = folders.digest(IMAGES[::-1, ::-1][0]), folders.digest(2 * IMAGES[0])
    folders.show_notices({"train": (keys, LABELS), "val": ([other], LABELS[1:2])}, CLASSES)
    assert not capsys.readouterr().err
    many = ([again, *keys[1:]] * 2, np.array([0, 1, 2, 1, 1, 1]))
    folders.show_notices({"train": (keys, LABELS), "val": many}, CLASSES)
    err = capsys.readouterr().err
    assert "6 of 9 images are in another split, too" in err and "2 of 9 images are under another label, too" in err
    assert "no 2, sphere 5, vort 2" not in err  # less than 3 times
    folders.show_notices({"train": (keys, np.array([0, 0, 1]))}, CLASSES)
    assert "very different numbers of images (no 2, sphere 1, vort 0)" in capsys.readouterr().err


def test_folder_is_loaded_in_numerical_order_and_may_hold_stacks_of_any_range(tmp_path):
    images = RNG.random((5, 8, 6)) * 1e300
    for name, values in (("b/1.NPY", images[0]), ("b/2.npy", images[1] + 1e300), ("b/10.npy", images[2:4])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, values)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a/1.npy", images[4])
    dataset = load_labelled(tmp_path, {"x": "b", "y": "a"}, planes=STACK)
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1] and dataset.classes == ("x", "y")
    assert dataset.info["files"] == ["b/1.NPY", "b/2.npy", "b/10.npy[0]", "b/10.npy[1]", "a/1.npy"]
    np.testing.assert_allclose(dataset.images, [*map(scale, images)], atol=1e-6)
    assert dataset.images.dtype == np.float32 and list_folder(tmp_path, ("b", "a"))[1].tolist() == [0, 0, 0, 1]
    np.save(tmp_path / "a/2.npy", images[:, 1:])
    message = "a/2.npy: image has 7 x 6 pixels, expected 8 x 6"
    refuse(message, load_labelled, tmp_path, {"x": "b", "y": "a"}, planes=STACK)


def test_hidden_and_system_files_are_ignored_and_other_ones_named(tmp_path, capsys):
    source = make_folders(tmp_path, train=1, val=0) / "train"
    for name in ("__MACOSX/no", ".ipynb_checkpoints"):
        (source / name).mkdir(parents=True)
    for name in ("._no", ".DS_Store", "no/.DS_Store", "no/._1.npy", "no/__.npy"):
        (source / name).write_bytes(b"\0\5\26\7")
    assert list_classes(source) == CLASSES and load_labelled(source, SAME_NAMES).size == 3
    assert not capsys.readouterr().err
    (source / "no/1.png").touch()
    assert list_folder(source, ("no", "vort"))[1].tolist() == [0, 1]
    assert capsys.readouterr().err == f"not read: {source}/sphere, {source}/no/1.png\n"
    refuse("no folders there; expected one folder of images for each class", load_labelled, source / "no", {})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", ["X y", "x_train y_train", "data labels", "data target", "arr_0 arr_1", "images Y"])
def test_arrays_of_an_npz_may_have_other_usual_names_and_those_left_out_are_printed(tmp_path, capsys, save, names):
    path, (images, labels) = tmp_path / "a.npz", names.split()
    others = {"x_test": IMAGES, "info": np.array("{}"), "classes": np.array(CLASSES)}
    save(path, **{images: IMAGES[..., None], labels: LABELS}, **others)
    dataset = load_npz(path)
    np.testing.assert_array_equal(read_rows(dataset.images, slice(None)), SCALED)
    assert dataset.labels.tolist() == [0, 1, 2] and dataset.classes == CLASSES
    assert f"a.npz: images are {images!r}, labels are {labels!r}; left out: x_test\n" in capsys.readouterr().err
    save(path, **{images: IMAGES})
    assert load_npz(path, need_labels=False).size == 3
    refuse(r"a\.npz: has no '(labels|y_train|arr_1)', only", load_npz, path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_labels_follow_the_wanted_classes_whose_names_are_never_guessed(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, images=IMAGES, labels=LABELS)
    refuse(r"a\.npz has images, labels; expected .*; convert it: .* --classes \.\.\.", open_npz, path)
    for read in (load_npz, lambda path: load_labelled(path, SAME_NAMES)):
        refuse(r"a\.npz does not name its classes; give --classes with .* in this order", read, path)
    dataset = load_labelled(path, SAME_NAMES, ("no", "vort", "sphere"))  # GravLensNet's order
    assert dataset.classes == CLASSES and dataset.labels.tolist() == [0, 2, 1] and list_classes(path) == ()
    refuse("labels run from 0 to 2, expected 0 to 1 for a, b", load_npz, path, ("a", "b"))
    save(path, images=IMAGES, labels=LABELS, classes=np.array(["a", "b", "c"]))
    dataset = load_labelled(path, {"x": "b", "y": "c", "z": "a"})
    assert dataset.labels.tolist() == [2, 0, 1] and dataset.classes == ("x", "y", "z")
    assert list_classes(path) == ("a", "b", "c")
    refuse("--stack and --hdu are for .npy and FITS files", load_labelled, path, SAME_NAMES, (), STACK)
    message = "has the classes a, b, c; expected a, b: give --classes a name for"
    refuse(message, load_labelled, path, {"a": "a", "b": "b"})


def test_compressed_npz_is_read_into_memory_each_time_unless_it_is_large(tmp_path, monkeypatch):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    for path, images in ((a, IMAGES), (b, IMAGES + 1)):
        np.savez_compressed(path, images=images, labels=LABELS, classes=np.array(CLASSES))
        assert (load_npz(path).images == images).all()
    os.utime(b, (0, 0))
    os.replace(b, a)  # an older file over a newer one
    assert (load_npz(a).images == IMAGES + 1).all() and list(tmp_path.iterdir()) == [a]
    monkeypatch.setattr(folders, "FOREIGN_BYTES", IMAGES.nbytes)
    refuse(r"convert it: python scripts/pack.py \S+/a.npz packed/a", load_npz, a, CLASSES, need_labels=False)
    np.savez(b, images=IMAGES, label=LABELS)
    refuse(r"convert it: python scripts/pack.py \S+/b.npz packed/b", load_npz, b, CLASSES)
    assert isinstance(load_npz(save_npz(b, IMAGES)).images, MappedImages)
