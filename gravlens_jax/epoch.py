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
from gravlens_jax.npz import Dataset, native
from gravlens_jax.steps import Metrics, TrainState, train_step, train_steps
from gravlens_jax.stream import Stream, stream_batches

Sums = dict[str, float]  # over the images of an epoch so far: loss, correct, count
Show = Callable[[int, Sums], None]
STEPS_PER_CALL = 64  # with `device_data`


def place(dataset: Dataset | Stream, config: Config, devices: Mesh) -> Dataset | Stream:
    """Returns the images as an epoch wants them: as they are, or with `device_data` a copy in each device's memory."""
    if isinstance(dataset, Stream) or not config.device_data:
        return dataset
    held = mesh.replicate({"images": native(dataset.images), "labels": dataset.labels}, devices)
    return dataset._replace(**held)


def no_sums() -> Sums:
    """Returns the sums before the first image."""
    return {"loss": 0.0, "correct": 0.0, "count": 0.0}


def means(sums: Sums) -> tuple[float, float]:
    """Returns the loss and the accuracy."""
    return sums["loss"] / sums["count"], sums["correct"] / sums["count"]


def make_train_epoch(
    config: Config, model: ResNet, tx: optax.GradientTransformation, devices: Mesh
) -> Callable[..., tuple[TrainState, Sums]]:
    """Returns the function that trains for an epoch, or for the rest of one.

    Args:
      config: the run; of it, batch size, augmentation, seed, and whether the data set lives on the devices.
      model, tx: the network and its optimizer.
      devices: to train on.

    Returns:
      (state, dataset, epoch, first_step, sums, show, due, save) -> the state, which the call uses up, at the end of
      the epoch, and the sums of its metrics. The data set is what `place` returned; first_step is the step at which
      the epoch begins or began, sums those of its steps that `state` has behind it already. show(step, sums) is called
      after every step or, with `device_data`, every few; then, wherever due() is true, save(state, sums), but for the
      last step, since the epoch does not end with it: validation is to come.

    Raises:
      FloatingPointError: in the function; the loss is not finite.
    """
    step_or_steps = partial(
        train_steps if config.device_data else train_step, model=model, tx=tx, config=config.augment, seed=config.seed
    )
    step_fn = jax.jit(step_or_steps, donate_argnums=0, out_shardings=mesh.replicated(devices))

    def inputs(dataset: Dataset | Stream, epoch: int, skip: int) -> Iterator[tuple[tuple, int]]:
        """Yields what `step_fn` takes beside the state, and the number of steps that this makes."""
        if isinstance(dataset, Stream):
            for batch in stream_batches(dataset, config.batch_size, epoch, devices, skip):
                yield (batch,), 1
        elif not config.device_data:
            rows = mesh.local_rows(data.epoch_rows(dataset.size, config.batch_size, config.seed, epoch)[skip:])
            for batch in data.prefetch(data.train_batches(dataset, rows)):
                yield (mesh.shard_batch(batch, devices),), 1
        else:
            held = {"images": dataset.images, "labels": dataset.labels}
            rows = data.epoch_rows(dataset.size, config.batch_size, config.seed, epoch)[skip:]
            for some in np.array_split(rows, -(-len(rows) // STEPS_PER_CALL)):
                yield (held, mesh.shard_rows(some, devices)), len(some)

    def train_epoch(
        state: TrainState,
        dataset: Dataset | Stream,
        epoch: int,
        first_step: int,
        sums: Sums,
        show: Show = lambda step, sums: None,
        due: Callable[[], bool] = lambda: False,
        save: Callable[[TrainState, Sums], None] = lambda state, sums: None,
    ) -> tuple[TrainState, Sums]:
        step, sums, pending = int(state.step), dict(sums), None
        last_step = first_step + dataset.size // config.batch_size

        def take(metrics: Metrics | None, step: int) -> None:
            for name, value in (metrics or {}).items():
                sums[name] += float(np.sum(value))
            check_finite(sums["loss"], "training loss", step)
            show(step, sums)

        for given, steps in inputs(dataset, epoch, step - first_step):
            state, metrics = step_fn(state, *given)
            if pending is not None:
                take(pending, step)  # of the call before: reading it does not hold up the one just started
            pending, step = metrics, step + steps
            if step < last_step and due():
                take(pending, step)
                pending = None
                save(state, sums)
        take(pending, step)
        return state, sums

    return train_epoch


def sum_metrics(eval_fn: Callable, state: TrainState, batches: Iterable[dict], devices: Mesh) -> Sums:
    """Returns the sums over `batches` of what `eval_fn`, a jitted `eval_step`, makes of each."""
    sums = no_sums()
    for batch in batches:
        for name, value in eval_fn(state, mesh.shard_batch(batch, devices)).items():
            sums[name] += float(value)
    return sums


def check_finite(loss: float, name: str, step: int) -> None:
    """Raises FloatingPointError, with advice, unless the loss is finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"{name} is {loss} at step {step}; what was saved before is intact. Look for NaN pixels in the data, or "
            f"start again with a lower learning rate"
        )
