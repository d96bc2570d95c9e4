import numpy as np
import pytest

from gravlens_jax.config import CLASSES, InputError
from gravlens_jax.folders import list_folder, load_folder, load_image, pack, split_indices
from gravlens_jax.npz import open_npz

RNG = np.random.default_rng(0)


def make(root, train=2, val=4, shape=(1, 8, 8), dtype=np.float64, classes=CLASSES):
    for split, n in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(1, n + 1):
                np.save(root / split / name / f"{i}.npy", (RNG.random(shape) * 200).astype(dtype))
    return root


@pytest.mark.parametrize("shape, dtype", [((1, 8, 8), np.float64), ((8, 6), np.uint8), ((8, 8), np.float16)])
def test_pack_keeps_every_image_under_its_label(tmp_path, shape, dtype):
    source = make(tmp_path / "dataset", shape=shape, dtype=dtype)
    assert pack(source, tmp_path / "out") == {"train": 6, "val": 6, "test": 6}
    for split in ("train", "val", "test"):
        dataset = open_npz(tmp_path / "out" / f"{split}.npz")
        assert dataset.images.dtype == np.float32 and dataset.classes == CLASSES
        assert np.bincount(dataset.labels).tolist() == [2, 2, 2]
        for image, label, file in zip(dataset.images, dataset.labels, dataset.info["files"], strict=True):
            assert file.split("/")[1] == CLASSES[label]
            original = np.load(source / file).reshape(shape[-2:])
            np.testing.assert_array_equal(image, original.astype(np.float32))


def test_val_and_test_share_no_file_and_record_their_split(tmp_path):
    pack(make(tmp_path / "dataset"), tmp_path / "out", test_fraction=0.25, seed=3)
    val, test = (open_npz(tmp_path / "out" / f"{split}.npz") for split in ("val", "test"))
    assert len(val.labels) == 9 and len(test.labels) == 3
    assert not set(val.info["files"]) & set(test.info["files"])
    assert val.info["split"] == test.info["split"] == {"seed": 3, "test_fraction": 0.25}


def test_split_is_stratified_and_a_function_of_the_seed():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    first, second = split_indices(labels, 0.5, 0)
    assert np.bincount(labels[second]).tolist() == [5, 10, 15]
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(60))
    np.testing.assert_array_equal(second, split_indices(labels, 0.5, 0)[1])
    assert (second != split_indices(labels, 0.5, 1)[1]).any()


def test_files_are_in_numerical_order(tmp_path):
    make(tmp_path, train=11, val=1)
    files, _ = list_folder(tmp_path / "train", CLASSES)
    assert [f.stem for f in files[:11]] == [str(i) for i in range(1, 12)]


def test_other_class_names(tmp_path):
    make(tmp_path / "dataset", classes=("a", "b"))
    pack(tmp_path / "dataset", tmp_path / "out", classes=("b", "a"))
    assert open_npz(tmp_path / "out" / "val.npz").classes == ("b", "a")


def test_float16(tmp_path):
    pack(make(tmp_path / "dataset"), tmp_path / "out", dtype="float16")
    assert open_npz(tmp_path / "out" / "train.npz").images.dtype == np.float16


def test_val_alone_is_packed(tmp_path):
    make(tmp_path / "dataset")
    (tmp_path / "dataset" / "train").rename(tmp_path / "elsewhere")
    assert pack(tmp_path / "dataset", tmp_path / "out") == {"val": 6, "test": 6}


def spoil_shape(root):
    np.save(root / "val" / "vort" / "4.npy", np.zeros((1, 8, 9)))


def spoil_nan(root):
    np.save(root / "val" / "vort" / "4.npy", np.full((1, 8, 8), np.nan))


def spoil_object(root):
    np.save(root / "val" / "vort" / "4.npy", np.array([{}, 1]), allow_pickle=True)


def spoil_truncated(root):
    path = root / "val" / "vort" / "4.npy"
    path.write_bytes(path.read_bytes()[:-8])


def spoil_empty(root):
    for file in (root / "val" / "vort").iterdir():
        file.unlink()


def spoil_large(root):
    np.save(root / "val" / "vort" / "4.npy", np.full((1, 8, 8), 1e6))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_shape, r"4\.npy: image has shape \(1, 8, 9\), expected \(1, 8, 8\) or \(8, 8\)"),
        (spoil_nan, r"4\.npy: image has NaN or infinite pixels"),
        (spoil_object, r"4\.npy holds Python objects, which are never unpickled"),
        (spoil_truncated, r"4\.npy announces shape \(1, 8, 8\) of float64, but header and data have 632 bytes"),
        (spoil_empty, r"val.vort: no \.npy files there; expected one folder for each of the classes no, sphere, vort"),
        (spoil_large, r"4\.npy: pixels overflow float16; use --dtype float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_bad_images_are_refused_and_leave_no_half_written_file(tmp_path, spoil, message):
    make(tmp_path / "dataset", train=0, val=4)
    (tmp_path / "dataset" / "train").rename(tmp_path / "elsewhere")
    spoil(tmp_path / "dataset")
    with pytest.raises(InputError, match=message):
        pack(tmp_path / "dataset", tmp_path / "out", dtype="float16", test_fraction=0)
    assert not list(tmp_path.glob("out/*"))


def test_existing_files_are_not_overwritten(tmp_path):
    pack(make(tmp_path / "dataset"), tmp_path / "out")
    with pytest.raises(InputError, match=r"train\.npz exists; remove it"):
        pack(tmp_path / "dataset", tmp_path / "out")


def test_a_folder_without_train_and_val_is_refused(tmp_path):
    with pytest.raises(InputError, match="has neither train/ nor val/"):
        pack(tmp_path, tmp_path / "out")


def test_load_folder(tmp_path):
    make(tmp_path)
    dataset = load_folder(tmp_path / "train", CLASSES)
    assert dataset.images.shape == (6, 8, 8) and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    image = load_image(tmp_path / "train" / "sphere" / "1.npy")
    np.testing.assert_array_equal(dataset.images[2], image.astype(np.float32))
