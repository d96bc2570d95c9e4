import itertools
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gravlens_jax import checkpoint
from gravlens_jax.config import CLASSES, Config, InputConfig, ModelConfig
from gravlens_jax.errors import InputError
from gravlens_jax.model import make_model
from gravlens_jax.optim import make_optimizer
from gravlens_jax.run_dir import RunInfo, create_run
from gravlens_jax.train_step import init_state

CONFIG = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=1))
INFO = RunInfo(CONFIG, CLASSES, (16, 16))
MODEL = make_model(CONFIG.model, CONFIG.input, CLASSES)


INIT = jax.jit(partial(init_state, model=MODEL, tx=make_optimizer(CONFIG.optim, 10), config=CONFIG.optim))


def make_state(step):
    return INIT(step)._replace(step=jnp.int32(step))


def make_variables(step):
    return {"params": make_state(step).params, "batch_stats": make_state(step).batch_stats}


def make_run(run_dir, losses):
    """Makes a run with a checkpoint of each loss, at steps 1, 2, ...; None is a save within an epoch."""
    create_run(run_dir, INFO)
    with checkpoint.open_checkpoints(run_dir) as manager:
        for epoch, loss in enumerate(losses):
            checkpoint.save(manager, make_state(epoch + 1), loss)


def steps(run_dir):
    return sorted(f.name for f in (run_dir / "checkpoints").iterdir())


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restoring_gives_the_latest_state_exactly(tmp_path):
    make_run(tmp_path, [0.5, 0.3, 0.4])
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert_equal(checkpoint.restore_latest(manager, make_state(0)), make_state(3))


def test_state_saved_within_an_epoch_is_restored_with_its_sums(tmp_path):
    state = make_state(3)
    state = state._replace(sums=state.sums | {"loss": jnp.float32(0.1), "count": jnp.int32(8)})
    make_run(tmp_path, [0.5, None])
    with checkpoint.open_checkpoints(tmp_path) as manager:
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
        variables, found = checkpoint.load_variables(tmp_path, MODEL, which)
        assert found == step
        assert_equal(variables, make_variables(step))


def test_damaged_file_is_refused_and_the_other_checkpoint_loads(tmp_path):
    make_run(tmp_path, [0.3, 0.4])
    folder = tmp_path / "checkpoints/2"
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    rng = np.random.default_rng(0)
    one_kind_each = zip(files, itertools.cycle(("flip", "cut", "missing")), strict=False)
    all_kinds = itertools.product([folder / "digests.json"], ("flip", "cut"))
    for file, damage in dict.fromkeys([*one_kind_each, *all_kinds]):
        if file.name == "digests.json" and damage == "missing":
            continue
        whole = file.read_bytes()
        part = bytearray(whole)
        part[rng.integers(len(part))] ^= 0x10
        file.unlink()
        if damage != "missing":
            file.write_bytes(part if damage == "flip" else whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"checkpoints.2 is damaged.*Remove it to continue from step 1"):
            checkpoint.load_variables(tmp_path, MODEL, "final")
        if "metrics" not in str(file) and file.name != "digests.json":  # Orbax reads the metrics of every checkpoint
            checkpoint.load_variables(tmp_path, MODEL, "best")
        file.write_bytes(whole)
    shutil.rmtree(folder)
    assert checkpoint.load_variables(tmp_path, MODEL, "final")[1] == 1


def test_checkpoint_without_digests_is_read(tmp_path):
    make_run(tmp_path, [0.3])
    (tmp_path / "checkpoints/1/digests.json").unlink()  # the process was killed before it was written
    assert_equal(checkpoint.load_variables(tmp_path, MODEL)[0], make_variables(1))


def test_checkpoint_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # as if killed at that moment
    make_run(tmp_path, [0.5, 0.4])
    assert steps(tmp_path) == ["2", "removed"]
    assert_equal(checkpoint.load_variables(tmp_path, MODEL)[0], make_variables(2))
    monkeypatch.undo()
    checkpoint.remove_leftovers(tmp_path)
    assert steps(tmp_path) == ["2"]


def test_run_without_a_checkpoint_is_an_input_error(tmp_path):
    create_run(tmp_path, INFO)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert checkpoint.restore_latest(manager, INFO) is INFO
    with pytest.raises(InputError, match="has no checkpoint yet"):
        checkpoint.load_variables(tmp_path, MODEL)


def test_imported_variables_are_best_and_final(tmp_path):
    create_run(tmp_path, INFO)
    checkpoint.save_variables(tmp_path, make_variables(1))
    for which in ("best", "final"):
        assert_equal(checkpoint.load_variables(tmp_path, MODEL, which)[0], make_variables(1))


@pytest.mark.parametrize("options", [{"depth": 14, "width": 4}, {"depth": 8, "width": 8}])
def test_checkpoint_of_another_network_is_refused(tmp_path, options):
    make_run(tmp_path, [0.5])
    other = make_model(ModelConfig(**options), CONFIG.input, CLASSES)
    with pytest.raises(InputError, match=r"checkpoints.1 is damaged, or not of the network in config\.json"):
        checkpoint.load_variables(tmp_path, other)


def test_checkpoint_of_version_0_4_is_read_but_not_resumed(tmp_path):
    state = make_state(1)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "training")}
    handlers["sums"] = ocp.JsonCheckpointHandler()
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_handlers=handlers) as manager:
        args = {
            "variables": ocp.args.StandardSave(make_variables(1)),
            "training": ocp.args.StandardSave((state.step, state.opt_state, state.plateau)),
            "sums": ocp.args.JsonSave({}),
        }
        manager.save(1, args=ocp.args.Composite(**args), metrics={"val_loss": 0.5})
    assert_equal(checkpoint.load_variables(tmp_path, MODEL)[0], make_variables(1))
    with (
        checkpoint.open_checkpoints(tmp_path) as manager,
        pytest.raises(InputError, match=r"is damaged, or not of the network in config\.json"),  # `read_run` says why
    ):
        checkpoint.restore_latest(manager, state)
