import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import checkpoint, run
from gravlens_jax.config import CLASSES, Config, InputConfig, InputError, ModelConfig
from gravlens_jax.model import make_model
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import init_state

CONFIG = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=1))
INFO = run.RunInfo(CONFIG, CLASSES, (16, 16))


def make_state(step):
    model = make_model(CONFIG.model, CONFIG.input, CLASSES)
    state = init_state(step, model, make_optimizer(CONFIG.optim, 10), CONFIG.optim)
    return state._replace(step=jnp.int32(step))


def make_run(run_dir, losses):
    run.create_run(run_dir, INFO)
    with checkpoint.open_checkpoints(run_dir) as manager:
        for epoch, loss in enumerate(losses):
            checkpoint.save_state(manager, make_state(epoch + 1), loss)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_restoring_gives_the_last_state_exactly(tmp_path):
    make_run(tmp_path, [0.5, 0.3, 0.4])
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert_equal(checkpoint.restore_state(manager, 3, make_state(0)), (make_state(3), {}))


def test_a_save_within_an_epoch_keeps_its_sums_and_replaces_the_one_before(tmp_path):
    sums = {"loss": 0.1 + 0.2, "correct": 3.0, "count": 8.0}
    with checkpoint.open_partial(tmp_path) as manager:
        for step in (2, 5, 5):
            checkpoint.save_partial(manager, make_state(step), sums)
        assert manager.all_steps() == [5]
        assert_equal(checkpoint.restore_state(manager, 5, make_state(0)), (make_state(5), sums))
        checkpoint.drop_partial(manager)
        assert manager.latest_step() is None


def test_parameters_that_are_not_finite_are_not_saved_within_an_epoch(tmp_path):
    state = make_state(3)
    state.params["head"]["bias"] = jnp.array([0, jnp.nan, 0])
    with checkpoint.open_partial(tmp_path) as manager:
        with pytest.raises(FloatingPointError, match="not finite at step 3"):
            checkpoint.save_partial(manager, state, {})
        assert manager.all_steps() == []


