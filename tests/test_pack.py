import os
import pickle
import struct

import numpy as np
import pytest

import pack as script
from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError
from gravlens_jax.npz import open_npz
from gravlens_jax.pixels import scale
from pack import open_file, pack, split_indices

RNG = np.random.default_rng(0)
IMAGE = np.arange(64.0).reshape(8, 8)


def make(root, train=2, val=4, shape=(1, 8, 8), dtype=np.float64, classes=CLASSES):
    """Writes a data set of noise, with a number of files for each class."""
    for split, n in (("train", train), ("val", val)):
        for name in classes if n else ():
            (root / split / name).mkdir(parents=True)
            for i in range(1, n + 1):
                np.save(root / split / name / f"{i}.npy", (RNG.random(shape) * 200).astype(dtype))
    return root


def names(path):
    return open_npz(path).info["files"]


def written(folder):
    """Returns all files in a folder, also in hidden ones."""
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "shape, dtype, packed", [((1, 8, 8), "f8", "float16"), ((8, 6), "u1", "float32"), ((8, 6, 1), ">f2", "float32")]
)
def test_every_image_is_stored_under_its_label_scaled_to_0_1(tmp_path, shape, dtype, packed):
    source = make(tmp_path / "dataset", shape=shape, dtype=dtype)
    assert pack(source, tmp_path / "out", packed) == {"train": 6, "val": 6, "test": 6}
    for split in ("train", "val", "test"):
        dataset = open_npz(tmp_path / "out" / f"{split}.npz")
        assert dataset.images.dtype == packed and dataset.classes == CLASSES
        assert np.bincount(dataset.labels).tolist() == [2, 2, 2]
        for image, label, file in zip(dataset.images, dataset.labels, dataset.info["files"], strict=True):
            assert file.split("/")[1] == CLASSES[label] and (image.min(), image.max()) == (0, 1)
            np.testing.assert_array_equal(image, scale(np.load(source / file).squeeze()).astype(packed))


@pytest.mark.parametrize("factor, offset", [(1e300, 0), (1e-30, 0), (1, 1e9), (-1e39, 1e40)])
def test_neither_float16_nor_scale_nor_offset_loses_precision(tmp_path, factor, offset):
    source = make(tmp_path / "dataset", train=0, val=1)
    np.save(source / "val/no/1.npy", IMAGE * factor + offset)
    pack(source, tmp_path / "out", "float16", test_fraction=0)
    expected = IMAGE / 63 if factor > 0 else 1 - IMAGE / 63
    # float16 has 11 bits.
    np.testing.assert_allclose(open_npz(tmp_path / "out/val.npz").images[0], expected, rtol=0, atol=2**-11)


def test_val_and_test_share_no_file_and_record_their_split(tmp_path):
    source = make(tmp_path / "dataset", train=0, classes=("a", "b"))
    assert pack(source, tmp_path / "out", test_fraction=0.25, seed=3, classes=("b", "a")) == {"val": 6, "test": 2}
    val, test = (open_npz(tmp_path / "out" / f"{split}.npz") for split in ("val", "test"))
    assert not set(val.info["files"]) & set(test.info["files"]) and val.classes == ("b", "a")
    assert val.info["split"] == test.info["split"] == {"seed": 3, "val_fraction": None, "test_fraction": 0.25}


def test_the_split_is_stratified_and_a_function_of_the_seed():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    first, second = split_indices(labels, 0.5, 0)
    assert np.bincount(labels[second]).tolist() == [5, 10, 15]
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(60))
    np.testing.assert_array_equal(second, split_indices(labels, 0.5, 0)[1])
    assert (second != split_indices(labels, 0.5, 1)[1]).any()


@pytest.mark.parametrize("folder", ["train", "."])
def test_val_fraction_makes_val_and_test_from_train_or_from_folders_of_classes(tmp_path, folder):
    make(tmp_path / "made", train=10, val=0)
    source = tmp_path / "made" if folder == "train" else tmp_path / "made/train"
    split = {"seed": 1, "val_fraction": 0.4, "test_fraction": 0.5}
    assert pack(source, tmp_path / "out", val_fraction=0.4, seed=1) == {"train": 18, "val": 6, "test": 6}
    files = [names(tmp_path / "out" / f"{name}.npz") for name in ("train", "val", "test")]
    assert sorted(files[0] + files[1] + files[2]) == sorted(f.relative_to(source).as_posix() for f in written(source))
    for name, each in (("train", 6), ("val", 2), ("test", 2)):
        dataset = open_npz(tmp_path / "out" / f"{name}.npz")
        assert np.bincount(dataset.labels).tolist() == [each] * 3 and dataset.info["split"] == split


