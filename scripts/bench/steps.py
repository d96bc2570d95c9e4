"""Training steps and inference: compiled, also for TPUs that are not here, with facts about the programs, and timed."""

import itertools
import math
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.costs import Case
from bench.harness import Row, Run, alternate, time_calls
from gravlens_jax.config import CLASSES, SPLITS, Config, ModelConfig
from gravlens_jax.datasets import map_grid
from gravlens_jax.errors import InputError
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.loader import FileData
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.optim import make_optimizer
from gravlens_jax.preprocess import prepare, to_unit
from gravlens_jax.sharding import check_batch_size, data_mesh, replicate, shard_batch, wait_for_all
from gravlens_jax.stream import StreamData
from gravlens_jax.train_step import Batch, TrainState, init_state, train_step

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
TOPOLOGY_COLUMNS = (
    "topology      {topology}chips{chips}  program {program}  batch{batch_size}  compile s{compile_seconds:.1f}"
    "   GFLOP{gflops:.2f}  temporary MiB{temporary_mib:.0f}  collective MiB{collective_mib:.2f}"
    "  collectives  {collectives}"
)


def random_batch(batch_size: int, size: int) -> dict[str, np.ndarray]:
    """Returns a batch of random photon counts (uint16) with labels; speed does not depend on the pixels' values."""
    images = np.random.default_rng(0).poisson(100, (batch_size, size, size)).astype(np.uint16)
    return {"images": images, "labels": (np.arange(batch_size) % len(CLASSES)).astype(np.int32)}


def _set_up(config: Config, auxiliary: bool = False) -> tuple[ResNet, Callable[[], TrainState], Callable]:
    """Returns the network, a function that returns the first state, and the step (state, batch) -> (state, sums)."""
    model, tx = make_model(config.model, config.input, CLASSES), make_optimizer(config.optim, 1000)
    init = partial(init_state, 0, model=model, tx=tx, config=config.optim, auxiliary=auxiliary)
    return model, init, partial(train_step, model=model, tx=tx, config=config)


