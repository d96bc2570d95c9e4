import numpy as np
import pytest

from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError
from gravlens_jax.folders import list_classes, list_folder, load_folder, load_labelled, open_images, read_images
from gravlens_jax.npz import write_npz
from gravlens_jax.pixels import read_rows, scale
from test_pack import make

RNG = np.random.default_rng(0)
IMAGE = np.ones((1, 8, 8))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((1, 8, 9)), "image has 8 x 9 pixels, expected 8 x 8"),
        (IMAGE.astype(np.longdouble), "images are [a-z0-9]*, expected at most 64 bits a pixel"),
        (np.array([{}, 1]), r"holds Python objects, .* \(but scripts/pack.py reads \[image, mass\]"),
    ],
)
def test_bad_images_are_refused(tmp_path, image, message):
    np.save(make(tmp_path, train=0) / "val/vort/4.npy", image, allow_pickle=True)
    with pytest.raises(InputError, match=rf"4\.npy:? {message}"):
        load_folder(tmp_path / "val", CLASSES)


def test_a_folder_is_loaded_as_float32_in_numerical_order(tmp_path):
    dataset = load_folder(make(tmp_path, train=11) / "train", CLASSES)
    assert dataset.images.dtype == np.float32 and dataset.labels.tolist() == [0] * 11 + [1] * 11 + [2] * 11
    files, _ = list_folder(tmp_path / "train", CLASSES)
    assert [file.stem for file in files[:11]] == [str(i) for i in range(1, 12)]
    np.testing.assert_array_equal(dataset.images[10], scale(np.load(tmp_path / "train/no/11.npy")[0]))


def test_labels_follow_the_wanted_classes_which_may_have_other_names_in_the_data(tmp_path):
    write_npz(tmp_path / "a.npz", [IMAGE], (1, 8, 8), IMAGE.dtype, np.array([2]), ("a", "b", "c"), {})
    dataset = load_labelled(tmp_path / "a.npz", ("c", "a", "b"))
    assert dataset.labels.tolist() == [0] and dataset.classes == ("c", "a", "b")
    assert load_labelled(make(tmp_path) / "val", CLASSES[::-1]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    renamed = load_labelled(tmp_path / "a.npz", {"x": "a", "y": "c", "z": "b"})
    assert renamed.labels.tolist() == [1] and renamed.classes == ("x", "y", "z")
    renamed = load_labelled(tmp_path / "val", {"x": "vort", "y": "no"})
    assert renamed.labels.tolist() == [0] * 4 + [1] * 4 and renamed.classes == ("x", "y")
    with pytest.raises(InputError, match=r"a\.npz has the classes a, b, c; expected a, b: give --classes a name for"):
        load_labelled(tmp_path / "a.npz", ("a", "b"))


def write(path, images, **options):
    """Writes images to a .npy or a FITS file."""
    if ".npy" in path.name.lower():
        with open(path, "wb") as file:  # np.save would append .npy to a.NPY
            np.save(file, images, **options)
    else:
        fits = pytest.importorskip("astropy.io.fits")
        extension = fits.CompImageHDU(images) if "comp" in path.name else fits.ImageHDU(images)
        fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(np.ones(3)), extension]).writeto(path)
    return path


@pytest.mark.parametrize("name", ["a.npy", "A.NPY", "a.fits", "a.FIT", "a.fts", "a.fits.gz", "comp.fits"])
@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (8, 6, 1), (3, 8, 6), (3, 1, 8, 6), (3, 8, 6, 1)])
def test_files_hold_one_image_or_several_with_or_without_a_channel(tmp_path, name, shape):
    for order, dtype in (("C", "f4"), ("F", ">f8"), ("C", "i2"), ("C", "u2")):
        path, images = tmp_path / f"{order}{dtype}{name}", np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        stored = np.asarray(images, order=order)
        opened = open_images(write(path, stored))
        stack = images.reshape(3 if 3 in shape else 1, 8, 6)
        np.testing.assert_array_equal(opened, stack)
        np.testing.assert_array_equal(list(read_images(path, (8, 6))), read_rows(stack, slice(None)))
        assert isinstance(opened, np.memmap) == (name.lower() == "a.npy" and stored.flags.c_contiguous)


