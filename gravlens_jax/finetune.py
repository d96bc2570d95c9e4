"""A trained network taught other classes: a new head, then all parameters trained gently on labelled images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gravlens_jax.config import Config, OptimConfig, check
from gravlens_jax.epoch import make_train_epoch, means, no_sums
from gravlens_jax.mesh import data_mesh
from gravlens_jax.model import check_images
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import init_state
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
    # Copies, since the first step uses the state up.
    state = jax.tree.map(jnp.copy, state._replace(params=params, batch_stats=network.variables["batch_stats"]))
    train_epoch = make_train_epoch(Config(batch_size=batch_size, seed=seed), model, tx, data_mesh(1))
    for epoch in range(epochs):
        state, sums = train_epoch(state, dataset, epoch, epoch * steps, no_sums())
        loss, accuracy = means(sums)
        show(f"epoch {epoch + 1}/{epochs}: train loss {loss:.3f} acc {accuracy:.3f}")
    return Network(model, {"params": state.params, "batch_stats": state.batch_stats}, dataset.image_shape)
