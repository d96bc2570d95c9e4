from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import sharding
from gravlens_jax.config import AugmentConfig, Config, InputConfig, OptimConfig
from gravlens_jax.model import FEATURES, ResNet, forward
from gravlens_jax.optim import make_optimizer
from gravlens_jax.preprocess import prepare, to_unit
from gravlens_jax.train_step import (
    DEFLECTION_UNIT,
    check_alive,
    end_epoch,
    eval_step,
    init_state,
    mean_metrics,
    train_step,
    train_steps,
    zero_sums,
)

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear", 0.3, 0.2))
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, decay="constant")
TX = make_optimizer(OPTIM, 100)
OPTIONS = {"model": MODEL, "tx": TX, "config": Config()}
STEP = jax.jit(partial(train_step, **OPTIONS))
INIT = jax.jit(partial(init_state, model=MODEL, tx=TX, config=OPTIM))


def make_batch(n=8):
    rng = np.random.default_rng(0)
    labels = np.arange(n, dtype=np.int32) % 3
    images = rng.random((n, 16, 16)) * 0.2
    images[labels == 1, 4:12] += 0.5  # a horizontal bar, which flips leave in place
    images[labels == 2, :, 4:12] += 0.5  # a vertical bar
    return {"images": images.astype(np.float32), "labels": labels}


def make_state(seed=0):
    return INIT(seed)


def assert_close(a, b, **tolerances):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerances)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_learns_with_float32_parameters_in_either_activation_dtype(dtype):
    step = jax.jit(partial(train_step, **OPTIONS | {"model": MODEL.clone(dtype=dtype)}), donate_argnums=0)
    state, losses = make_state(), []
    for _ in range(30):
        state, sums = step(state._replace(sums=zero_sums()), make_batch())
        losses.append(float(sums["loss"]))
    assert losses[-1] < losses[0] / 4
    assert int(state.step) == 30 and step._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {jnp.dtype("float32")}


def test_head_learns_deflections_and_the_network_with_it():
    options = OPTIONS | {"config": Config(augment=AugmentConfig(flip=False))}
    step, batch = jax.jit(partial(train_step, **options)), make_batch()
    maps = np.zeros((8, 4, 4, 2), np.float32)
    maps[batch["labels"] == 1, ..., 0] = DEFLECTION_UNIT
    init = partial(init_state, model=MODEL, tx=TX, config=OPTIM, auxiliary=True)
    state = first = init(0)
    for _ in range(40):
        state, _ = step(state, batch | {"deflections": maps})
    assert step._cache_size() == 1

    def error(state):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        features = forward(MODEL, variables, prepare(to_unit(batch["images"]), MODEL.input), FEATURES)
        return float(jnp.mean((features @ state.auxiliary["kernel"] - maps / DEFLECTION_UNIT) ** 2))

    assert error(state) < error(first) / 4
    unweighted = options | {"config": Config(augment=AugmentConfig(flip=False), deflection_weight=0.0)}
    without = train_step(state, batch | {"deflections": maps}, **unweighted)[0]
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, step(state, batch | {"deflections": maps})[0], without)
    assert changed.params["conv0"]["kernel"] and changed.auxiliary["kernel"]


def test_deflections_count_where_there_is_light():
    batch, state = make_batch(), init_state(0, MODEL, TX, OPTIM, auxiliary=True)
    images = np.zeros_like(batch["images"])
    images[:, :4] = 100  # the light of the first row of cells
    heads = []
    for row in (0, 3):
        maps = np.zeros((8, 4, 4, 2), np.float32)
        maps[:, row] = DEFLECTION_UNIT
        options = OPTIONS | {"config": Config(augment=AugmentConfig(flip=False))}
        heads.append(train_step(state, batch | {"images": images, "deflections": maps}, **options)[0].auxiliary)
    assert np.abs(heads[0]["kernel"]).max() > 0 and not np.abs(heads[1]["kernel"]).max() > 0


def test_steps_and_epoch_ends_compile_once():
    step, end = jax.jit(partial(train_step, **OPTIONS)), jax.jit(partial(end_epoch, config=OPTIM))
    state = sharding.replicate(make_state(), sharding.data_mesh(1))
    for _ in range(3):
        state, _ = step(state, make_batch())
        state = end(state, 1.0)
    assert step._cache_size() == end._cache_size() == 1


