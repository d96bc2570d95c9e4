import pickle

import numpy as np
import pytest

from gravlens_jax import CLASSES, npz
from gravlens_jax.folders import Planes
from gravlens_jax.npz import open_npz, scale
from helpers import limited_memory, make_folders, refuse
from pack import convert, open_file, pack

RNG = np.random.default_rng(0)
IMAGE = np.arange(64.0).reshape(8, 8)


def open_all(folder, *splits):
    return [open_npz(folder / f"{split}.npz") for split in splits]


def list_files(folder):
    """Returns the names of all files in a folder, also in hidden ones."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "shape, dtype, packed", [((1, 8, 8), "f8", "float16"), ((8, 6), "u1", "float32"), ((8, 6, 1), ">f2", "float32")]
)
def test_every_image_is_stored_once_under_its_label_scaled_to_0_1(tmp_path, shape, dtype, packed):
    source = make_folders(tmp_path / "dataset", shape=shape, dtype=dtype)
    classes = {name[0]: name for name in CLASSES[::-1]}
    np.save(source / "val/no/5.npy", (RNG.random((4, *shape)) * 200).astype(dtype))  # several images in a file
    sizes = pack(source, tmp_path / "out", packed, classes, 0.25, 3, planes=Planes(stack=True))
    assert sizes == {"train": 6, "val": 12, "test": 4}
    found, split = [], {"seed": 3, "val_fraction": None, "test_fraction": 0.25}
    for dataset in open_all(tmp_path / "out", "train", "val", "test"):
        assert dataset.images.dtype == packed and dataset.classes == tuple(classes) and dataset.info["split"] == split
        found += dataset.info["files"]
        for image, label, name in zip(dataset.images, dataset.labels, dataset.info["files"], strict=True):
            file, _, row = name.strip("]").partition("[")
            stored = np.load(source / file)[int(row) if row else ...]
            assert file.split("/")[1] == tuple(classes.values())[label] and (image.min(), image.max()) == (0, 1)
            np.testing.assert_array_equal(image, scale(stored.squeeze()).astype(packed))
    stack = {f"val/no/5.npy[{row}]" for row in range(4)}
    assert sorted(found) == sorted({*list_files(source), *stack} - {"val/no/5.npy"})
    assert 0 < len(stack & set(found[-4:])) < 4  # some of them are in test
    with np.load(tmp_path / "out/val.npz") as archive:
        assert sorted(archive) == ["classes", "images", "info", "labels"]  # no masses


@pytest.mark.parametrize("folder", ["train", "."])
def test_val_fraction_makes_stratified_splits_that_are_a_function_of_the_seed(tmp_path, folder):
    make_folders(tmp_path / "made", train=10, val=0)
    source, files = tmp_path / "made" if folder == "train" else tmp_path / "made/train", []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        assert pack(source, out, val_fraction=0.4, seed=seed) == {"train": 18, "val": 6, "test": 6}
        splits = open_all(out, "train", "val", "test")
        files.append([file for dataset in splits for file in dataset.info["files"]])
        assert sorted(files[-1]) == list_files(source)
        assert [np.bincount(dataset.labels).tolist() for dataset in splits] == [[6] * 3, [2] * 3, [2] * 3]
    assert files[0] == files[1] != files[2]


def test_splits_that_exist_are_used_as_they_are_and_other_folders_are_named(tmp_path, capsys):
    source = make_folders(tmp_path / "dataset", train=3, val=2)
    (source / "val").rename(source / "Validation")
    (make_folders(tmp_path / "more", train=0, val=1) / "val").rename(source / "TEST")
    (source / "notes").mkdir()
    assert pack(source, tmp_path / "out") == {"train": 9, "val": 6, "test": 3}
    assert f"not read: {source / 'notes'}" in capsys.readouterr().err
    assert open_npz(tmp_path / "out/test.npz").info["files"][0] == "TEST/no/1.npy"
    (source / "valid").mkdir()
    refuse("are both the val split", pack, source, tmp_path / "again")
    (source / "valid").rmdir()
    message = "TEST exists and is the test split; leave --test-fraction out"
    refuse(message, pack, source, tmp_path / "again", test_fraction=0.5)


@pytest.mark.parametrize(
    "train, val, options, message",
    [
        (2, 2, {"val_fraction": 0.5}, "dataset/val exists and is the validation split; leave --val-fraction out"),
        (2, 0, {"val_fraction": 1.0}, r"val_fraction=1\.0: expected a number in \(0, 1\)"),
        (2, 0, {"test_fraction": 0.3}, "--test-fraction 0.3: .*dataset has no val/ to take it from"),
        (2, 2, {"test_fraction": 0.1}, "--test-fraction 0.1 leaves no images for test; choose another"),
        (0, 0, {}, r"dataset: has neither train/ nor val/ nor test/; .* or \S+/no/1.npy and --val-fraction 0.2"),
    ],
)
def test_splits_that_cannot_be_made_are_refused_before_pixels_are_read(tmp_path, train, val, options, message):
    make_folders(tmp_path / "dataset", train, val).mkdir(exist_ok=True)
    for file in list_files(tmp_path):
        np.save(tmp_path / file, IMAGE * np.nan)
    refuse(message, pack, tmp_path / "dataset", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((1, 8, 9)), "image has 8 x 9 pixels, expected 8 x 8"),
        (np.stack([IMAGE, IMAGE * np.nan]), r"images\[1\] has NaN or infinite pixels"),
        (None, r"announces shape \(1, 8, 8\) of float64, but header and data have 632 bytes"),
    ],
)
def test_bad_image_of_val_is_named_and_leaves_no_file_of_train_either(tmp_path, image, message):
    path = make_folders(tmp_path / "dataset") / "val/vort/4.npy"
    if image is None:
        path.write_bytes(path.read_bytes()[:-8])
    else:
        np.save(path, image)
    refuse(rf"4\.npy:? {message}", pack, tmp_path / "dataset", tmp_path / "out", "float16", planes=Planes(stack=True))
    assert not list(tmp_path.glob("out/*"))


def test_train_and_val_can_be_packed_one_after_the_other_but_not_twice(tmp_path, run_here):
    for source in (make_folders(tmp_path / "a", val=0), make_folders(tmp_path / "b", train=0)):
        out = run_here(tmp_path, "pack.py", source, "out")
    assert out.endswith("out: val.npz 6 images, test.npz 6 images\n")
    assert list_files(tmp_path / "out") == ["test.npz", "train.npz", "val.npz"]
    (source / "val/no/1.npy").write_bytes(b"not read")
    assert "val.npz exists; remove it" in run_here(tmp_path, "pack.py", source, "out", status=2)


@pytest.mark.parametrize(
    "names, options, expected",
    [
        ("no_sub cdm", ["--classes", "no_sub,cdm"], ("no_sub", "cdm")),
        ("no_sub cdm", ["--classes", "sphere=cdm,no=no_sub"], ("no", "sphere")),
        ("no_sub cdm", ["--classes", "cdm,no_sub"], "names its classes no_sub, cdm; leave --classes cdm,no_sub out"),
        ("", ["--classes", "cdm,no_sub"], ("cdm", "no_sub")),
        ("", [], "does not name its classes; give --classes with the names of labels 0, 1, ... in this order"),
        ("", ["--classes", "a,b", "--val-fraction", "0.5"], "is copied to one file as it is; leave --val-fraction out"),
    ],
)
def test_npz_from_elsewhere_is_converted_with_the_names_of_its_classes(tmp_path, run_here, names, options, expected):
    arrays = {"classes": np.array(names.split())} if names else {}
    np.savez_compressed(tmp_path / "a.npz", X=np.stack([IMAGE, IMAGE.T]), y=np.array([0, 1]), **arrays)
    out = run_here(tmp_path, "pack.py", "a.npz", "b.npz", *options, status=2 if isinstance(expected, str) else 0)
    if isinstance(expected, str):
        assert expected in out and list_files(tmp_path) == ["a.npz"]
        return
    dataset = open_npz(tmp_path / "b.npz")
    assert dataset.classes == expected and dataset.labels.tolist() == [0, 1]
    np.testing.assert_allclose(dataset.images[:], np.stack([IMAGE, IMAGE.T]) / 63, atol=1e-6)
    assert "b.npz exists; give the name of a new file" in run_here(tmp_path, "pack.py", "a.npz", "b.npz", status=2)


def test_npz_is_converted_in_chunks(tmp_path, monkeypatch):
    images = RNG.integers(0, 9, (65, 64, 64)).astype(np.uint16)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    monkeypatch.setattr(npz, "CHUNK_BYTES", 2**14)  # two images
    with limited_memory(images.nbytes / 2):
        convert(tmp_path / "a.npz", tmp_path / "b.npz")
    np.testing.assert_array_equal(open_npz(tmp_path / "b.npz", need_labels=False).images[:], images)
    monkeypatch.setattr(npz, "CHUNK_BYTES", 2**13 - 1)
    refuse("images have 8,192 bytes each, expected at most 8,191", convert, tmp_path / "a.npz", tmp_path / "c.npz")


def pickled(image, mass, protocol=4):
    return pickle.dumps(np.array([image, mass], object), protocol)


def save_pickle(path, data):
    """Writes an .npy of two Python objects with this pickle."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        file.write(data)


