"""Timing of training steps, inference and the training loop."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.machine import time_calls
from gravlens_jax.config import CLASSES, Config, InputConfig, OptimConfig
from gravlens_jax.loader import FileData
from gravlens_jax.model import ResNet
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.optim import make_optimizer
from gravlens_jax.preprocess import prepare, to_unit
from gravlens_jax.sharding import check_batch_size, data_mesh, replicate, shard_batch
from gravlens_jax.train_step import TrainState, init_state, train_step

OPTIM = OptimConfig("adam", learning_rate=1e-3, weight_decay=1e-4)  # PyTorch's Adam has the same


def random_batch(batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Returns a batch of random photon counts (uint16) with labels; speed does not depend on the pixels' values."""
    images = np.random.default_rng(0).poisson(100, (batch_size, size, size)).astype(np.uint16)
    return {"images": images, "labels": (np.arange(batch_size) % len(CLASSES)).astype(np.int32)}


def set_up(size: int, dtype: str, mesh: Mesh) -> tuple[ResNet, Callable, TrainState]:
    """Returns the network, the training step (state, batch) -> (state, sums), and its first state on the devices."""
    model = ResNet(dtype=jnp.dtype(dtype), input=InputConfig(crop=size, pool=1))
    tx = make_optimizer(OPTIM, 1000)
    state = replicate(init_state(0, model, tx, OPTIM), mesh)
    return model, partial(train_step, model=model, tx=tx, config=Config()), state


def compile_step(
    train: bool, batch_size: int, size: int, dtype: str, devices: int
) -> tuple[Callable[[int, int], list[float]], dict[str, float]]:
    """Compiles a training step, or else a forward pass, of `ResNet20` on stored images.

    Args:
      train: flips, forward and backward pass and Adam, no auxiliary loss; else input preparation and forward pass.
      batch_size: over all devices; each process makes its own share.
      size: pixels, height and width of images and network's input.
      dtype: of activations.
      devices: how many of the devices to use; of several processes only those that own one of them may call.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps after `warmup` others; each waits for its result.
      facts: compile_seconds; transfer_seconds, of a batch to the devices; memory_bytes, of arguments, results and
        temporaries; accessed_bytes, the memory traffic of a step. The last two by the compiler's count.
    """
    mesh = data_mesh(devices)
    check_batch_size(batch_size, mesh)
    model, step, state = set_up(size, dtype, mesh)
    host_batch = random_batch(batch_size // mesh.size * len(mesh.local_devices), size)
    batch = shard_batch(host_batch, mesh)
    transfers = time_calls(lambda: shard_batch(host_batch, mesh), 3, 10)

    def forward(state, batch):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state, model.apply(variables, prepare(to_unit(batch["images"]), model.input))

    start = time.perf_counter()
    compiled = jax.jit(step if train else forward, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "this compiler does not count memory"
    facts = {
        "compile_seconds": compile_seconds,
        "transfer_seconds": statistics.median(transfers),
        "memory_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "accessed_bytes": float((compiled.cost_analysis() or {}).get("bytes accessed", 0)),
    }
    return partial(time_calls, partial(next, step_results(compiled, state, batch))), facts


def step_results(step_fn: Callable, state: TrainState, batch: dict[str, jax.Array]) -> Iterator[Any]:
    """Yields the results of one step after another on the same batch; each step starts when its result is requested."""
    while True:
        state, result = step_fn(state, batch)
        yield result


def busy_fraction(batch_size: int, size: int, dtype: str, steps: int, repeats: int = 3) -> float:
    """Returns the fraction of the wall time of a training epoch, on one device, that its steps need by themselves.

    The epoch reads a memory-mapped file and its running sums one step late, as `training.fit` does. Alternating with
    it, the same number of steps run on a batch that is on the device. The ratio of the medians can exceed 1 by the
    noise of the timing.

    Args:
      batch_size, size, dtype: as in `compile_step`.
      steps: of the epoch.
      repeats: epochs to time.
    """
    mesh = data_mesh(1)
    _, step, state = set_up(size, dtype, mesh)
    step_fn = jax.jit(step, donate_argnums=0)
    images, labels = random_batch(batch_size * steps, size).values()
    batch = shard_batch(random_batch(batch_size, size), mesh)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npz"
        write_npz(path, [images], images.shape, images.dtype, labels, CLASSES, {})
        source = FileData(open_npz(path), batch_size, 0, mesh)

        def epoch(state: TrainState) -> TrainState:
            previous = None
            for _, batch in source.batches(0):
                state, sums = step_fn(state, batch)
                jax.device_get(previous)
                previous = sums
            return state

        def alone(state: TrainState) -> TrainState:
            for _ in range(steps):
                state, _ = step_fn(state, batch)
            return state

        seconds: dict[Callable[[TrainState], TrainState], list[float]] = {epoch: [], alone: []}
        for _ in range(1 + repeats):
            for run in seconds:
                start = time.perf_counter()
                state = jax.block_until_ready(run(state))
                seconds[run].append(time.perf_counter() - start)
    return statistics.median(seconds[alone][1:]) / statistics.median(seconds[epoch][1:])


def step_figures(seconds: list[float], batch_size: int, flops: int) -> dict[str, Any]:
    """Returns step_seconds (median), step_seconds_quartiles, images_per_second and tflops of timed steps.

    Args:
      seconds: of single steps on `batch_size` images.
      batch_size: images a step.
      flops: of one image.
    """
    step = statistics.median(seconds)
    return {
        "step_seconds": step,
        "step_seconds_quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
        "images_per_second": batch_size / step,
        "tflops": flops * batch_size / step / 1e12,
    }
