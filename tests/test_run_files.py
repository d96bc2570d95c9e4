import json
from dataclasses import replace

import numpy as np
import pytest

from gravlens_jax import run_files
from helpers import TINY, TINY_INFO, assert_equal, refuse


def test_run_directory_is_created_once_and_keeps_its_config(tmp_path):
    info = TINY_INFO._replace(config=replace(TINY, data="somewhere"), classes=("a", "b"))
    run_files.create_run(tmp_path, TINY_INFO)
    run_files.create_run(tmp_path, info)  # the one before was never saved
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    refuse("already holds a run; continue it with --resume", run_files.create_run, tmp_path, TINY_INFO)
    assert run_files.read_run(tmp_path) == info


def test_only_a_run_of_the_same_config_is_resumed(tmp_path):
    run_files.create_run(tmp_path, TINY_INFO)
    run_files.check_resumable(tmp_path, replace(TINY, run_dir="elsewhere", device_data=True))
    deeper = replace(TINY, model=replace(TINY.model, depth=14))
    refuse(r"--model\.depth is 14 but the run to resume has 8", run_files.check_resumable, tmp_path, deeper)
    longer, cosine = replace(TINY, epochs=9), "cosine schedule ends .* new run with --epochs 9; .* constant"
    refuse(f"has 3, and its {cosine}", run_files.check_resumable, tmp_path, longer)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["config"]["deflection_weight"]  # of another version
    (tmp_path / "config.json").write_text(json.dumps(values))
    refuse("'deflection_weight' is missing", run_files.check_resumable, tmp_path, TINY)


def test_place_of_the_data_and_number_of_epochs_may_change(tmp_path):
    before = replace(TINY, data="gone", optim=replace(TINY.optim, decay="constant"))
    run_files.create_run(tmp_path, TINY_INFO._replace(config=before))
    (tmp_path / "train.npz").touch()
    simulation = replace(TINY.simulation, folder="/elsewhere")
    config = replace(before, data=str(tmp_path), simulation=simulation, epochs=9, run_dir="another")
    run_files.check_resumable(tmp_path, config)
    run_files.update_run(tmp_path, TINY_INFO._replace(config=config))
    assert run_files.read_run(tmp_path).config == replace(config, run_dir=TINY.run_dir)
    gone = r"gone.train\.npz: no such file; .* give .* --data"
    refuse(gone, run_files.check_resumable, tmp_path, before)
    refuse("--data is sim", run_files.check_resumable, tmp_path, replace(before, data="simulate:ct1"))


@pytest.mark.parametrize("damage", [b'{"step"', b'{"step": "\xff"}', b'{"epoch": 1}', b"3"])
def test_history_ends_at_the_saved_step_also_without_its_damaged_line(tmp_path, damage):
    path, lines = tmp_path / "metrics.jsonl", [b'{"step": 3}\n', b'{"step": 9}\n']
    assert run_files.read_history(tmp_path) == []
    path.write_bytes(lines[0] + damage + b"\n" + lines[1])
    refuse(r"metrics\.jsonl has a damaged line .* remove the file or that", run_files.read_history, tmp_path, 6)
    path.write_bytes(b"".join(lines))
    assert run_files.read_history(tmp_path) == [{"step": 3}, {"step": 9}]
    assert run_files.read_history(tmp_path, 6) == [{"step": 3}]
    path.write_bytes(b"".join(lines) + damage)  # after what was never saved
    assert run_files.read_history(tmp_path, 6) == [{"step": 3}]


def test_calibrations_belong_to_steps_and_damaged_ones_are_refused(tmp_path):
    assert run_files.read_calibration(tmp_path, 2) == (1.0, {})
    run_files.write_calibration(tmp_path, {2: (2.5, {"a/b": np.ones(2)}), 23: (3.0, {})})
    assert_equal(run_files.read_calibration(tmp_path, 2), (2.5, {"a/b": np.ones(2)}))
    assert [run_files.read_calibration(tmp_path, step) for step in (3, 23)] == [(1.0, {}), (3.0, {})]
    damages = ({"temperature": x} for x in (np.zeros(()), np.array(np.nan), np.ones(1), np.array("x")))
    for damage in (*damages, {"a": np.ones(2)}, {"temperature": np.ones(()), "a": np.array([1, np.inf])}):
        np.savez(tmp_path / "calibration.npz", **{f"2/{name}": x for name, x in damage.items()})
        refuse(r"calibration\.npz", run_files.read_calibration, tmp_path, 2)
