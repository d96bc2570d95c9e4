"""A trained network taught other classes: a new head, then all parameters trained gently on labelled images."""

import math
from collections.abc import Callable
from functools import partial

import jax

from gravlens_jax.config import AugmentConfig, OptimConfig, check
from gravlens_jax.data import prefetch, train_batches
from gravlens_jax.model import check_images
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import init_state, train_step
from gravlens_jax.weights import Network


def finetune(
    network: Network,
    dataset: Dataset,
    *,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> Network:
    """Returns a network of the data set's classes that begins as `network`, but for its head.

    Args:
      network: from `load_network`; it stays as it is.
      dataset: labelled images, in which the network's input finds what it knows: the same pixel scale, say.
      epochs: passes over them.
      learning_rate: peak; see `OptimConfig`.
      batch_size: images per step; all of them, if they are fewer.
      seed: of the head, the order and the flips.
      show: takes a line of text after each epoch.

    Raises:
      InputError: images smaller than the network's crop, fewer than two classes, or an option out of range.
      FloatingPointError: the loss is not finite.
    """
    model = network.model.clone(classes=dataset.classes)
    check(epochs >= 1 and batch_size >= 1, f"epochs={epochs}, batch_size={batch_size}: both must be at least 1")
    check(len(dataset.classes) > 1, f"only one class, {', '.join(dataset.classes)}; a network tells two or more apart")
    check_images((dataset.size, *dataset.image_shape), model.input)
    batch_size = min(batch_size, dataset.size)
    steps = dataset.size // batch_size
    config = OptimConfig(learning_rate=learning_rate, warmup_steps=steps)
    tx = make_optimizer(config, epochs * steps)
    state = init_state(seed, model, tx, config)
    params = {**network.variables["params"], "head": state.params["head"]}
    state = state._replace(params=params, batch_stats=network.variables["batch_stats"])
    step_fn = jax.jit(partial(train_step, model=model, tx=tx, config=AugmentConfig(), seed=seed))
    for epoch in range(epochs):
        sums = {"loss": 0.0, "correct": 0.0, "count": 0.0}
        for batch in prefetch(train_batches(dataset, batch_size, seed, epoch)):
            state, metrics = step_fn(state, batch)
            sums = {name: sums[name] + float(value) for name, value in metrics.items()}
        loss, accuracy = sums["loss"] / sums["count"], sums["correct"] / sums["count"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch + 1}; look for NaN pixels, or learn slower")
        show(f"epoch {epoch + 1}/{epochs}  train loss {loss:.4f} accuracy {accuracy:.4f}")
    return Network(model, {"params": state.params, "batch_stats": state.batch_stats}, dataset.image_shape)
