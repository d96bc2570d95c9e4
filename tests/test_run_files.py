import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from gravlens_jax import run_dir
from gravlens_jax.config import CLASSES
from gravlens_jax.datasets import fingerprint
from gravlens_jax.errors import InputError
from gravlens_jax.npz import Dataset
from test_checkpoint import CONFIG, INFO


def test_run_directory_is_created_once_and_keeps_its_config(tmp_path):
    info = INFO._replace(config=replace(CONFIG, data="somewhere"), classes=("a", "b"))
    run_dir.create_run(tmp_path, INFO)
    run_dir.create_run(tmp_path, info)  # the one before was never saved
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        run_dir.create_run(tmp_path, INFO)
    assert run_dir.read_run(tmp_path) == info


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": {}, "classes": [], "image_shape": [1, 2]}'])
def test_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        run_dir.read_run(tmp_path)


def test_only_a_run_of_the_same_config_is_resumed(tmp_path):
    run_dir.create_run(tmp_path, INFO)
    run_dir.check_resumable(tmp_path, replace(CONFIG, run_dir="elsewhere", device_data=True))
    with pytest.raises(InputError, match=r"--model\.depth is 14 but the run to resume has 8"):
        run_dir.check_resumable(tmp_path, replace(CONFIG, model=replace(CONFIG.model, depth=14)))


def test_place_of_the_data_and_number_of_epochs_may_change(tmp_path):
    before = replace(CONFIG, data="gone", optim=replace(CONFIG.optim, decay="constant"))
    run_dir.create_run(tmp_path, INFO._replace(config=before))
    (tmp_path / "train.npz").touch()
    simulation = replace(CONFIG.simulation, folder="/elsewhere")
    config = replace(before, data=str(tmp_path), simulation=simulation, epochs=9, run_dir="another")
    run_dir.check_resumable(tmp_path, config)
    run_dir.update_run(tmp_path, INFO._replace(config=config))
    assert run_dir.read_run(tmp_path).config == replace(config, run_dir=CONFIG.run_dir)
    for data, message in (
        ("gone", r"gone.train\.npz: no such file; .* give .* --data"),
        ("simulate:ct1", "--data is sim"),
    ):
        with pytest.raises(InputError, match=message):
            run_dir.check_resumable(tmp_path, replace(before, data=data))


def test_more_epochs_than_a_cosine_schedule_was_made_for_are_refused(tmp_path):
    run_dir.create_run(tmp_path, INFO)
    with pytest.raises(
        InputError, match=r"has 3, and its cosine schedule ends .* new run with --epochs 9; .* constant"
    ):
        run_dir.check_resumable(tmp_path, replace(CONFIG, epochs=9))


def test_run_is_resumed_with_the_images_it_began_with(tmp_path):
    images = np.random.default_rng(0).integers(9, size=(70, 16, 16)).astype(np.uint16)
    dataset = Dataset(images, np.zeros(70, np.int32), CLASSES, {})
    info = INFO._replace(data={"train": fingerprint(dataset)})
    run_dir.create_run(tmp_path, info)
    run_dir.check_same_images(tmp_path, info)
    changed = np.where(np.arange(70)[:, None, None] == 69, 0, images).astype(np.uint16)
    for other in (
        dataset._replace(images=changed),
        dataset._replace(images=images.astype(np.uint32)),
        dataset._replace(labels=dataset.labels + 1),
        dataset._replace(classes=("a", "b", "c")),
    ):
        with pytest.raises(InputError, match=r"train\.npz does not hold the images that the run began with"):
            run_dir.check_same_images(tmp_path, info._replace(data={"train": fingerprint(other)}))
    with pytest.raises(InputError, match=r"easy\.npz does not hold"):
        run_dir.check_same_images(tmp_path, info._replace(data=info.data | {"easy": ""}))


def test_run_of_version_0_6_cannot_be_resumed(tmp_path):
    run_dir.create_run(tmp_path, INFO)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["config"]["deflection_weight"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"is of gravlens_jax 0\.6 or older; such runs can be evaluated but not"):
        run_dir.check_resumable(tmp_path, INFO.config)


def test_run_with_other_classes_cannot_be_resumed(tmp_path):
    run_dir.create_run(tmp_path, INFO)
    with pytest.raises(InputError, match=r"has \('a',\) in images"):
        run_dir.check_same_images(tmp_path, INFO._replace(classes=("a",)))


def test_run_directory_in_use_is_refused(tmp_path):
    code = (
        "import sys, pathlib; from gravlens_jax import run_dir; run_dir.locked(pathlib.Path(sys.argv[1])).__enter__()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with run_dir.locked(tmp_path):
        other = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert other.returncode and f"is in use by another process (process {os.getpid()} on" in other.stderr
    run_dir.locked(tmp_path).__enter__()  # it is free again


def test_folder_in_use_is_waited_for_if_asked(tmp_path, capsys):
    with ThreadPoolExecutor(1) as pool:
        with run_dir.locked(tmp_path):
            waiting = pool.submit(run_dir.locked(tmp_path, wait=True).__enter__)
            while not (err := capsys.readouterr().err):
                assert not waiting.done()
        waiting.result(timeout=60)
    assert err == f"{tmp_path} is in use by another process (process {os.getpid()} on {os.uname().nodename}); " + (
        "waiting until it is done\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_an_input_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), run_dir.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("damage", [b'{"epo', b'{"epoch": "\xff"}'])
def test_damaged_line_of_the_history_is_an_input_error(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n' + damage)
    with pytest.raises(InputError, match=r"metrics\.jsonl has a damaged line"):
        run_dir.read_history(tmp_path)
    assert run_dir.read_history(tmp_path, 1) == [{"epoch": 1}]


def test_temperatures_belong_to_steps(tmp_path):
    assert run_dir.read_temperature(tmp_path, 2) == 1.0
    run_dir.write_calibration(tmp_path, {2: (2.5, None)})
    assert [run_dir.read_temperature(tmp_path, step) for step in (2, 3)] == [2.5, 1.0]


@pytest.mark.parametrize("damage", ['{"2": 0.0}', "[1]", '{"2": "x"}', "{"])
def test_damaged_temperatures_are_refused(tmp_path, damage):
    (tmp_path / "calibration.json").write_text(damage)
    with pytest.raises(InputError, match=r"calibration\.json"):
        run_dir.read_temperature(tmp_path, 2)


def test_file_is_complete_or_unchanged(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(TypeError):
        run_dir.write_atomically(tmp_path / "a", 3)
    assert (tmp_path / "a").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