def compile_program(lowered: jax.stages.Lowered) -> tuple[Any, Row]:
    """Compiles a program; returns it, and facts about its part on one device by the compiler's count.

    Returns:
      compiled: the program.
      facts: compile_seconds; gflops; accessed_bytes, the memory traffic; memory_mib, of arguments, results and
        temporaries; temporary_mib; collectives, the number of each kind; collective_mib, of all their results.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory, costs = time.perf_counter() - start, compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None, "this compiler does not count memory"
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    found = re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", compiled.as_text() or "")
    results = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", " ".join(result for result, _ in found))  # f32[2,3], pred[8]
    size = sum(int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n) for bits, shape in results)
    return compiled, {
        "compile_seconds": seconds,
        "gflops": costs.get("flops", 0) / 1e9,
        "accessed_bytes": float(costs.get("bytes accessed", 0)),
        "memory_mib": held / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "collectives": dict(Counter(kind for _, kind in found)),
        "collective_mib": size / 2**20,
    }


def compile_step(case: Case) -> tuple[Run, Row]:
    """Compiles a step; in a run of several processes all must call this, and then `run`, with the same arguments.

    Returns:
      run: (warmup, steps) -> sorted seconds of `steps` steps after `warmup` others; each waits for its result. Of a
        process that owns none of the devices: waits for the others, and returns no seconds.
      facts: of `compile_program`; and transfer_seconds, of a batch to the devices. Empty in such a process.
    """
    mesh = data_mesh(case.devices)
    check_batch_size(case.batch_size, mesh)
    wait_for_all(f"compile {case}")
    step: Callable | None = None
    facts: Row = {}
    if mesh.local_devices:
        model, init, train = _set_up(case.config)
        state, share = replicate(init(), mesh), case.batch_size // mesh.size * len(mesh.local_devices)
        host_batch = random_batch(share, case.image_size)
        batch = shard_batch(host_batch, mesh)

        def infer(state, batch):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            return state, model.apply(variables, prepare(to_unit(batch["images"]), model.input))[0]

        program = jax.jit(train if case.train else infer, donate_argnums=0)
        compiled, facts = compile_program(program.lower(state, batch))
        transfers = time_calls(lambda: shard_batch(host_batch, mesh), 3, 10)
        facts["transfer_seconds"] = statistics.median(transfers)
        step = partial(next, _run_steps(compiled, state, itertools.repeat(batch)))

    def run(warmup: int, steps: int) -> list[float]:
        wait_for_all(f"time {case}")
        return time_calls(step, warmup, steps) if step else []

    return run, facts


def _run_steps(step_fn: Callable, state: TrainState, batches: Iterable[Batch]) -> Iterator[Any]:
    """Yields the results of one step after another; each starts when its result is requested."""
    for batch in batches:
        state, result = step_fn(state, batch)
        yield result


def _read_late(results: Iterator[Any], steps: int) -> Any:
    """Runs steps and reads the results of each one step late, as `training.fit` does; returns the last."""
    previous = None
    for result in itertools.islice(results, steps):
        jax.device_get(previous)
        previous = result
    return previous


def busy_fraction(case: Case, steps: int, repeats: int = 3) -> float:
    """Returns the fraction of the wall time of a training epoch that its steps need by themselves, on one device.

    The epoch reads a memory-mapped file, and alternates with the same number of steps on a batch that is on the device.
    The ratio of the medians can exceed 1 by the noise of the timing.

    Args:
      case: the training step.
      steps: of the epoch.
      repeats: epochs to time.
    """
    mesh = data_mesh(1)
    _, init, step = _set_up(case.config)
    step_fn = jax.jit(step, donate_argnums=0)
    images, labels = random_batch(case.batch_size * steps, case.image_size).values()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npz"
        write_npz(path, [images], images.shape, images.dtype, labels, CLASSES, {})
        source = FileData(open_npz(path), case.batch_size, 0, mesh)
        batch = shard_batch(random_batch(case.batch_size, case.image_size), mesh)
        read = (batch for epoch in itertools.count() for _, batch in source.batches(epoch))
        batches = {"alone": itertools.repeat(batch), "epoch": read}
        results = {name: _run_steps(step_fn, replicate(init(), mesh), own) for name, own in batches.items()}
        runs = {name: partial(_read_late, own, steps) for name, own in results.items()}
        seconds = alternate(runs, lambda name: time_calls(runs[name], 0, 1)[0], 1 + repeats)
    return statistics.median(seconds["alone"][1:]) / statistics.median(seconds["epoch"][1:])  # the first ones compile


def topology_mesh(name: str) -> Mesh:
    """Returns a mesh over all chips of a topology such as v5e:2x2, v5p:2x2x1 or v6e:16x16; needs libtpu."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud for the machine's type otherwise
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; expected one such as v5e:2x2") from None
    return Mesh(np.array(topology.devices), ("data",))


def compile_for_tpus(names: tuple[str, ...], batch_per_chip: int, model: ModelConfig) -> Iterator[Row]:
    """Yields topology, chips and the results of `compile_run` for the default recipe with the network `model`."""
    for name in names:
        mesh = topology_mesh(name)
        config = Config(batch_size=batch_per_chip * mesh.size, model=model)
        for row in compile_run(config, mesh, "tpu"):
            yield {"topology": name, "chips": mesh.size} | row


def compile_run(config: Config, mesh: Mesh, platform: str) -> Iterator[Row]:
    """Yields program, batch_size and `compile_program`'s facts of "train", a step, and "simulate", that of its batch.

    Args:
      config: the run; its batch size is over all devices.
      mesh: devices that need not exist.
      platform: of the devices, such as "tpu".
    """
    whole, shares = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    _, init, step = _set_up(config, auxiliary=True)
    priors = PRIORS["ct1"]
    grid = map_grid(config.input, priors)
    source = StreamData(config.batch_size, priors, SPLITS.index("train"), config.batch_size, 0, mesh, grid)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    simulate = source.render.trace(number, number, number)
    state, batch = _sharded(jax.eval_shape(init), whole), _sharded(simulate.out_info, shares)
    train = jax.jit(step, donate_argnums=0, out_shardings=whole).trace(state, batch)
    for program, traced in {"train": train, "simulate": simulate}.items():
        _, facts = compile_program(traced.lower(lowering_platforms=(platform,)))
        yield {"program": program, "batch_size": config.batch_size} | facts


def _sharded(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