def test_a_damaged_file_of_a_checkpoint_is_refused_and_the_other_checkpoint_loads(tmp_path):
    make_run(tmp_path, [0.3, 0.4])
    folder = tmp_path / "checkpoints/2"
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    rng = np.random.default_rng(0)
    one_kind_each = zip(files, itertools.cycle(("flip", "cut", "missing")), strict=False)
    all_kinds = itertools.product([folder / "digests.json"], ("flip", "cut", "missing"))
    for file, damage in dict.fromkeys([*one_kind_each, *all_kinds]):
        whole = file.read_bytes()
        part = bytearray(whole)
        part[rng.integers(len(part))] ^= 0x10
        file.unlink()
        if damage != "missing":
            file.write_bytes(part if damage == "flip" else whole[: len(whole) // 2])
        if file.name == "digests.json" and damage == "missing":
            checkpoint.load_run(tmp_path, "final")
        else:
            with pytest.raises(InputError, match=r"checkpoints.2 is damaged.*Remove it to go on from step 1"):
                checkpoint.load_run(tmp_path, "final")
        if "metrics" not in str(file) and file.name != "digests.json":  # which opening needs of every checkpoint
            checkpoint.load_run(tmp_path, "best")
        file.write_bytes(whole)
    shutil.rmtree(folder)
    assert_equal(checkpoint.load_run(tmp_path, "final")[1]["params"], make_state(1).params)


def test_a_second_process_on_a_run_directory_is_refused(tmp_path):
    code = f"""
from pathlib import Path
from gravlens_jax import run
with run.locked(Path({str(tmp_path)!r})):
    pass
"""
    with run.locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert other.returncode and f"is in use by another process (process {os.getpid()} on" in other.stderr
    with run.locked(tmp_path):  # it is free again
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), run.locked(tmp_path / "run"):
        pass


def test_a_history_cut_in_mid_line_is_one_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(InputError, match=r"metrics\.jsonl has a damaged line"):
        run.read_history(tmp_path / "metrics.jsonl")
    assert run.read_history(tmp_path / "metrics.jsonl", 1) == [{"epoch": 1}]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": "\xff"}')
    with pytest.raises(InputError, match=r"metrics\.jsonl has a damaged line"):
        run.read_history(tmp_path / "metrics.jsonl")


def test_only_best_and_final_are_kept(tmp_path):
    make_run(tmp_path, [0.5, 0.3, 0.4, 0.45])
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    for which, step in (("best", 2), ("final", 4)):
        model, variables = checkpoint.load_run(tmp_path, which)
        assert model == make_model(CONFIG.model, CONFIG.input, CLASSES)
        assert_equal(variables, {"params": make_state(step).params, "batch_stats": make_state(step).batch_stats})


def test_a_checkpoint_that_is_removed_is_renamed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # as if killed at that moment
    make_run(tmp_path, [0.5, 0.4])
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["2", "removed"]
    assert [f.name for f in (tmp_path / "checkpoints/removed").iterdir()] == ["1"]
    assert_equal(checkpoint.load_run(tmp_path)[1]["params"], make_state(2).params)
    monkeypatch.undo()
    checkpoint.sweep(tmp_path)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_nothing_saved_is_none(tmp_path):
    run.create_run(tmp_path, INFO)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert manager.latest_step() is None
    with pytest.raises(InputError, match="has no checkpoint yet"):
        checkpoint.load_run(tmp_path)


def test_a_network_trained_elsewhere_is_best_and_final(tmp_path):
    run.create_run(tmp_path, INFO)
    variables = {"params": make_state(1).params, "batch_stats": make_state(1).batch_stats}
    checkpoint.save_variables(tmp_path, variables)
    for which in ("best", "final"):
        assert_equal(checkpoint.load_run(tmp_path, which)[1], variables)


@pytest.mark.parametrize("model", [ModelConfig(depth=14, width=4), ModelConfig(depth=8, width=8)])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, model):
    make_run(tmp_path, [0.5])
    other = json.loads((tmp_path / "config.json").read_text())
    other["config"]["model"] |= {"depth": model.depth, "width": model.width}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(
        InputError, match=r"checkpoints.1 is damaged, or not of the network that config\.json describes"
    ):
        checkpoint.load_run(tmp_path)


def test_the_head_is_divided_by_the_temperature_of_its_step(tmp_path):
    make_run(tmp_path, [0.3, 0.4])
    checkpoint.save_temperatures(tmp_path, {2: 2.0})
    for which, step, temperature in (("best", 1, 1.0), ("final", 2, 2.0)):
        _, variables, found = checkpoint.load_calibrated(tmp_path, which)
        expected = make_state(step).params
        np.testing.assert_array_equal(variables["params"]["head"]["kernel"], expected["head"]["kernel"] / temperature)
        np.testing.assert_array_equal(variables["params"]["conv0"]["kernel"], expected["conv0"]["kernel"])
        assert found == temperature
    (tmp_path / "calibration.json").write_text('{"2": 0.0}')
    with pytest.raises(InputError, match=r"calibration\.json is damaged"):
        checkpoint.load_run(tmp_path, "final")


def test_a_run_directory_in_use_is_refused(tmp_path):
    run.create_run(tmp_path, INFO)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        run.create_run(tmp_path, INFO)


def test_config_survives_the_run_directory(tmp_path):
    info = INFO._replace(config=replace(CONFIG, data="somewhere"), classes=("a", "b"))
    run.create_run(tmp_path, info)
    assert run.read_run(tmp_path) == info


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": {}, "classes": [], "image_shape": [1, 2]}'])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        run.read_run(tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run \(no config\.json\)"):
        checkpoint.load_run(tmp_path / "absent")