def test_sums_run_until_the_epoch_ends():
    state, first = STEP(make_state(), make_batch())
    state, second = STEP(state, make_batch())
    assert int(first["count"]) == 8 and int(second["count"]) == 16
    assert float(second["loss"]) > float(first["loss"]) and float(second["gradient"]) > float(first["gradient"])
    assert_close(end_epoch(state, None, config=OPTIM).sums, zero_sums())


def test_returned_sums_survive_the_donation_of_the_state():
    step = jax.jit(partial(train_step, **OPTIONS), donate_argnums=0)
    state, sums = step(make_state(), make_batch())
    step(state, make_batch())
    assert mean_metrics(sums)[0] > 0 and state.step.is_deleted()


def test_steps_on_device_data_equal_steps_on_batches():
    images, rows = make_batch(12), np.random.default_rng(0).permutation(12).reshape(3, 4)
    one_by_one = make_state()
    for some in rows:
        one_by_one, _ = STEP(one_by_one, {name: array[some] for name, array in images.items()})
    together, _ = jax.jit(partial(train_steps, **OPTIONS))(make_state(), images | {"rows": rows})
    assert_close(together, one_by_one, rtol=1e-3, atol=1e-5)  # another program, in which rounding differs


def test_initial_state_and_steps_are_functions_of_the_seed():
    assert_close(STEP(make_state(), make_batch()), STEP(make_state(), make_batch()), rtol=0)
    a, b = (make_state(seed).params["head"]["kernel"] for seed in (0, 1))
    assert (a != b).any()


def test_plateau_scales_the_update():
    full = make_state()
    half = full._replace(plateau=full.plateau._replace(scale=jnp.float32(0.5)))
    before = full.params["head"]["kernel"]
    moved_full, moved_half = (STEP(state, make_batch())[0].params["head"]["kernel"] - before for state in (full, half))
    np.testing.assert_allclose(moved_half, moved_full / 2, rtol=1e-4, atol=1e-7)


def test_plateau_is_reduced_after_patience_epochs_without_improvement():
    state = make_state()
    for _ in range(OPTIM.plateau_patience + 2):
        state = end_epoch(state, jnp.float32(1.0), config=OPTIM)
    assert float(state.plateau.scale) == pytest.approx(OPTIM.plateau_factor)
    assert end_epoch(state, None, config=OPTIM).plateau is state.plateau


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_evaluation_counts_masked_examples_only(keep):
    padded = make_batch() | {"mask": np.arange(8) < keep}
    whole = {name: value[:keep] for name, value in padded.items()}
    assert_close(eval_step(make_state(), padded, model=MODEL), eval_step(make_state(), whole, model=MODEL), rtol=1e-5)


def test_two_devices_give_the_numbers_of_one():
    single, sums = STEP(make_state(), make_batch())
    mesh = sharding.data_mesh(2)
    double, sharded = STEP(sharding.replicate(make_state(), mesh), sharding.shard_batch(make_batch(), mesh))
    np.testing.assert_allclose(sharded["loss"], sums["loss"], rtol=1e-5)
    # The first step of Adam is the sign of the gradient: compare statistics, which do not depend on it.
    assert_close(double.batch_stats, single.batch_stats, rtol=1e-4, atol=1e-6)


def test_state_with_a_parameter_that_is_not_finite_is_not_alive():
    state, _ = STEP(make_state(), make_batch())
    check_alive(state)
    state.params["head"]["bias"] = jnp.array([0, jnp.nan, 0])
    with pytest.raises(FloatingPointError, match=r"\['head'\]\['bias'\] is not finite at step 1; saved checkpoints"):
        check_alive(state)


def test_network_that_no_gradient_reaches_is_not_alive():
    dead = make_state()
    dead.params["norm0"]["bias"] = jnp.full(4, -1e9)  # every ReLU of the first layer is 0
    dead, _ = STEP(dead, make_batch())
    with pytest.raises(FloatingPointError, match="all gradients of the epoch are 0 at step 1: dead network"):
        check_alive(dead)
