from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import mesh
from gravlens_jax.config import AugmentConfig, InputConfig, InputError, OptimConfig
from gravlens_jax.model import ResNet
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import end_epoch, eval_step, init_state, train_step, train_steps

MODEL = ResNet(depth=8, width=4, input=InputConfig(16, 1, "linear", 0.3, 0.2))
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=0, decay="constant")
TX = make_optimizer(OPTIM, 100)
ARGUMENTS = {"model": MODEL, "tx": TX, "config": AugmentConfig(), "seed": 0}
STEP = jax.jit(partial(train_step, **ARGUMENTS))


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % 3
    images = rng.random((n, 16, 16)) * 0.2
    images[labels == 1, 4:12] += 0.5  # a horizontal bar; flips leave it
    images[labels == 2, :, 4:12] += 0.5  # a vertical one
    return {"images": images.astype(np.float32), "labels": labels}


def state():
    return init_state(0, MODEL, TX, OPTIM)


def test_the_step_compiles_once_and_learns():
    step_fn, current = jax.jit(partial(train_step, **ARGUMENTS), donate_argnums=0), state()
    losses = []
    for _ in range(30):
        current, metrics = step_fn(current, batch())
        losses.append(float(metrics["loss"]))
    assert step_fn._cache_size() == 1
    assert int(current.step) == 30 and losses[-1] < losses[0] / 4


def test_an_epoch_s_end_leaves_the_state_of_the_type_that_the_step_is_compiled_for():
    step_fn, end_fn = jax.jit(partial(train_step, **ARGUMENTS)), jax.jit(partial(end_epoch, config=OPTIM))
    current = mesh.replicate(jax.jit(partial(init_state, model=MODEL, tx=TX, config=OPTIM))(0), mesh.data_mesh(1))
    for _ in range(3):
        current, _ = step_fn(current, batch())
        current = end_fn(current, 1.0)
    assert step_fn._cache_size() == end_fn._cache_size() == 1


def test_steps_on_device_data_are_the_same_steps():
    dataset, rows = batch(12), np.random.default_rng(0).permutation(12).reshape(3, 4)
    one_by_one, losses = state(), []
    for some in rows:
        one_by_one, metrics = STEP(one_by_one, {name: array[some] for name, array in dataset.items()})
        losses.append(metrics["loss"])
    together, metrics = jax.jit(partial(train_steps, **ARGUMENTS))(state(), dataset, rows)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_learns_too():
    model, losses, current = MODEL.clone(dtype=jnp.bfloat16), [], state()
    step_fn = jax.jit(partial(train_step, model=model, tx=TX, config=AugmentConfig(), seed=0))
    for _ in range(30):
        current, metrics = step_fn(current, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 4
    assert {x.dtype for x in jax.tree.leaves((current.params, current.batch_stats))} == {jnp.dtype("float32")}


def test_initial_state_and_steps_are_functions_of_the_seed():
    for a, b in zip(jax.tree.leaves(STEP(state(), batch())), jax.tree.leaves(STEP(state(), batch())), strict=True):
        np.testing.assert_array_equal(a, b)
    other = init_state(1, MODEL, TX, OPTIM)
    assert (other.params["head"]["kernel"] != state().params["head"]["kernel"]).any()


def test_the_plateau_scales_the_update():
    full = state()
    half = full._replace(plateau=full.plateau._replace(scale=jnp.float32(0.5)))
    before = full.params["head"]["kernel"]
    moved_full, moved_half = (STEP(s, batch())[0].params["head"]["kernel"] - before for s in (full, half))
    np.testing.assert_allclose(moved_half, moved_full / 2, rtol=1e-4, atol=1e-7)


def test_end_epoch_cuts_after_patience():
    current = state()
    for _ in range(OPTIM.plateau_patience + 2):
        current = end_epoch(current, jnp.float32(1.0), config=OPTIM)
    assert float(current.plateau.scale) == pytest.approx(OPTIM.plateau_factor)


@pytest.mark.parametrize("keep", [1, 5, 8])
def test_evaluation_counts_masked_examples_only(keep):
    padded = batch() | {"mask": np.arange(8) < keep}
    whole = {name: value[:keep] for name, value in padded.items()}
    for name, value in eval_step(state(), padded, model=MODEL).items():
        np.testing.assert_allclose(value, eval_step(state(), whole, model=MODEL)[name], rtol=1e-5)


def test_two_devices_give_the_numbers_of_one():
    assert jax.device_count() == 2
    single, metrics = STEP(state(), batch())
    devices = mesh.data_mesh()
    double, sharded = STEP(mesh.replicate(state(), devices), mesh.shard_batch(batch(), devices))
    np.testing.assert_allclose(sharded["loss"], metrics["loss"], rtol=1e-5)
    # Adam's first step is the sign of the gradient: compare statistics and the loss's path, not tiny gradients.
    for a, b in zip(jax.tree.leaves(double.batch_stats), jax.tree.leaves(single.batch_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_must_divide_between_the_devices():
    with pytest.raises(InputError, match="batch_size=7 is not divisible by 2 devices; try 6"):
        mesh.check_batch_size(7, mesh.data_mesh())
