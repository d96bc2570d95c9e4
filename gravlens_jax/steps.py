"""The training state and the steps that change it. All pure; `fit` jits them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gravlens_jax.augment import augment, prepare, to_unit
from gravlens_jax.config import AugmentConfig, OptimConfig
from gravlens_jax.model import ResNet, forward
from gravlens_jax.optim import init_plateau, update_plateau

Batch = dict[str, jax.Array]  # images (batch, height, width), labels int32 (batch,), in evaluation mask bool (batch,)
Metrics = dict[str, jax.Array]  # sums over a batch: loss float32, correct int32, count int32


class TrainState(NamedTuple):
    """Everything needed to continue training; arrays only."""

    step: jax.Array  # int32 (), optimizer updates done
    params: Any
    batch_stats: Any
    opt_state: Any
    plateau: Any  # updated once per epoch by `end_epoch`


def init_state(seed: int, model: ResNet, tx: optax.GradientTransformation, config: OptimConfig) -> TrainState:
    """Returns the state before the first step; a function of `seed` alone."""
    size = model.input.crop // model.input.pool
    variables = model.init(jax.random.key(seed), jnp.zeros((1, size, size, 1)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(params),
        plateau=init_plateau(config, params),
    )


def _sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels) & mask
    return {"loss": jnp.sum(losses * mask), "correct": jnp.sum(correct), "count": jnp.sum(mask)}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: ResNet,
    tx: optax.GradientTransformation,
    config: AugmentConfig,
    seed: int,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one optimizer update on `batch`, and the batch's metrics before it.

    Augmentation is a function of (seed, state.step).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    x = prepare(augment(to_unit(batch["images"]), key, config), model.input)
    labels = batch["labels"]

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        metrics = _sums(logits, labels, jnp.ones(labels.shape, bool))
        return metrics["loss"] / labels.shape[0], (metrics, updated["batch_stats"])

    grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: state.plateau.scale * update, updates)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), metrics


def train_steps(state: TrainState, dataset: Batch, rows: jax.Array, **arguments: Any) -> tuple[TrainState, Metrics]:
    """Returns the state after a step on each of many batches that are gathered from a data set on the device.

    Args:
      state: before the first.
      dataset: all images (n, height, width) and labels (n,).
      rows: int32 (steps, batch), of each batch.
      **arguments: of `train_step`.

    Returns:
      the state, and the metrics of all steps, (steps,) each.
    """

    def one(state, rows):
        return train_step(state, jax.tree.map(lambda array: array[rows], dataset), **arguments)

    return jax.lax.scan(one, state, rows)


def eval_step(state: TrainState, batch: Batch, *, model: ResNet) -> Metrics:
    """Returns the metrics of the examples that batch["mask"] marks."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = forward(model, variables, prepare(to_unit(batch["images"]), model.input))
    return _sums(logits, batch["labels"], batch["mask"])


def end_epoch(state: TrainState, val_loss: jax.Array, *, config: OptimConfig) -> TrainState:
    """Returns the state with the plateau reduction told of the epoch's validation loss, float32 ()."""
    return state._replace(plateau=update_plateau(state.plateau, val_loss, config))