MASS = 3.5e-23
FORMS = {"channel": IMAGE[None], "Fortran": np.asfortranarray(IMAGE), "large": np.kron(IMAGE, np.ones((30, 30)))}
FORMS |= {dtype: IMAGE.astype(dtype) for dtype in ("<f8", ">f4", "u2")}
PICKLES = {name: pickled(image, MASS) for name, image in FORMS.items()}
PICKLES |= {f"protocol {protocol}": pickled(IMAGE, np.float64(MASS), protocol) for protocol in (2, 4)}
PICKLES["NumPy 1"] = PICKLES["protocol 2"].replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("name", PICKLES)
def test_image_and_mass_are_read(tmp_path, name):
    save_pickle(tmp_path / "1.NPY", PICKLES[name])
    (image,), mass = open_file(tmp_path / "1.NPY")
    np.testing.assert_array_equal(image, FORMS["large"] if name == "large" else IMAGE)
    assert mass == MASS


def test_masses_become_an_array_with_nan_for_images_without(tmp_path):
    source = make_folders(tmp_path / "Model_I", train=3, val=0)
    for i in (1, 2, 3):
        np.save(source / f"train/vort/{i}.npy", np.array([IMAGE, i * MASS], object), allow_pickle=True)
    pack(source / "train", tmp_path / "out", val_fraction=1 / 3, test_fraction=0)
    for name in ("train", "val"):
        with np.load(tmp_path / "out" / f"{name}.npz", allow_pickle=False) as archive:
            masses, labels = archive["mass"], archive["labels"]
        assert masses.dtype == np.float32 and np.isnan(masses[labels < 2]).all()
        (dataset,) = open_all(tmp_path / "out", name)
        expected = [int(file[-5]) * MASS for file in dataset.info["files"] if "vort" in file]
        np.testing.assert_allclose(masses[labels == 2], expected, rtol=1e-6)  # float32
        np.testing.assert_array_equal(dataset.images[-1], scale(IMAGE))


