"""The optimizer: L2 + Adam with a learning rate by step, and the plateau reduction by epoch. All pure."""

import jax
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau

from gravlens_jax.config import OptimConfig


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate before the plateau reduction: linear warm-up, then constant or cosine to 0."""
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - config.warmup_steps))
    else:
        after = optax.constant_schedule(config.learning_rate)
    # Step 0 of a warm-up of w steps uses 1 / w of the peak: no step is spent at a learning rate of 0.
    w = config.warmup_steps
    warmup = optax.linear_schedule(config.learning_rate / max(1, w), config.learning_rate, max(0, w - 1))
    return optax.join_schedules([warmup, after], [w])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optax chain. L2 goes into the gradient before Adam, as PyTorch's `Adam(weight_decay=...)` has it."""
    return optax.chain(
        optax.add_decayed_weights(config.l2),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    )


def _plateau(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    # optax cuts when the bad epochs reach `patience`, PyTorch when they exceed it. PyTorch ignores cuts of the
    # learning rate below 1e-8, hence the floor.
    return reduce_on_plateau(
        factor=config.plateau_factor,
        patience=config.plateau_patience + 1,
        rtol=1e-4,
        atol=0.0,
        cooldown=0,
        accumulation_size=1,
        min_scale=1e-8 / config.learning_rate,
    )


def init_plateau(config: OptimConfig, params) -> ReduceLROnPlateauState:
    """Returns the state before the first epoch; its `scale` (float32, 1) multiplies every update."""
    return _plateau(config).init(params)


def update_plateau(plateau: ReduceLROnPlateauState, val_loss: jax.Array, config: OptimConfig) -> ReduceLROnPlateauState:
    """Returns the state after an epoch that ended with the validation loss `val_loss` (float32 scalar)."""
    return _plateau(config).update({}, plateau, value=val_loss)[1]