@pytest.mark.parametrize("name", ["a.npy", "a.fits", "a.fits.gz", "Fortran.npy"])
def test_errors_name_file_and_image(tmp_path, name):
    images = np.ones((3, 8, 6), order="F" if "F" in name else "C")
    images[2, 3, 4] = np.nan
    path = write(tmp_path / name, images)
    with pytest.raises(InputError, match=rf"{name}: images\[2\] has NaN or infinite pixels"):
        list(read_images(path))
    with pytest.raises(InputError, match=rf"{name}: image has 8 x 6 pixels, expected 6 x 8"):
        list(read_images(path, (6, 8)))
    path.write_bytes(path.read_bytes()[: max(100, path.stat().st_size - 2800)])
    with pytest.raises(InputError, match=rf"{name}:? (not a readable|is not an array|announces)"):
        open_images(path)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 8, 6), (1, 1, 1, 8, 6), (3, 8, 6, 3)])
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(InputError, match=r"a.npy: images have shape .* expected \(height, width\) or \(n, height"):
        open_images(write(tmp_path / "a.npy", np.ones(shape)))


def test_python_objects_and_decompression_bombs_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a\.npy holds Python objects, which are never unpickled"):
        open_images(write(tmp_path / "a.npy", np.array([[{}]]), allow_pickle=True))
    monkeypatch.setattr("gravlens_jax.folders.MEMORY_BYTES", 2**16)
    with pytest.raises(InputError, match=r"a\.fits\.gz would unpack to 8,388,608 bytes"):
        open_images(write(tmp_path / "a.fits.gz", np.ones((1024, 1024))))


def test_fits_needs_an_image_and_an_optional_package(tmp_path, monkeypatch):
    fits = pytest.importorskip("astropy.io.fits")
    fits.PrimaryHDU().writeto(tmp_path / "a.fits")
    with pytest.raises(InputError, match=r"a\.fits: holds no image of 2 to 4 axes"):
        open_images(tmp_path / "a.fits")
    monkeypatch.setattr("gravlens_jax.errors.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r'a\.fits needs astropy; run: pip install "gravlens_jax\[fits\]"'):
        open_images(tmp_path / "a.fits")


def test_a_folder_may_hold_stacks_of_any_range(tmp_path):
    images = RNG.random((3, 8, 6)) * 1e300
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "1.NPY", images[0])
    write(tmp_path / "b/2.npy", images[1:] + 1e300)
    dataset = load_folder(tmp_path, ("b", "a"))
    assert dataset.labels.tolist() == [0, 0, 0, 1] and dataset.images.dtype == np.float32
    assert dataset.info["files"] == ["b/1.NPY", "b/2.npy[0]", "b/2.npy[1]", "a/1.NPY"]
    np.testing.assert_allclose(dataset.images, [*map(scale, [*images, images[0]])], atol=1e-6)
    assert list_folder(tmp_path, ("b", "a"))[1].tolist() == [0, 0, 1]


def test_hidden_and_foreign_files_are_no_images_and_no_classes(tmp_path, capsys):
    source = make(tmp_path, train=1) / "train"
    for name in ("__MACOSX/no", ".ipynb_checkpoints"):
        (source / name).mkdir(parents=True)
    for name in ("._no", ".DS_Store", "no/.DS_Store", "no/._1.npy", "no/__.npy"):
        (source / name).write_bytes(b"\0\5\26\7")
    assert list_classes(source) == CLASSES and load_folder(source, CLASSES).size == 3
    assert not capsys.readouterr().err
    (source / "no/1.png").touch()
    assert list_folder(source, ("no", "vort"))[1].tolist() == [0, 1]
    assert capsys.readouterr().err == f"not read: {source}/sphere, {source}/no/1.png\n"


def test_a_folder_without_classes_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no folders there; expected one folder of images for each class"):
        load_labelled(tmp_path, list_classes(tmp_path))