def word(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def called(module, name, arguments=b")"):
    """Returns the pickle of a call in protocol 4, whose names may have dots."""
    return b"\x80\x04" + word(module) + word(name) + b"\x93" + arguments + b"R."


HUGE = b"J\xff\xff\xff\x7f"
HOSTILE = {
    "os.system": (called("posix", "system", word("touch executed") + b"\x85"), r"it names posix\.system"),
    "dotted": (called("numpy._core.multiarray", "scalar.__self__"), r"it names numpy._core.multiarray.scalar.__self__"),
    "huge": (called("numpy._core.multiarray", "_reconstruct", b"N" + HUGE + HUGE + b"\x86C\x01b\x87"), "not enough"),
    "huge memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "opcode LONG_BINPUT"),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "expected .* bytes in a bytes8"),
    "many": (b"\x80\x02" + b"N" * 10**6 + b".", "more than 200 opcodes"),
    "NaN": (pickled(IMAGE, np.nan), "the mass is nan, not a finite float32"),
    "stack": (pickled(np.stack([IMAGE] * 2), 1.0), "2 planes"),
    "text": (pickled(IMAGE, "1"), "the mass is not a number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_pickles_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name]
    save_pickle(tmp_path / "1.npy", data)
    refused = r"1\.npy: holds Python objects other than one image and its mass, which are never unpickled \(.*"
    refuse(refused + message, open_file, tmp_path / "1.npy")
    assert list_files(tmp_path) == ["1.npy"]
