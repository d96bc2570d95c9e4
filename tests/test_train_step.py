from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import sharding
from gravlens_jax.config import AugmentConfig, Config, InputConfig, OptimConfig
from gravlens_jax.metrics import mean_metrics
from gravlens_jax.model import ResNet
from gravlens_jax.optim import make_optimizer
from gravlens_jax.preprocess import prepare, to_unit
from gravlens_jax.train_step import DEFLECTION_UNIT, end_epoch, eval_step, init_state, train_step, train_steps
from helpers import make_bars

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear"))
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, decay="constant")
OPTIONS = {"model": MODEL, "tx": make_optimizer(OPTIM, 100), "config": Config()}
STEP = jax.jit(partial(train_step, **OPTIONS))
INIT = partial(init_state, model=MODEL, tx=OPTIONS["tx"], config=OPTIM)
make_state = jax.jit(INIT)
STILL = Config(augment=AugmentConfig(flip=False))
STEP_WITHOUT_FLIPS = jax.jit(partial(train_step, **OPTIONS | {"config": STILL}))
make_auxiliary_state = jax.jit(partial(INIT, auxiliary=True))


def make_batch(n=8):
    return dict(zip(("images", "labels"), make_bars(n, 3), strict=True))


def assert_close(a, b, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_learns_with_float32_parameters_in_either_activation_dtype(dtype):
    step = jax.jit(partial(train_step, **OPTIONS | {"model": MODEL.clone(dtype=dtype)}), donate_argnums=0)
    state, losses = make_state(0), []
    assert (state.params["head"]["kernel"] != make_state(1).params["head"]["kernel"]).any()  # a seed chooses it
    for _ in range(30):
        state, sums = step(state, make_batch())
        losses.append(float(sums["loss"]))
    assert losses[-1] - losses[-2] < losses[0] / 4  # the sums run
    assert int(state.step) == 30 and step._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {jnp.dtype("float32")}


def test_auxiliary_head_learns_deflections_and_changes_the_network():
    batch, maps = make_batch(), np.zeros((8, 4, 4, 2), np.float32)
    maps[batch["labels"] == 1, ..., 0] = DEFLECTION_UNIT
    state = first = make_auxiliary_state(0)
    for _ in range(120):
        state, _ = STEP_WITHOUT_FLIPS(state, batch | {"deflections": maps})
    assert STEP_WITHOUT_FLIPS._cache_size() == 1

    @jax.jit
    def error(state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        _, feature_maps = MODEL.apply(variables, prepare(to_unit(batch["images"]), MODEL.input))
        return jnp.mean((feature_maps[-1] @ state.auxiliary["kernel"] - maps / DEFLECTION_UNIT) ** 2)

    assert error(state) < error(first) / 4
    unweighted = jax.jit(partial(train_step, **OPTIONS | {"config": replace(STILL, deflection_weight=0.0)}))
    with_loss, without = (step(state, batch | {"deflections": maps})[0] for step in (STEP_WITHOUT_FLIPS, unweighted))
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, with_loss, without)
    assert changed.params["conv0"]["kernel"] and changed.auxiliary["kernel"]


def test_deflections_count_where_there_is_light():
    batch, state = make_batch(), make_auxiliary_state(0)
    batch["images"] = np.zeros_like(batch["images"])
    batch["images"][:, :4] = 100  # the light of the first row of cells
    changes = []
    for row in (0, 3):
        maps = np.zeros((8, 4, 4, 2), np.float32)
        maps[:, row] = DEFLECTION_UNIT
        changes.append(np.abs(STEP_WITHOUT_FLIPS(state, batch | {"deflections": maps})[0].auxiliary["kernel"]).max())
    assert changes[0] > 0 and changes[1] == 0


def test_sums_run_until_the_epoch_ends_and_survive_the_donation_of_the_state():
    step = jax.jit(partial(train_step, **OPTIONS), donate_argnums=0)
    donated, first = step(make_state(0), make_batch())
    state, second = step(donated, make_batch())
    assert donated.step.is_deleted() and mean_metrics(first)[0] > 0
    assert int(first["count"]) == 8 and int(second["count"]) == 16
    assert float(second["loss"]) > float(first["loss"]) and float(second["gradient"]) > float(first["gradient"])
    assert not any(end_epoch(state, None, config=OPTIM).sums.values())


def test_steps_on_device_data_equal_steps_on_batches():
    images, steps = make_batch(12), np.random.default_rng(0).permutation(12).reshape(3, 4)
    one_by_one = make_state(0)
    for rows in steps:
        one_by_one, _ = STEP(one_by_one, {name: array[rows] for name, array in images.items()})
    together, _ = jax.jit(partial(train_steps, **OPTIONS))(make_state(0), images | {"rows": steps})
    assert_close(together, one_by_one, rtol=1e-3, atol=1e-5)  # another program, in which rounding differs


def test_plateau_scales_the_update_after_patience_epochs_without_improvement():
    step, end = jax.jit(partial(train_step, **OPTIONS)), jax.jit(partial(end_epoch, config=OPTIM))
    full = reduced = sharding.replicate(make_state(0), sharding.data_mesh(1))
    for _ in range(OPTIM.plateau_patience + 2):
        reduced = end(reduced, 1.0)
    before = full.params["head"]["kernel"]
    moves = [step(state, make_batch())[0].params["head"]["kernel"] - before for state in (full, reduced)]
    np.testing.assert_allclose(moves[1], moves[0] * OPTIM.plateau_factor, rtol=1e-3, atol=1e-7)
    assert step._cache_size() == end._cache_size() == 1
    assert end_epoch(full, None, config=OPTIM).plateau is full.plateau


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_evaluation_counts_masked_examples_only(keep):
    evaluate = jax.jit(partial(eval_step, model=MODEL))
    padded = make_batch() | {"mask": np.arange(8) < keep}
    whole = {name: value[:keep] for name, value in padded.items()}
    assert_close(evaluate(make_state(0), padded), evaluate(make_state(0), whole), rtol=1e-5)
