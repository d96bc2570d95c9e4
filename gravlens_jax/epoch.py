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
from gravlens_jax.npz import Dataset
from gravlens_jax.steps import Metrics, TrainState, train_step, train_steps
from gravlens_jax.stream import Stream, stream_batches

Show = Callable[[int, dict[str, float]], None]
STEPS_PER_CALL = 64  # with `device_data`


def place(dataset: Dataset | Stream, config: Config, devices: Mesh) -> Dataset | Stream:
    """Returns the images as an epoch wants them: as they are, or with `device_data` a copy in each device's memory."""
    if not config.device_data:
        return dataset
    held = mesh.replicate({"images": np.asarray(dataset.images), "labels": dataset.labels}, devices)
    return dataset._replace(**held)


def make_train_epoch(
    config: Config, model: ResNet, tx: optax.GradientTransformation, devices: Mesh
) -> Callable[..., tuple[TrainState, dict[str, float]]]:
    """Returns the function that trains for an epoch.

    Args:
      config: the run; of it, batch size, augmentation, seed, and whether the data set lives on the devices.
      model, tx: the network and its optimizer.
      devices: to train on.

    Returns:
      (state, dataset, epoch, step, show) -> the state, which the call uses up, after a pass over the data set that
      `place` returned, and the sums of its metrics. `step` is the state's; show(step, sums so far) is called after
      every step or, with `device_data`, every few.

    Raises:
      FloatingPointError: in the function; the loss is not finite.
    """
    step_or_steps = partial(
        train_steps if config.device_data else train_step, model=model, tx=tx, config=config.augment, seed=config.seed
    )
    step_fn = jax.jit(step_or_steps, donate_argnums=0, out_shardings=mesh.replicated(devices))

    def inputs(dataset: Dataset | Stream, epoch: int) -> Iterator[tuple[tuple, int]]:
        """Yields what `step_fn` takes beside the state, and the number of steps that this makes."""
        if isinstance(dataset, Stream):
            for batch in stream_batches(dataset, config.batch_size, epoch, devices):
                yield (batch,), 1
            return
        if not config.device_data:
            for batch in data.prefetch(data.train_batches(dataset, config.batch_size, config.seed, epoch)):
                yield (mesh.shard_batch(batch, devices),), 1
            return
        held = {"images": dataset.images, "labels": dataset.labels}
        rows = data.epoch_rows(dataset.size, config.batch_size, config.seed, epoch)
        for some in np.array_split(rows, -(-len(rows) // STEPS_PER_CALL)):
            yield (held, mesh.shard_rows(some, devices)), len(some)

    def train_epoch(state: TrainState, dataset: Dataset | Stream, epoch: int, step: int, show: Show):
        sums, pending = {"loss": 0.0, "correct": 0.0, "count": 0.0}, None

        def take(metrics: Metrics, step: int) -> None:
            for name, value in metrics.items():
                sums[name] += float(np.sum(value))
            check_finite(sums["loss"], "training loss", step)
            show(step, sums)

        for given, steps in inputs(dataset, epoch):
            state, metrics = step_fn(state, *given)
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
