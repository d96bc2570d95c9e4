"""Training steps and inference: compiled, also for TPUs that are not here, with facts about the programs, and timed."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.costs import Case
from bench.harness import Row, Run, time_calls
from gravlens_jax.config import CLASSES, SPLITS, Config
from gravlens_jax.datasets import map_grid
from gravlens_jax.errors import InputError
from gravlens_jax.inference import _outputs, logits
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.optim import make_optimizer
from gravlens_jax.sharding import data_mesh, replicate, shard_batch, shard_rows
from gravlens_jax.stream import StreamData
from gravlens_jax.train_step import Batch, TrainState, init_state, train_steps

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
TOPOLOGY_COLUMNS = (
    "topology   {topology}chips{chips}program  {program}batch{batch_size}compile s{compile_seconds:.1f}"
    "  GFLOP{gflops:.2f}temporary MiB{temporary_mib:.0f}collective MiB{collective_mib:.2f}collectives {collectives}"
)


def random_batch(case: Case, n: int) -> dict[str, np.ndarray]:
    """Returns `n` images of random photon counts (uint16), labels and, for a training step, deflections of 0.

    Speed does not depend on the values.
    """
    size, cells = case.image_size, case.config.input.cells
    batch: dict[str, np.ndarray] = {"images": np.random.default_rng(0).poisson(100, (n, size, size)).astype(np.uint16)}
    batch["labels"] = (np.arange(n) % len(CLASSES)).astype(np.int32)
    if case.train:
        batch["deflections"] = np.zeros((n, cells, cells, 2), np.float32)
    return batch


def _set_up(config: Config) -> tuple[ResNet, Callable[[], TrainState], Callable]:
    """Returns the network, a function that returns the first state, and the step (state, batch) -> (state, sums)."""
    model, tx = make_model(config.model, config.input, CLASSES), make_optimizer(config.optim, 1000)
    init = partial(init_state, 0, model=model, tx=tx, config=config.optim, auxiliary=True)
    return model, init, partial(train_steps, model=model, tx=tx, config=config)


def compile_program(lowered: jax.stages.Lowered) -> tuple[Any, Row]:
    """Compiles a program; returns it, and facts about its part on one device by the compiler's count.

    Returns:
      compiled: the program.
      facts: compile_seconds; gflops; accessed_bytes, the memory traffic; collectives, the number of each kind;
        collective_mib, of all their results; and if the compiler counts memory, memory_mib, of arguments, results and
        temporaries, and temporary_mib.
    """
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory, costs = time.perf_counter() - start, compiled.memory_analysis(), compiled.cost_analysis() or {}
    counted = {}
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        counted = {"memory_mib": held / 2**20, "temporary_mib": memory.temp_size_in_bytes / 2**20}
    found = re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", compiled.as_text() or "")
    results = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", " ".join(result for result, _ in found))  # f32[2,3], pred[8]
    size = sum(int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n) for bits, shape in results)
    return compiled, {
        "compile_seconds": seconds,
        "gflops": costs.get("flops", 0) / 1e9,
        "accessed_bytes": float(costs.get("bytes accessed", 0)),
        "collectives": dict(Counter(kind for _, kind in found)),
        "collective_mib": size / 2**20,
    } | counted


def compile_step(case: Case) -> tuple[Run, Row]:
    """Compiles a step.

    Returns:
      run: (warmup, calls) -> sorted seconds of a step, of `calls` calls after `warmup` others; see `time_calls`.
      facts: of `compile_program`.
    """
    mesh = data_mesh(case.devices)
    model, init, train = _set_up(case.config)

    def infer(state, batch):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state, logits(model, variables, batch["images"])

    state, batch = replicate(init(), mesh), _batch_on_devices(case, mesh)
    program = jax.jit(train if case.train else infer, donate_argnums=0)
    compiled, facts = compile_program(program.lower(state, batch))

    def steps(state: TrainState) -> Iterator[Any]:
        while True:  # the next one starts when its result is requested
            state, result = compiled(state, batch)
            yield result

    step = partial(next, steps(state))

    def run(warmup: int, calls: int, most_seconds: float = math.inf) -> list[float]:
        return [call / case.steps_per_call for call in time_calls(step, warmup, calls, most_seconds)]

    return run, facts


def _batch_on_devices(case: Case, mesh: Mesh) -> Batch:
    """Returns the batch of a call, as `loader` moves it to the devices."""
    if case.steps_per_call == 1:
        return shard_batch(random_batch(case, case.batch_size), mesh)
    n, shape = 4096, (case.steps_per_call, case.batch_size)
    rows = np.random.default_rng(0).integers(n, size=shape, dtype=np.int32)
    return replicate(random_batch(case, n), mesh) | {"rows": shard_rows(rows, mesh)}


def topology_mesh(name: str) -> Mesh:
    """Returns a mesh over all chips of a topology such as v5e:2x2, v5p:2x2x1 or v6e:16x16; needs libtpu."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud for the machine's type otherwise
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; expected one such as v5e:2x2") from None
    return Mesh(np.array(topology.devices), ("data",))


def compile_run(config: Config, mesh: Mesh, platform: str) -> Iterator[Row]:
    """Yields program, batch_size and `compile_program`'s facts of the programs of a run.

    These are "train", a step; "simulate", that of its batch; and "logits" and "map", inference of a batch: of its
    logits, and of these and the deflection by the substructure.

    Args:
      config: the run; its batch size is over all devices.
      mesh: devices that need not exist.
      platform: of the devices, such as "tpu".
    """
    whole, shares = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    model, init, step = _set_up(config)
    priors = PRIORS["ct1"]
    grid = map_grid(config.input, priors)
    source = StreamData(config.batch_size, priors, SPLITS.index("train"), config.batch_size, 0, mesh, grid)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    simulate = source.render.trace(number, number, number)
    state, batch = _sharded(jax.eval_shape(init), whole), _sharded(simulate.out_info, shares)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = jax.ShapeDtypeStruct(batch["images"].shape, jnp.float32, sharding=shares)
    shapes = {"kernel": (4 * model.width, 2), "bias": (2,)}
    head = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for name, shape in shapes.items()}
    deflect = partial(_outputs, model=model, tta=False, maps=True)
    programs = {  # a further program of the package is a further line
        "train": jax.jit(step, donate_argnums=0, out_shardings=whole).trace(state, batch),
        "simulate": simulate,
        "logits": jax.jit(partial(logits, model), out_shardings=shares).trace(variables, images),
        "map": jax.jit(deflect, out_shardings=shares).trace(variables | {"deflection": head}, images),
    }
    for program, traced in programs.items():
        _, facts = compile_program(traced.lower(lowering_platforms=(platform,)))
        yield {"program": program, "batch_size": config.batch_size} | facts


def _sharded(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
