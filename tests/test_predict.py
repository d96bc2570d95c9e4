"""predict.py and evaluate.py on files of all kinds, with a tiny network."""

import csv
import io
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import evaluate
from gravlens_jax.config import CLASSES, InputConfig, ModelConfig
from gravlens_jax.errors import InputError
from gravlens_jax.model import make_model, variable_shapes
from gravlens_jax.weights import Network, describe, write_network
from predict import find_images, main

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 20, 20))
MODEL = make_model(ModelConfig(depth=8, width=4), InputConfig(crop=16, pool=1), CLASSES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder images/ in the working directory, beside a network net.npz."""
    variables = jax.tree.map(lambda x: 0.13 * RNG.random(x.shape, np.float32), variable_shapes(MODEL))
    network = Network(MODEL, variables, (20, 20))
    write_network(tmp_path / "net.npz", network, describe(network))
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return Path("images")


def rows(out):
    """Returns file -> probability of the class `no` from a CSV text."""
    return {row["file"]: float(row["p_no"]) for row in csv.DictReader(io.StringIO(out))}


def test_stacks_fits_and_any_labels_are_predicted_as_single_images_are(folder, capsys):
    fits = pytest.importorskip("astropy.io.fits")
    for i, image in enumerate(IMAGES):
        np.save(folder / f"{i}.npy", image)
    np.save(folder / "stack.npy", IMAGES[..., None])
    (folder / "stack.npy").rename(folder / "STACK.NPY")
    fits.PrimaryHDU(IMAGES[0]).writeto(folder / "a.fits.gz")
    np.savez_compressed(folder / "x.npz", X=IMAGES[:2], y=np.eye(2), z=1)
    main(Path("net.npz"), (folder,))
    out, err = capsys.readouterr()
    names = ["0.npy", "1.npy", "2.npy", "STACK.NPY[0]", "STACK.NPY[1]", "STACK.NPY[2]", "a.fits.gz", "x.npz[0]"]
    assert list(rows(out)) == [f"images/{name}" for name in [*names, "x.npz[1]"]]
    found = list(rows(out).values())
    np.testing.assert_allclose(found, [found[i] for i in (0, 1, 2, 0, 1, 2, 0, 0, 1)], atol=2e-6)
    assert len(set(found[:3])) == 3 and "x.npz: images are 'X'; left out: z" in err


def test_linked_folders_are_searched_once_and_unread_files_are_named(folder, capsys):
    for name in ("images/sub", "elsewhere/__MACOSX", "elsewhere/.ipynb_checkpoints"):
        Path(name).mkdir(parents=True)
    os.symlink("../elsewhere", folder / "link")
    os.symlink("..", folder / "sub/up")
    for name in (
        "1.npy",
        "link/2.npy",
        "sub/3.npy",
        "._0.npy",
        "link/__MACOSX/._2.npy",
        "link/.ipynb_checkpoints/4.npy",
    ):
        np.save(folder / name, IMAGES[0])
    for name in ("a.png", "link/b.txt", ".DS_Store", "link/.DS_Store"):
        (folder / name).touch()
    assert list(map(str, find_images([folder]))) == ["images/1.npy", "images/link/2.npy", "images/sub/3.npy"]
    assert capsys.readouterr().err == "not read: images/a.png, images/link/b.txt\n"


def test_an_unreadable_folder_is_an_error(folder, monkeypatch):
    (folder / "sub").mkdir()
    np.save(folder / "1.npy", IMAGES[0])
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"^images/sub: Permission denied; fix the permissions"):
        find_images([folder])


def test_bad_files_and_images_can_be_skipped(folder, capsys):
    bad = IMAGES.copy()
    bad[1, 2, 3] = np.nan
    np.save(folder / "a.npy", bad)
    np.savez(folder / "b.npz", images=bad)
    np.save(folder / "c.npy", IMAGES[0, :16])
    (folder / "d.fits").write_bytes(b"SIMPLE")
    np.save(folder / "e.npy", np.asfortranarray(bad))
    np.save(folder / "f.npy", bad[1])
    np.save(folder / "g.npy", IMAGES[0])
    with pytest.raises(InputError, match=r"a\.npy: images\[1\] has NaN.*; .*f\.npy: images\[0\] has NaN"):
        main(Path("net.npz"), (folder,))
    assert list(rows(capsys.readouterr().out)) == ["images/g.npy"]
    with pytest.raises(SystemExit) as stop:
        main(Path("net.npz"), (folder,), skip_bad=True)
    out, err = capsys.readouterr()
    good = [f"images/{name}[{i}]" for name in ("a.npy", "b.npz", "e.npy") for i in (0, 2)]
    assert stop.value.code == 3 and list(rows(out)) == [*good, "images/g.npy"]
    skipped = re.findall(r"skipped: .*?(\w\.\w+(?:: images\[\d\])?)", err)
    names = ["a.npy: images[1]", "b.npz: images[1]", "c.npy", "d.fits", "e.npy: images[1]", "f.npy: images[0]"]
    assert skipped == names
    main(Path("net.npz"), (folder / "g.npy",), skip_bad=True)


@pytest.mark.parametrize("as_npz", [False, True])
def test_evaluate_renames_classes(folder, as_npz):
    theirs = ("axion", "cdm", "no_sub")  # vort, sphere, no
    for name, image in zip(theirs, IMAGES, strict=True):
        (folder / name).mkdir()
        np.save(folder / name / "1.npy", image)
    data = Path("a.npz") if as_npz else folder
    np.savez("a.npz", images=IMAGES, labels=np.arange(3), classes=np.array(theirs))
    message = "give --classes a name for each of the file's classes" if as_npz else "other ones with --cla"
    with pytest.raises(InputError, match=message):
        evaluate.main(Path("net.npz"), data)
    with pytest.raises(InputError, match="expected a name in the data for each of the network's no, sphere, vort"):
        evaluate.main(Path("net.npz"), data, classes="no=no_sub,sphere=cdm")
    evaluate.main(Path("net.npz"), data, classes="vort=axion,no=no_sub,sphere=cdm", out=Path("out"))
    with np.load("out/predictions.npz") as predictions:
        assert predictions["labels"].tolist() == ([2, 1, 0] if as_npz else [0, 1, 2])
