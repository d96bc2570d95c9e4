"""predict.py and evaluate.py on files of all kinds, with a tiny network."""

import csv
import io
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from astropy.io import fits

import evaluate
from gravlens_jax import convergence, predict, predict_deflection
from gravlens_jax.folders import Planes
from gravlens_jax.network import describe, write_network
from gravlens_jax.npz import scale
from helpers import limited_memory, make_mapping_network, make_network, refuse, save_npz
from predict import find_images, main, predict_files

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 20, 20))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder images/ in the working directory, beside a network net.npz."""
    write_network(tmp_path / "net.npz", make_network(20), describe(make_network(20)))
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return Path("images")


def rows(out):
    """Returns file -> probability of the class `no` from a CSV text."""
    return {row["file"]: float(row["p_no"]) for row in csv.DictReader(io.StringIO(out))}


def test_stacks_fits_and_npz_with_any_labels_are_predicted_like_single_images(folder, capsys):
    for i, image in enumerate(IMAGES):
        np.save(folder / f"{i}.npy", image)
    np.save(folder / "stack.npy", IMAGES[..., None])
    (folder / "stack.npy").rename(folder / "STACK.NPY")
    fits.PrimaryHDU(IMAGES[0]).writeto(folder / "a.fits.gz")
    np.savez_compressed(folder / "x.npz", X=IMAGES[:2], y=np.eye(2), z=1)
    refuse(r"STACK\.NPY: 3 planes .* give --band 0 to 2, or --stack", main, Path("net.npz"), (folder,))
    capsys.readouterr()
    main(Path("net.npz"), (folder,), planes=Planes(stack=True))
    out, err = capsys.readouterr()
    names = ["0.npy", "1.npy", "2.npy", "STACK.NPY[0]", "STACK.NPY[1]", "STACK.NPY[2]", "a.fits.gz", "x.npz[0]"]
    assert list(rows(out)) == [f"images/{name}" for name in [*names, "x.npz[1]"]]
    found = list(rows(out).values())
    np.testing.assert_allclose(found, [found[i] for i in (0, 1, 2, 0, 1, 2, 0, 0, 1)], atol=2e-6)
    assert len(set(found[:3])) == 3 and "x.npz: images are 'X'" in err and "left out: z" in err
    for row in csv.DictReader(io.StringIO(out)):
        probabilities = {name: float(row[f"p_{name}"]) for name in ("no", "sphere", "vort")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(probabilities, key=probabilities.get)


def test_maps_of_the_substructure_are_written_with_their_grid_and_names(folder, capsys):
    np.save(folder / "a.npy", IMAGES[0])
    refuse("the network predicts no deflections", main, Path("net.npz"), (folder,), maps=Path("maps.npz"))
    mapping = make_mapping_network(0.1, 20)
    write_network(Path("maps_net.npz"), mapping, describe(mapping))
    main(Path("maps_net.npz"), (folder,), maps=Path("maps.npz"))
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    with np.load("maps.npz") as found:
        deflection = predict_deflection(*mapping, IMAGES[:1])
        np.testing.assert_allclose(found["deflection"], deflection, atol=1e-6)
        np.testing.assert_allclose(found["convergence"], convergence(deflection, 0.4), atol=1e-5)
        assert found["files"].tolist() == ["images/a.npy"] and found["x"].shape == found["y"].shape == (4, 4)
        assert float(row["peak_convergence"]) == pytest.approx(found["convergence"].max(), abs=1e-4)


def test_linked_folders_are_searched_once_and_unread_files_are_named(folder, capsys, monkeypatch):
    for name in ("images/sub", "elsewhere/__MACOSX", "elsewhere/.ipynb_checkpoints"):
        Path(name).mkdir(parents=True)
    os.symlink("../elsewhere", folder / "link")
    os.symlink("..", folder / "sub/up")
    for name in ("1", "link/2", "sub/3", "._0", "link/__MACOSX/._2", "link/.ipynb_checkpoints/4"):
        np.save(folder / f"{name}.npy", IMAGES[0])
    for name in ("a.png", "link/b.txt", ".DS_Store", "link/.DS_Store"):
        (folder / name).touch()
    assert list(map(str, find_images([folder]))) == ["images/1.npy", "images/link/2.npy", "images/sub/3.npy"]
    assert capsys.readouterr().err == "not read: images/a.png, images/link/b.txt\n"

    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied", "images")))
    refuse(r"^images: Permission denied; fix the permissions", find_images, [folder])


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
    both = r"a\.npy: images\[1\] has NaN.*; .*f\.npy: images\[0\] has NaN"
    refuse(both, main, Path("net.npz"), (folder,), planes=Planes(stack=True))
    assert list(rows(capsys.readouterr().out)) == ["images/g.npy"]
    with pytest.raises(SystemExit) as stop:
        main(Path("net.npz"), (folder,), skip_bad=True, planes=Planes(stack=True))
    out, err = capsys.readouterr()
    good = [f"images/{name}[{i}]" for name in ("a.npy", "b.npz", "e.npy") for i in (0, 2)]
    assert stop.value.code == 3 and list(rows(out)) == [*good, "images/g.npy"]
    skipped = re.findall(r"skipped: .*?(\w\.\w+(?:: images\[\d\])?)", err)
    names = ["a.npy: images[1]", "b.npz: images[1]", "c.npy", "d.fits", "e.npy: images[1]", "f.npy: images[0]"]
    assert skipped == names
    main(Path("net.npz"), (folder / "g.npy",), skip_bad=True)


def test_bad_image_of_many_is_skipped_and_the_others_are_read_in_batches(tmp_path):
    images = np.repeat(RNG.random((1, 20, 20)), 12 * 128 + 1, 0)
    images[300, 2, 3] = np.nan
    path = save_npz(tmp_path / "a.npz", images)
    predict(*make_network(20), images[:128])  # compiles
    with limited_memory(images.nbytes / 3):
        bad, *results = predict_files(make_network(20), [path], skip_bad=True)
    assert re.search(r"a\.npz: images\[300\] has NaN", str(bad[1]))
    assert [name for name, _ in results] == [f"{path}[{row}]" for row in range(len(images)) if row != 300]
    np.testing.assert_allclose([p for _, (p, *_) in results], np.tile(results[0][1][0], (12 * 128, 1)), atol=1e-6)


def test_evaluate_takes_names_of_classes_in_the_order_of_the_labels_and_one_band(folder, monkeypatch):
    found, net, data, classes = [], Path("net.npz"), Path("a.npz"), "vort=axion,no=no_sub,sphere=cdm"
    monkeypatch.setattr("gravlens_jax.report.evaluate_network", lambda _, dataset, **options: found.append(dataset))
    monkeypatch.setattr("gravlens_jax.report.table", lambda *_: "")
    np.savez(data, images=IMAGES, labels=np.arange(3))
    each = "expected a name in the data for each of the network's no, sphere, vort"
    refuse(each, evaluate.main, net, data, classes="no=no_sub,sphere=cdm")
    evaluate.main(net, data, classes=classes)
    for name in ("axion", "cdm", "no_sub"):
        (folder / name).mkdir()
        np.save(folder / name / "1.npy", IMAGES)
    evaluate.main(net, folder, classes=classes, planes=Planes(band=1))
    assert [dataset.labels.tolist() for dataset in found] == [[2, 0, 1], [0, 1, 2]]
    assert {dataset.classes for dataset in found} == {("no", "sphere", "vort")}
    np.testing.assert_allclose(found[1].images, np.repeat([scale(IMAGES[1])], 3, 0))
