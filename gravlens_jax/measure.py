"""How fast a training step, inference and the training loop are here, and what machine this is."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gravlens_jax.augment import prepare, to_unit
from gravlens_jax.config import CLASSES, AugmentConfig, Config, InputConfig, OptimConfig
from gravlens_jax.costs import find_peaks
from gravlens_jax.epoch import make_train_epoch, no_sums
from gravlens_jax.mesh import check_batch_size, data_mesh, replicate, shard_batch
from gravlens_jax.model import ResNet
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.optim import make_optimizer
from gravlens_jax.steps import TrainState, init_state, train_step


def peaks(dtype: str) -> dict[str, float]:
    """Returns the device's peak {"tflops", "bandwidth"} (TFLOP/s, GB/s): from the table; on a CPU, measured.

    A CPU's are the best of a few 2048 x 2048 float32 matrix products and copies of 256 MiB (read and write). Empty
    if the device is not known.
    """
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        a = jnp.ones((2048, 2048))
        matmul = jax.jit(lambda a: a @ a)
        product = min(time_calls(lambda: matmul(a), 3, 10))
        source, target = np.ones(2**25), np.ones(2**25)
        copy = min(time_calls(lambda: np.copyto(target, source), 1, 5))
        return {"tflops": 2 * 2048**3 / product / 1e12, "bandwidth": 2 * source.nbytes / copy / 1e9}
    values = find_peaks(kind)
    return {"tflops": values[dtype], "bandwidth": values["bandwidth"]} if values else {}


def machine(dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Returns what measurements depend on: devices, peaks for each of `dtypes`, precision, settings and versions."""
    return {
        "device_kind": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "peaks": {dtype: peaks(dtype) for dtype in dtypes},
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "huge_pages": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def use_cpu_devices(devices: int) -> None:
    """Splits the CPU, where that is what JAX runs on, into so many devices; call it before anything touches one."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)


def medians(runs: dict[Any, list[dict[str, float]]]) -> dict[Any, dict[str, float]]:
    """Returns the medians over repeated measurements of each case."""
    return {case: {k: float(np.median([run[k] for run in some])) for k in some[0]} for case, some in runs.items()}


def time_calls(function: Callable[[], Any], warmup: int, calls: int) -> list[float]:
    """Returns the sorted seconds of `calls` calls of `function` after `warmup` others, each result waited for."""
    seconds = []
    for _ in range(warmup + calls):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[warmup:])


def step_figures(
    seconds: list[float], torch_seconds: list[float], batch_size: int, flops: int, accessed_bytes: float
) -> dict[str, Any]:
    """Returns what the seconds of single steps, ours and PyTorch's (or none), amount to.

    Args:
      seconds, torch_seconds: of steps on `batch_size` images.
      batch_size: images a step.
      flops: of one image.
      accessed_bytes: memory traffic of a step.

    Returns:
      step_seconds (median), step_seconds_quartiles, images_per_second, tflops, accessed_gb_per_second; with PyTorch's
      seconds also torch_images_per_second and ratio, our images per second over PyTorch's.
    """
    step = statistics.median(seconds)
    figures = {
        "step_seconds": step,
        "step_seconds_quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
        "images_per_second": batch_size / step,
        "tflops": flops * batch_size / step / 1e12,
        "accessed_gb_per_second": accessed_bytes / step / 1e9,
    }
    if torch_seconds:
        figures["torch_images_per_second"] = batch_size / statistics.median(torch_seconds)
        figures["ratio"] = figures["images_per_second"] / figures["torch_images_per_second"]
    return figures


def random_batch(batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Returns a batch of random photon counts (uint16) with labels; speed does not depend on what is in the pixels."""
    rng = np.random.default_rng(0)
    images = rng.poisson(100, (batch_size, size, size)).astype(np.uint16)
    return {"images": images, "labels": (np.arange(batch_size) % 3).astype(np.int32)}


def compile_step(
    train: bool, batch_size: int, size: int, dtype: str, devices: int
) -> tuple[Callable[[int, int], list[float]], dict[str, float]]:
    """Compiles a training step, or else a forward pass, of `ResNet20` from stored images on.

    Args:
      train: a step of `train.py` with flips; else input preparation and forward pass.
      batch_size: over all devices; each process makes its own share.
      size: pixels, height and width of images and network's input.
      dtype: of activations.
      devices: how many of the devices to use; of several processes only those that own one of them may call.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps after `warmup` others, each waited for.
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
    memory = compiled.memory_analysis()
    assert memory is not None, "this compiler does not count memory"
    facts = {
        "compile_seconds": time.perf_counter() - start,
        "transfer_seconds": statistics.median(transfers),
        "memory_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "accessed_bytes": float((compiled.cost_analysis() or {}).get("bytes accessed", 0)),
    }

    def run(warmup: int, steps: int) -> list[float]:
        def once():
            nonlocal state
            state, result = compiled(state, batch)
            return result

        return time_calls(once, warmup, steps)

    return run, facts


# The peer's optimizer, so that the same is compared.
OPTIM = OptimConfig("adam", learning_rate=1e-3, weight_decay=1e-4)


def set_up(size: int, dtype: str, mesh: Mesh) -> tuple[ResNet, Callable, TrainState]:
    """Returns the network, the training step (state, batch) -> (state, metrics), and its first state on the devices."""
    model = ResNet(dtype=jnp.dtype(dtype), input=InputConfig(crop=size, pool=1))
    tx = make_optimizer(OPTIM, 1000)
    state = replicate(init_state(0, model, tx, OPTIM), mesh)
    return model, partial(train_step, model=model, tx=tx, config=AugmentConfig(), seed=0), state


def busy_fraction(batch_size: int, size: int, dtype: str, steps: int, repeats: int = 3) -> float:
    """Returns the part of the wall time of an epoch of `fit`, on one device, that its steps take by themselves.

    An epoch reads a memory-mapped file and counts and shows its metrics; beside it, in turn, as many steps run on a
    batch that is on the device. The ratio of the medians can exceed 1 by the noise of the timing.

    Args:
      batch_size, size, dtype: as in `compile_step`.
      steps: of the epoch.
      repeats: epochs to time.
    """
    mesh = data_mesh(1)
    model, step, state = set_up(size, dtype, mesh)
    n = batch_size * steps
    step = jax.jit(step, donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npz"
        images, labels = random_batch(n, size).values()
        write_npz(path, [images], images.shape, images.dtype, labels, CLASSES, {})
        tx = make_optimizer(OPTIM, 1000)
        dataset = open_npz(path)
        train_epoch = make_train_epoch(Config(batch_size=batch_size), model, tx, mesh)
        batch = shard_batch(random_batch(batch_size, size), mesh)

        def epoch() -> None:
            nonlocal state
            state, _ = train_epoch(state, dataset, 0, int(state.step), no_sums())

        def alone() -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)

        seconds: dict[Callable[[], None], list[float]] = {run: [] for run in (epoch, alone)}
        for _ in range(1 + repeats):
            for run in seconds:
                seconds[run] += time_calls(run, 0, 1)
        return statistics.median(seconds[alone][1:]) / statistics.median(seconds[epoch][1:])
