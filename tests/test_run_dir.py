import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gravlens_jax import run_dir
from gravlens_jax.errors import InputError
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
    run_dir.write_temperatures(tmp_path, {2: 2.5})
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
