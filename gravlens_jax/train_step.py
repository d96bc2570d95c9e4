"""The training state and the steps that change it. Pure functions; `training` jits them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gravlens_jax.config import Config, OptimConfig
from gravlens_jax.metrics import VISIBLE
from gravlens_jax.model import ResNet, apply_head
from gravlens_jax.optim import plateau_reduction
from gravlens_jax.preprocess import augment, augment_vectors, cell_means, prepare, to_unit

# images (batch, height, width), labels int32 (batch,), perhaps deflections float32 (batch, cells, cells, 2) in arcsec;
# see also `train_steps`, `eval_step`
Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]  # over images: loss float32, correct int32, count int32; over steps: gradient float32

DEFLECTION_UNIT = 0.03  # arcsec, of the auxiliary head's output; about the deflection by the heaviest subhalos


class TrainState(NamedTuple):
    """Everything needed to continue training; arrays only."""

    step: jax.Array  # int32 (), optimizer updates done
    params: Any
    batch_stats: Any
    auxiliary: Any  # parameters of the head that predicts deflections, used in training only; {} for none
    opt_state: Any
    plateau: Any  # updated once per epoch by `end_epoch`
    sums: Sums  # running since the epoch began; `gradient` is the sum of |gradient| of the first kernel


def zero_sums() -> Sums:
    """Returns the sums before the first image."""
    dtypes = {"loss": jnp.float32, "correct": jnp.int32, "count": jnp.int32, "gradient": jnp.float32}
    return {name: jnp.zeros((), dtype) for name, dtype in dtypes.items()}


def init_state(
    seed: int, model: ResNet, tx: optax.GradientTransformation, config: OptimConfig, auxiliary: bool = False
) -> TrainState:
    """Returns the state before the first step, a function of `seed` alone; `auxiliary` if batches have deflections."""
    size = model.input.crop // model.input.pool
    variables = model.init(jax.random.key(seed), jnp.zeros((1, size, size, 1), jnp.float32))
    params, channels = variables["params"], 4 * model.width
    head = {"kernel": jnp.zeros((channels, 2), jnp.float32), "bias": jnp.zeros(2, jnp.float32)} if auxiliary else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        auxiliary=head,
        opt_state=tx.init((params, head)),
        plateau=plateau_reduction(config).init(params),
        sums=zero_sums(),
    )


def _batch_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels) & mask
    count = partial(jnp.sum, dtype=jnp.int32)
    return {"loss": jnp.sum(losses * mask), "correct": count(correct), "count": count(mask)}


def train_step(
    state: TrainState, batch: Batch, *, model: ResNet, tx: optax.GradientTransformation, config: Config
) -> tuple[TrainState, Sums]:
    """Returns the state after one optimizer update on `batch`, and a copy of the sums that survives donation.

    The sums are those of the network before the update. Augmentation is a function of (config.seed, state.step). If the
    state has an auxiliary head, it predicts the batch's deflections from the last feature map, and the mean squared
    error, weighted by the light that shows it, times `config.deflection_weight` is added to the loss (not to the sums).
    Nothing else of `config` is used: network and optimizer are `model` and `tx`.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    images, labels = augment(to_unit(batch["images"]), key, config.augment, model.input.crop), batch["labels"]
    x = prepare(images, model.input)

    def loss_fn(trained):
        params, head = trained
        variables = {"params": params, "batch_stats": state.batch_stats}
        (logits, feature_maps), updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        sums = _batch_sums(logits, labels, jnp.ones(labels.shape, bool))
        loss = sums["loss"] / labels.shape[0]
        if head:
            deflections = augment_vectors(batch["deflections"] / DEFLECTION_UNIT, key, config.augment)
            predicted = apply_head(feature_maps[-1], head)
            visible = jnp.minimum(1, cell_means(images, model.input) / VISIBLE)
            loss += config.deflection_weight * jnp.mean(visible * (predicted - deflections) ** 2)
        return loss, (sums, updated["batch_stats"])

    trained = state.params, state.auxiliary
    grads, (sums, batch_stats) = jax.grad(loss_fn, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    updates = jax.tree.map(lambda update: state.plateau.scale * update, updates)
    sums["gradient"] = jnp.sum(jnp.abs(grads[0]["conv0"]["kernel"]))
    params, auxiliary = optax.apply_updates(trained, updates)
    state = state._replace(params=params, batch_stats=batch_stats, auxiliary=auxiliary, opt_state=opt_state)
    state = state._replace(step=state.step + 1, sums=jax.tree.map(jnp.add, state.sums, sums))
    return state, state.sums


def train_steps(state: TrainState, batch: Batch, **options: Any) -> tuple[TrainState, Sums]:
    """Applies `train_step(**options)` to a batch; or, if it has rows int32 (steps, batch), to each of these rows."""
    if "rows" not in batch:
        return train_step(state, batch, **options)

    def one(state, rows):
        return train_step(state, {name: x[rows] for name, x in batch.items() if name != "rows"}, **options)[0], None

    state, _ = jax.lax.scan(one, state, batch["rows"])
    return state, state.sums


def eval_step(state: TrainState, batch: Batch, *, model: ResNet) -> Sums:
    """Returns loss, correct and count of the examples that batch["mask"], bool (batch,), marks."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = model.apply(variables, prepare(to_unit(batch["images"]), model.input))
    return _batch_sums(logits, batch["labels"], batch["mask"])


def end_epoch(state: TrainState, val_loss: jax.Array | None, *, config: OptimConfig) -> TrainState:
    """Returns the state with zero sums, and the plateau reduction updated by the validation loss, if there is one."""
    if val_loss is not None:
        state = state._replace(plateau=plateau_reduction(config).update({}, state.plateau, value=val_loss)[1])
    return state._replace(sums=zero_sums())
