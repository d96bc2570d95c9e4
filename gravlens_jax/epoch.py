"""One pass over the images: batches to the devices, a step on each, sums of the metrics."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from gravlens_jax import data, mesh
from gravlens_jax.config import Config
from gravlens_jax.model import ResNet
from gravlens_jax.steps import Metrics, TrainState, train_step, train_steps

STEPS_PER_CALL = 64  # with `device_data`


def make_train_epoch(
    config: Config, model: ResNet, tx: optax.GradientTransformation, train: data.Dataset, devices: Mesh
) -> Callable[..., tuple[TrainState, dict[str, float]]]:
    """Returns the function that trains for an epoch.

    Args:
      config: the run; of it, what to train on in which order, and whether the data set lives on the devices.
      model, tx: the network and its optimizer.
      train: training images.
      devices: to train on.

    Returns:
      (state, epoch, show) -> the state, which the call uses up, after a pass over the training images, and the sums of
      its metrics; show(step, sums so far) is called after every step or, with `device_data`, every few.

    Raises:
      FloatingPointError: in the function; the loss is not finite.
    """
    arguments = {"model": model, "tx": tx, "config": config.augment, "seed": config.seed}
    jit = partial(jax.jit, donate_argnums=0, out_shardings=mesh.replicated(devices))
    n = len(train.labels)
    if config.device_data:
        steps_fn = jit(partial(train_steps, **arguments))
        dataset = mesh.replicate({"images": np.asarray(train.images), "labels": train.labels}, devices)

        def step_fn(state, rows):
            return steps_fn(state, dataset, rows)

        def inputs(epoch: int) -> Iterator[tuple[jax.Array, int]]:
            rows = data.epoch_rows(n, config.batch_size, config.seed, epoch)
            for some in np.array_split(rows, -(-len(rows) // STEPS_PER_CALL)):
                yield mesh.shard_rows(some, devices), len(some)
    else:
        step_fn = jit(partial(train_step, **arguments))

        def inputs(epoch: int) -> Iterator[tuple[dict[str, jax.Array], int]]:
            for batch in data.prefetch(data.train_batches(train, config.batch_size, config.seed, epoch)):
                yield mesh.shard_batch(batch, devices), 1

    def train_epoch(state: TrainState, epoch: int, show: Callable[[int, dict[str, float]], None]):
        sums, pending = {"loss": 0.0, "correct": 0.0, "count": 0.0}, None
        step = epoch * (n // config.batch_size)

        def take(metrics: Metrics, step: int) -> None:
            for name, value in metrics.items():
                sums[name] += float(np.sum(value))
            check_finite(sums["loss"], "training loss", step)
            show(step, sums)

        for given, steps in inputs(epoch):
            state, metrics = step_fn(state, given)
            if pending is not None:
                take(pending, step)  # of the call before: reading it does not hold up the one just started
            pending, step = metrics, step + steps
        take(pending, step)
        return state, sums

    return train_epoch


def sum_metrics(eval_fn: Callable, state: TrainState, batches: Iterable[dict], devices: Mesh) -> dict[str, float]:
    """Returns the sums over `batches` of what `eval_fn`, a jitted `eval_step`, makes of each."""
    sums = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for batch in batches:
        for name, value in eval_fn(state, mesh.shard_batch(batch, devices)).items():
            sums[name] += float(value)
    return sums


def check_finite(loss: float, name: str, step: int) -> None:
    """Raises FloatingPointError, with advice, unless the loss is finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{name} is {loss} at step {step}; the checkpoints of earlier epochs are intact. Look for NaN pixels in "
            f"the data, or start again with a lower --optim.learning-rate"
        )
