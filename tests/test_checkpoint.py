import itertools
import re
import shutil
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gravlens_jax import checkpoint
from gravlens_jax.run_files import create_run
from helpers import TINY_INFO, TINY_MODEL, assert_equal, make_run, make_state, make_variables, refuse


def steps(run_dir):
    return sorted(f.name for f in (run_dir / "checkpoints").iterdir())


def test_latest_state_is_restored_exactly_with_the_sums_of_its_epoch(tmp_path):
    state = make_state(3)
    state = state._replace(sums=state.sums | {"loss": jnp.float32(0.1), "count": jnp.int32(8)})
    make_run(tmp_path, [0.3, 0.5])
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert_equal(checkpoint.restore_latest(manager, make_state(0)), make_state(2))
        checkpoint.save(manager, state)
        assert_equal(checkpoint.restore_latest(manager, make_state(0)), state)


@pytest.mark.parametrize(
    "losses, kept",
    [
        ([0.5, 0.3, 0.4, 0.45], ["2", "4"]),
        ([0.5, None, None], ["1", "3"]),  # a save within an epoch replaces the one before, and is never the best
        ([0.5, None, 0.3], ["3"]),
        ([None, None], ["2"]),
    ],
)
def test_only_the_best_and_the_latest_are_kept(tmp_path, losses, kept):
    make_run(tmp_path, losses)
    assert steps(tmp_path) == kept
    for which, step in (("best", int(kept[0])), ("final", int(kept[-1]))):
        variables, found = checkpoint.load_variables(tmp_path, TINY_MODEL, which)
        assert found == step
        assert_equal(variables, make_variables(step))


def test_damaged_file_is_refused_and_the_other_checkpoint_loads(tmp_path, monkeypatch):
    make_run(tmp_path, [0.3, 0.4])
    folder = tmp_path / "checkpoints/2"
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size and f.name != "digests.json")
    rng = np.random.default_rng(0)
    one_kind_each = zip(files, itertools.cycle(("flip", "cut", "missing")), strict=False)
    for file, damage in (*one_kind_each, (folder / "digests.json", "flip"), (folder / "digests.json", "cut")):
        whole = file.read_bytes()
        part = bytearray(whole)
        part[rng.integers(len(part))] ^= 0x10
        file.unlink()
        if damage != "missing":
            file.write_bytes(part if damage == "flip" else whole[: len(whole) // 2])
        message = r"checkpoints.2 is damaged.*Remove it to continue from step 1"
        refuse(message, checkpoint.load_variables, tmp_path, TINY_MODEL, "final")
        if "metrics" not in str(file) and file.name != "digests.json":  # Orbax reads the metrics of every checkpoint
            checkpoint.load_variables(tmp_path, TINY_MODEL, "best")
        file.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "verify_digests", Mock(side_effect=PermissionError(13, "Permission denied")))
        refuse("cannot be read: .*Permission denied; fix", checkpoint.load_variables, tmp_path, TINY_MODEL, "final")
    shutil.rmtree(folder)
    assert checkpoint.load_variables(tmp_path, TINY_MODEL, "final")[1] == 1


def test_checkpoint_is_renamed_before_it_is_removed_and_read_without_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # as if killed at that moment
    make_run(tmp_path, [0.5, 0.4])
    (tmp_path / "checkpoints/2/digests.json").unlink()  # as if killed before it was written
    assert steps(tmp_path) == ["2", "removed"]
    assert_equal(checkpoint.load_variables(tmp_path, TINY_MODEL)[0], make_variables(2))
    monkeypatch.undo()
    checkpoint.remove_leftovers(tmp_path)
    assert steps(tmp_path) == ["2"]


def test_run_without_a_checkpoint_is_an_input_error_and_imported_variables_are_best_and_final(tmp_path):
    create_run(tmp_path, TINY_INFO)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert checkpoint.restore_latest(manager, TINY_INFO) is TINY_INFO
    refuse("has no checkpoint yet", checkpoint.load_variables, tmp_path, TINY_MODEL)
    checkpoint.save_variables(tmp_path, make_variables(1))
    for which in ("best", "final"):
        assert_equal(checkpoint.load_variables(tmp_path, TINY_MODEL, which)[0], make_variables(1))


def test_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    make_run(tmp_path, [0.5])
    find_best = ocp.CheckpointManager.best_step

    def find_best_and_replace_it(manager):
        step = find_best(manager)
        monkeypatch.undo()
        with checkpoint.open_checkpoints(tmp_path) as training:
            checkpoint.save(training, make_state(2), 0.4)
        return step

    monkeypatch.setattr(ocp.CheckpointManager, "best_step", find_best_and_replace_it)
    variables, step = checkpoint.load_variables(tmp_path, TINY_MODEL)
    assert step == 2 and steps(tmp_path) == ["2"]
    assert_equal(variables, make_variables(2))


@pytest.mark.parametrize("change", [lambda x: x[None], lambda x: x.astype(jnp.float16)], ids=["shape", "dtype"])
def test_variables_and_optimizer_state_of_another_network_are_refused(tmp_path, change):
    make_run(tmp_path, [0.5])
    message = "variables/.* expected .* not of the network and optimizer in config.json"
    for other in (TINY_MODEL.clone(depth=14), TINY_MODEL.clone(width=8)):
        refuse(message, checkpoint.load_variables, tmp_path, other)
    state = make_state(1)
    (*others, (path, leaf)), structure = jax.tree.flatten_with_path(state.opt_state)
    changed = jax.tree.unflatten(structure, [*(x for _, x in others), change(leaf)])
    name = "training/opt_state/" + jax.tree_util.keystr(path, simple=True, separator="/")
    message = rf"checkpoints/1: {re.escape(name)} is \(.*, expected \(.* start a new run$"
    with checkpoint.open_checkpoints(tmp_path) as manager:
        refuse(message, checkpoint.restore_latest, manager, state._replace(opt_state=changed))
