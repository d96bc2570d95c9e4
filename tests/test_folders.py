import numpy as np
import pytest

from gravlens_jax.config import CLASSES
from gravlens_jax.errors import InputError
from gravlens_jax.folders import list_folder, load_folder, load_labelled
from gravlens_jax.npz import open_npz, write_npz
from pack import pack, split_indices

RNG = np.random.default_rng(0)
IMAGE = np.ones((1, 8, 8))


def make(root, train=2, val=4, shape=(1, 8, 8), dtype=np.float64, classes=CLASSES):
    for split, n in (("train", train), ("val", val)):
        for name in classes if n else ():
            (root / split / name).mkdir(parents=True)
            for i in range(1, n + 1):
                np.save(root / split / name / f"{i}.npy", (RNG.random(shape) * 200).astype(dtype))
    return root


@pytest.mark.parametrize(
    "shape, dtype, packed", [((1, 8, 8), "f8", "float16"), ((8, 6), "u1", "float32"), ((8, 8), "f2", "float32")]
)
def test_pack_keeps_every_image_under_its_label(tmp_path, shape, dtype, packed):
    source = make(tmp_path / "dataset", shape=shape, dtype=dtype)
    assert pack(source, tmp_path / "out", packed) == {"train": 6, "val": 6, "test": 6}
    for split in ("train", "val", "test"):
        dataset = open_npz(tmp_path / "out" / f"{split}.npz")
        assert dataset.images.dtype == packed and dataset.classes == CLASSES
        assert np.bincount(dataset.labels).tolist() == [2, 2, 2]
        for image, label, file in zip(dataset.images, dataset.labels, dataset.info["files"], strict=True):
            assert file.split("/")[1] == CLASSES[label]
            np.testing.assert_array_equal(image, np.load(source / file).reshape(shape[-2:]).astype(packed))


def test_val_and_test_share_no_file_and_record_their_split(tmp_path):
    source = make(tmp_path / "dataset", train=0, classes=("a", "b"))
    assert pack(source, tmp_path / "out", test_fraction=0.25, seed=3, classes=("b", "a")) == {"val": 6, "test": 2}
    val, test = (open_npz(tmp_path / "out" / f"{split}.npz") for split in ("val", "test"))
    assert not set(val.info["files"]) & set(test.info["files"]) and val.classes == ("b", "a")
    assert val.info["split"] == test.info["split"] == {"seed": 3, "test_fraction": 0.25}


def test_the_split_is_stratified_and_a_function_of_the_seed():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    first, second = split_indices(labels, 0.5, 0)
    assert np.bincount(labels[second]).tolist() == [5, 10, 15]
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(60))
    np.testing.assert_array_equal(second, split_indices(labels, 0.5, 0)[1])
    assert (second != split_indices(labels, 0.5, 1)[1]).any()


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((1, 8, 9)), r"image has shape \(1, 8, 9\), expected \(1, 8, 8\) or \(8, 8\)"),
        (IMAGE * np.nan, "image has NaN or infinite pixels"),
        (IMAGE * -1e39, "image has NaN or infinite pixels, or pixels beyond float32"),
        (IMAGE * 1e6, "pixels overflow float16; use --dtype float32"),
        (IMAGE.astype(np.longdouble), "image is [a-z0-9]*, expected at most 64 bits a pixel"),
        (np.array([{}, 1]), "holds Python objects, which are never unpickled"),
        (None, r"announces shape \(1, 8, 8\) of float64, but header and data have 632 bytes"),
    ],
)
def test_bad_images_are_refused_and_leave_no_half_written_file(tmp_path, image, message):
    path = make(tmp_path / "dataset", train=0) / "val/vort/4.npy"
    if image is None:
        path.write_bytes(path.read_bytes()[:-8])
    else:
        np.save(path, image, allow_pickle=True)
    with pytest.raises(InputError, match=rf"4\.npy:? {message}"):
        pack(tmp_path / "dataset", tmp_path / "out", dtype="float16", test_fraction=0)
    assert not list(tmp_path.glob("out/*"))
    if "float16" not in message:
        with pytest.raises(InputError, match=rf"4\.npy:? {message}"):
            load_folder(tmp_path / "dataset/val", CLASSES)


def test_pack_overwrites_no_file(tmp_path):
    source = make(tmp_path / "dataset")
    pack(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"train\.npz exists; remove it"):
        pack(source, tmp_path / "out")


def test_a_folder_is_loaded_as_float32_in_numerical_order(tmp_path):
    dataset = load_folder(make(tmp_path, train=11) / "train", CLASSES)
    assert dataset.images.dtype == np.float32 and dataset.labels.tolist() == [0] * 11 + [1] * 11 + [2] * 11
    files, _ = list_folder(tmp_path / "train", CLASSES)
    assert [file.stem for file in files[:11]] == [str(i) for i in range(1, 12)]
    np.testing.assert_array_equal(dataset.images[10], np.load(tmp_path / "train/no/11.npy")[0].astype(np.float32))


def test_labels_follow_the_classes_of_the_network(tmp_path):
    write_npz(tmp_path / "a.npz", [IMAGE], (1, 8, 8), IMAGE.dtype, np.array([2]), ("a", "b", "c"), {})
    dataset = load_labelled(tmp_path / "a.npz", ("c", "a", "b"))
    assert dataset.labels.tolist() == [0] and dataset.classes == ("c", "a", "b")
    assert load_labelled(make(tmp_path) / "val", CLASSES[::-1]).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(InputError, match=r"a\.npz has the classes a, b, c; the network knows no, sphere, vort"):
        load_labelled(tmp_path / "a.npz", CLASSES)