@pytest.mark.parametrize(
    "train, val, options, message",
    [
        (2, 2, {"val_fraction": 0.5}, "dataset/val exists and is the validation split; leave --val-fraction out"),
        (0, 2, {"val_fraction": 0.5}, "dataset/val exists and is the validation split"),
        (2, 0, {"val_fraction": 1.0}, r"val_fraction=1\.0: expected a number in \(0, 1\)"),
        (2, 0, {"val_fraction": 0.1}, "--val-fraction 0.1 leaves no images for val; choose another"),
        (2, 2, {"test_fraction": 0.9}, "--test-fraction 0.9 leaves no images for val; choose another"),
        (2, 2, {"test_fraction": 0.1}, "--test-fraction 0.1 leaves no images for test; choose another"),
        (0, 0, {}, r"dataset: has neither train/ nor val/; .* or \S+/dataset/no/1.npy and --val-fraction 0.2"),
    ],
)
def test_fractions_that_do_not_fit_are_refused_before_images_are_read(
    tmp_path, monkeypatch, train, val, options, message
):
    make(tmp_path / "dataset", train, val).mkdir(exist_ok=True)
    monkeypatch.setattr(script, "read_rows", None)
    with pytest.raises(InputError, match=message):
        pack(tmp_path / "dataset", tmp_path / "out", **options)
    assert not written(tmp_path / "out")


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((1, 8, 9)), "image has 8 x 9 pixels, expected 8 x 8"),
        (IMAGE * np.nan, r".*has NaN or infinite pixels"),
        (IMAGE.astype(np.longdouble), "images are [a-z0-9]*, expected at most 64 bits a pixel"),
        (np.array([{}, 1, 2]), "holds Python objects"),
        (None, r"announces shape \(1, 8, 8\) of float64, but header and data have 632 bytes"),
    ],
)
def test_bad_image_of_val_leaves_no_file_of_train_either(tmp_path, image, message):
    path = make(tmp_path / "dataset") / "val/vort/4.npy"
    if image is None:
        path.write_bytes(path.read_bytes()[:-8])
    else:
        np.save(path, image, allow_pickle=True)
    with pytest.raises(InputError, match=rf"4\.npy:? {message}"):
        pack(tmp_path / "dataset", tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out/*"))


def test_interrupted_packing_leaves_no_file(tmp_path, monkeypatch):
    ready = []

    def interrupted(image):
        ready.append(image)
        if len(ready) == 14:  # in test, after train and val
            raise KeyboardInterrupt
        return scale(image)

    monkeypatch.setattr(script, "scale", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(make(tmp_path / "dataset"), tmp_path / "out")
    assert len(ready) == 14 and not list(tmp_path.glob("out/*"))


def test_missing_source_is_named(tmp_path):
    with pytest.raises(InputError, match="dataset: no such folder"):
        pack(tmp_path / "dataset", tmp_path / "out", val_fraction=0.5)


def test_existing_files_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    source = make(tmp_path / "dataset")
    pack(source, tmp_path / "out", test_fraction=0)
    monkeypatch.setattr(script, "list_images", None)
    with pytest.raises(InputError, match=r"train\.npz exists; remove it"):
        pack(source, tmp_path / "out")


def test_train_and_val_can_be_packed_one_after_the_other(tmp_path):
    for source in (make(tmp_path / "a", val=0), make(tmp_path / "b", train=0)):
        pack(source, tmp_path / "out")
    assert sorted(path.name for path in written(tmp_path / "out")) == ["test.npz", "train.npz", "val.npz"]


def test_images_of_a_stack_are_named_and_may_go_to_different_splits(tmp_path):
    source = make(tmp_path / "dataset", train=1, val=0)
    stack = RNG.random((4, 1, 8, 8))
    np.save(source / "train/vort/1.npy", stack)
    assert pack(source, tmp_path / "out", val_fraction=0.5, test_fraction=0) == {"train": 4, "val": 2}
    train, val = (open_npz(tmp_path / "out" / f"{name}.npz") for name in ("train", "val"))
    assert train.labels.tolist() == [0, 1, 2, 2] and val.labels.tolist() == [2, 2]
    assert train.info["files"][:2] == ["train/no/1.npy", "train/sphere/1.npy"]
    rows = {name: row for row in range(4) for name in [f"train/vort/1.npy[{row}]"]}
    assert sorted(train.info["files"][2:] + val.info["files"]) == sorted(rows)
    for image, name in zip(val.images, val.info["files"], strict=True):
        np.testing.assert_array_equal(image, scale(stack[rows[name], 0]))


def test_hidden_and_foreign_files_are_no_images_and_no_classes(tmp_path):
    source = make(tmp_path / "dataset", val=0) / "train"
    for name in ("no/._1.npy", ".DS_Store", "__MACOSX/no/1.npy", "no/.ipynb_checkpoints/1.npy"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("no image")
    assert pack(source, tmp_path / "out", val_fraction=0.5, test_fraction=0) == {"train": 3, "val": 3}


def test_a_bad_image_of_a_stack_is_named(tmp_path):
    source = make(tmp_path / "dataset", val=0)
    np.save(source / "train/no/2.npy", np.stack([IMAGE, np.full((8, 8), np.inf)]))
    with pytest.raises(InputError, match=r"2\.npy: images\[1\] has NaN or infinite pixels"):
        pack(source, tmp_path / "out")


def test_classes_rename_folders(tmp_path, run_here):
    make(tmp_path / "theirs", train=0, classes=("no_sub", "axion"))
    out = run_here(tmp_path, "pack.py", "theirs", "out", "--classes", "vort=axion,no=no_sub", "--test-fraction", "0")
    assert out.endswith("out: val.npz 8 images\n")
    dataset = open_npz(tmp_path / "out/val.npz")
    assert dataset.classes == ("vort", "no") and dataset.info["files"][0] == "val/axion/1.npy"


@pytest.mark.parametrize(
    "classes, expected",
    [
        ("sphere=cdm,no=no_sub", ("no", "sphere")),
        ("no_sub,cdm", ("no_sub", "cdm")),
        ("cdm,no_sub", None),
        ("no=no_sub,sphere=axion", None),
    ],
)
def test_classes_rename_those_of_an_npz(tmp_path, run_here, classes, expected):
    arrays = {"images": np.stack([IMAGE] * 2), "labels": np.array([0, 1])}
    np.savez(tmp_path / "a.npz", **arrays, classes=np.array(["no_sub", "cdm"]))
    out = run_here(tmp_path, "pack.py", "a.npz", "b.npz", "--classes", classes, status=0 if expected else 2)
    if expected:
        assert open_npz(tmp_path / "b.npz").classes == expected
    else:
        assert "a.npz names its classes itself, no_sub, cdm; leave --classes " in out


def pair(*values):
    """Returns an object array of these."""
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def save_pickle(path, data):
    """Writes an .npy of two Python objects with this pickle."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        file.write(data)


def python2(image, mass):
    """Returns the pickle of [image, mass] that NumPy wrote in Python 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(%btcnumpy\ndtype\nU\x02%b"
    )
    array += b"K\x00K\x01\x87R(K\x03U\x01%bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89%btb"
    pixels = b"T" + struct.pack("<i", image.nbytes) + image.tobytes()
    inner = array % (b"K%cK%c" % image.shape, b"f8", b"<", pixels)
    return b"\x80\x02" + array % (b"K\x02", b"O8", b"|", b"](" + inner + b"G" + struct.pack(">d", mass) + b"e") + b"."


MASS = 3.5e-23
PAIR = pair(IMAGE, np.float64(MASS))
NUMPY1 = pickle.dumps(PAIR, 2).replace(b"numpy._core", b"numpy.core")
PICKLES = {
    **{f"protocol {protocol}": pickle.dumps(PAIR, protocol) for protocol in (2, 3, 4)},
    "numpy 1": NUMPY1,
    "python 2": python2(IMAGE, MASS),
    "float": pickle.dumps(pair(IMAGE, MASS), 4),
    "channel": pickle.dumps(pair(IMAGE[None], MASS), 4),
    "fortran": pickle.dumps(pair(np.asfortranarray(IMAGE), MASS), 4),
    "big-endian": pickle.dumps(pair(IMAGE.astype(">f4"), MASS), 4),
    "integers": pickle.dumps(pair(IMAGE.astype(np.uint16), MASS), 4),
    "large": pickle.dumps(pair(np.kron(IMAGE, np.ones((30, 30))), MASS), 4),
}


@pytest.mark.parametrize("name", PICKLES)
def test_image_and_mass_are_read(tmp_path, name):
    save_pickle(tmp_path / "1.NPY", PICKLES[name])
    images, mass = open_file(tmp_path / "1.NPY")
    np.testing.assert_array_equal(images, np.kron(IMAGE, np.ones((30, 30)))[None] if name == "large" else IMAGE[None])
    assert mass == MASS


def test_masses_become_an_array_with_nan_for_images_without(tmp_path):
    source = make(tmp_path / "Model_I", train=3, val=0)
    for i in (1, 2, 3):
        np.save(source / f"train/vort/{i}.npy", pair(IMAGE, np.float64(i * MASS)), allow_pickle=True)
    pack(source / "train", tmp_path / "out", val_fraction=1 / 3, test_fraction=0)
    for name in ("train", "val"):
        with np.load(tmp_path / "out" / f"{name}.npz", allow_pickle=False) as archive:
            masses, labels = archive["mass"], archive["labels"]
        assert masses.dtype == np.float32 and np.isnan(masses[labels < 2]).all()
        expected = [int(file[-5]) * MASS for file in names(tmp_path / "out" / f"{name}.npz") if "vort" in file]
        np.testing.assert_allclose(masses[labels == 2], expected, rtol=1e-6)  # float32
        np.testing.assert_array_equal(open_npz(tmp_path / "out" / f"{name}.npz").images[-1], scale(IMAGE))
    pack(make(tmp_path / "other"), tmp_path / "plain")
    with np.load(tmp_path / "plain/val.npz", allow_pickle=False) as archive:
        assert "mass" not in archive


class Evil:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(*call):
    return pickle.dumps(pair(IMAGE, Evil(*call)), 4)


def called(module, name, arguments=b")"):
    """Returns the pickle of a call in protocol 4, whose names may have dots."""
    words = (b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + b"".join(words) + b"\x93" + arguments + b"R."


def array_state(shape, dtype=b"cnumpy\ndtype\nU\x02O8\x85R(K\x03U\x01|NNNNNK?tb", data=b"]"):
    """Returns the pickle of an array with this state."""
    head = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return head + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


HUGE = b"J\xff\xff\xff\x7f"
HOSTILE = {
    "os.system": (evil(os.system, "touch executed"), r"it names posix\.system"),
    "eval": (evil(eval, "open('executed', 'w')"), r"it names builtins\.eval"),
    "getattr": (evil(getattr, "", "join"), r"it names builtins\.getattr"),
    "numpy function": (evil(np.fromfile, "executed"), r"it names numpy\._?c?o?r?e?\.?\w*\.?fromfile"),
    "numpy memory": (called("numpy", "ones", HUGE + b"\x85"), r"it names numpy\.ones"),
    "dotted": (called("numpy._core.multiarray", "scalar.__self__"), r"it names numpy._core.multiarray.scalar.__self__"),
    "other module": (called("os", "scalar"), r"it names os\.scalar"),
    "huge": (called("numpy._core.multiarray", "_reconstruct", b"N" + HUGE + HUGE + b"\x86C\x01b\x87"), "not enough"),
    "huge state": (array_state(HUGE + b"\x85"), "not enough values"),
    "huge image": (pickle.dumps(PAIR, 2).replace(b"K\x08K\x08\x86", b"K\x08" + HUGE + b"\x86"), "cannot reshape"),
    "huge memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "opcode LONG_BINPUT"),
    "huge bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "expected .* bytes in a bytes8"),
    "hash": (b"\x80\x02})" + b"0" * 9 + b".", "opcode EMPTY_DICT"),
    "many": (b"\x80\x02" + b"N" * 10**6 + b".", "more than 200 opcodes"),
    "truncated": (pickle.dumps(PAIR, 4)[:-20], ""),
    "trailing frame": (pickle.dumps(PAIR, 4)[:3], ""),
    "function changed": (b"\x80\x02cnumpy\ndtype\nNK\x01\x86b.", "pickle|state"),
    "function": (b"\x80\x02cnumpy\ndtype\n.", "not an array"),
    "nested": (pickle.dumps(pair(pair(IMAGE, 1.0), 1.0), 4), "numbers of dtype"),
    "dtype with fields": (pickle.dumps(pair(np.zeros((1, 1), "f8,O"), 1.0), 4), "opcode EMPTY_DICT"),
    "complex": (pickle.dumps(pair(IMAGE * 1j, 1.0), 4), "numbers of dtype <c16"),
    "text": (pickle.dumps(pair(IMAGE, "1"), 4), "the mass is not a number"),
    "array": (pickle.dumps(pair(IMAGE, IMAGE), 4), "the mass is not a number"),
    "swapped": (pickle.dumps(pair(1.0, IMAGE), 4), "not an array"),
    "NaN": (pickle.dumps(pair(IMAGE, np.nan), 4), "the mass is nan, not a finite float32"),
    "large": (pickle.dumps(pair(IMAGE, 1e300), 4), r"the mass is 1e\+300, not a finite float32"),
    "stack": (pickle.dumps(pair(np.stack([IMAGE] * 2), 1.0), 4), "2 images"),
    "row": (pickle.dumps(pair(IMAGE[0], 1.0), 4), "images have shape"),
    "list": (pickle.dumps([IMAGE, 1.0], 4), "not an array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_pickles_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name]
    save_pickle(tmp_path / "1.npy", data)
    refused = (
        rf"1\.npy: holds Python objects other than one image and its mass, which are never unpickled \(.*{message}"
    )
    with pytest.raises(InputError, match=refused):
        open_file(tmp_path / "1.npy")
    assert [path.name for path in written(tmp_path)] == ["1.npy"]
