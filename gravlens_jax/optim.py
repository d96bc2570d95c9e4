"""The optimizer, its learning rate for each step, and the plateau reduction after each epoch. Pure functions."""

from functools import partial

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon, reduce_on_plateau

from gravlens_jax.config import OptimConfig


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate without the plateau reduction: linear warm-up, then constant or cosine to 0."""
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - config.warmup_steps))
    else:
        after = optax.constant_schedule(config.learning_rate)
    # Step 0 of a warm-up of w steps uses 1 / w of the peak, so that no step has a learning rate of 0.
    w = config.warmup_steps
    warmup = optax.linear_schedule(config.learning_rate / max(1, w), config.learning_rate, max(0, w - 1))
    return optax.join_schedules([warmup, after], [w])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optax chain.

    "adam" adds L2 to the gradient, as PyTorch's `Adam(weight_decay=...)` does. "muon" (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon) replaces the momentum of each kernel, reshaped to a matrix (height *
    width * channels, filters), by the nearest orthogonal matrix. The other parameters (first kernel, normalization,
    head) are updated by Adam at a tenth of the learning rate.
    """
    schedule = learning_rate_schedule(config, total_steps)
    if config.method == "adam":
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            optax.scale_by_learning_rate(schedule),
        )
    kernel = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    parts = {
        "muon": muon(
            schedule,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: kernel, params),
        ),
        "adam": optax.adam(lambda step: schedule(step) / 10, b1=0.9, b2=0.99),
    }
    return optax.partition(parts, partial(jax.tree.map, lambda x: "muon" if x.ndim == 4 and x.shape[2] > 1 else "adam"))


def plateau_reduction(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Returns PyTorch's ReduceLROnPlateau; the `scale` of its state, updated each epoch, multiplies every update."""
    # optax reduces when the bad epochs reach `patience`, PyTorch when they exceed it. PyTorch ignores reductions of the
    # learning rate by less than 1e-8, hence the minimum.
    return reduce_on_plateau(
        factor=config.plateau_factor,
        patience=config.plateau_patience + 1,
        rtol=1e-4,
        atol=0.0,
        cooldown=0,
        accumulation_size=1,
        min_scale=min(1.0, 1e-8 / config.learning_rate),
    )
