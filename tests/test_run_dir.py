import os
import subprocess
import sys
from dataclasses import replace

import pytest

from gravlens_jax import run_dir
from gravlens_jax.errors import InputError
from test_checkpoint import CONFIG, INFO


def test_config_survives_the_run_directory(tmp_path):
    info = INFO._replace(config=replace(CONFIG, data="somewhere"), classes=("a", "b"))
    run_dir.create_run(tmp_path, info)
    assert run_dir.read_run(tmp_path) == info


def test_directory_that_holds_a_run_is_refused(tmp_path):
    run_dir.create_run(tmp_path, INFO)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        run_dir.create_run(tmp_path, INFO)


def test_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run \(no config\.json\)"):
        run_dir.read_run(tmp_path / "absent")


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


def test_second_process_on_a_run_directory_is_refused(tmp_path):
    code = f"""
from pathlib import Path
from gravlens_jax import run_dir
with run_dir.locked(Path({str(tmp_path)!r})):
    pass
"""
    with run_dir.locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert other.returncode and f"is in use by another process (process {os.getpid()} on" in other.stderr
    with run_dir.locked(tmp_path):  # it is free again
        pass


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
    assert run_dir.read_temperature(tmp_path, 2) == 2.5 and run_dir.read_temperature(tmp_path, 3) == 1.0
    for damage in ('{"2": 0.0}', "[1]", '{"2": "x"}', "{"):
        (tmp_path / "calibration.json").write_text(damage)
        with pytest.raises(InputError, match=r"calibration\.json"):
            run_dir.read_temperature(tmp_path, 2)


def test_file_is_complete_or_unchanged(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(TypeError):
        run_dir.write_atomically(tmp_path / "a", 3)
    assert (tmp_path / "a").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
