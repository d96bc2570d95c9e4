import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import checkpoint
from gravlens_jax.config import CLASSES, Config, InputConfig, InputError, ModelConfig
from gravlens_jax.model import make_model
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import init_state

CONFIG = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=1))
INFO = checkpoint.RunInfo(CONFIG, CLASSES, (16, 16))


def make_state(step):
    model = make_model(CONFIG.model, CONFIG.input, CLASSES)
    state = init_state(step, model, make_optimizer(CONFIG.optim, 10), CONFIG.optim)
    return state._replace(step=jnp.int32(step))


def make_run(run_dir, losses):
    checkpoint.create_run(run_dir, INFO)
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
        assert_equal(checkpoint.restore_state(manager, make_state(0)), make_state(3))


def test_only_best_and_final_are_kept(tmp_path):
    make_run(tmp_path, [0.5, 0.3, 0.4, 0.45])
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    for which, step in (("best", 2), ("final", 4)):
        model, variables = checkpoint.load_run(tmp_path, which)
        assert model == make_model(CONFIG.model, CONFIG.input, CLASSES)
        assert_equal(variables, {"params": make_state(step).params, "batch_stats": make_state(step).batch_stats})


def test_nothing_saved_is_none(tmp_path):
    checkpoint.create_run(tmp_path, INFO)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert checkpoint.restore_state(manager, make_state(0)) is None
    with pytest.raises(InputError, match="has no checkpoint yet"):
        checkpoint.load_run(tmp_path)


def test_a_network_trained_elsewhere_is_best_and_final(tmp_path):
    checkpoint.create_run(tmp_path, INFO)
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


def test_a_run_directory_in_use_is_refused(tmp_path):
    checkpoint.create_run(tmp_path, INFO)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        checkpoint.create_run(tmp_path, INFO)


def test_config_survives_the_run_directory(tmp_path):
    info = INFO._replace(config=replace(CONFIG, data="somewhere"), classes=("a", "b"))
    checkpoint.create_run(tmp_path, info)
    assert checkpoint.read_run(tmp_path) == info


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": {}, "classes": [], "image_shape": [1, 2]}'])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoint.read_run(tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run \(no config\.json\)"):
        checkpoint.load_run(tmp_path / "absent")
