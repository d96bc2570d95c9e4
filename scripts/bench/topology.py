"""The programs of a run, compiled for TPUs ahead of time, where there is none; for `scripts/benchmark.py compile`."""

import math
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gravlens_jax.config import CLASSES, SPLITS, Config
from gravlens_jax.datasets import deflection_grid
from gravlens_jax.errors import InputError
from gravlens_jax.lensing.priors import PRESETS
from gravlens_jax.stream import StreamData
from gravlens_jax.model import make_model
from gravlens_jax.optim import make_optimizer
from gravlens_jax.train_step import init_state, train_step

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def topology_mesh(name: str) -> Mesh:
    """Returns a mesh over all chips of a topology such as v5e:2x2, v5p:2x2x1 or v6e:16x16; needs libtpu."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud for the machine's type otherwise
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; expected one such as v5e:2x2") from None
    return Mesh(np.array(topology.devices), ("data",))


def programs(config: Config, mesh: Mesh) -> Iterator[tuple[str, jax.stages.Traced]]:
    """Yields the name and the trace of a training step, and of the step that simulates its batch.

    Args:
      config: the run; its batch size is over all devices.
      mesh: devices that need not exist.
    """
    config = config.resolve()
    whole, shares = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    model, tx = make_model(config.model, config.input, CLASSES), make_optimizer(config.optim, 1000)
    init = partial(init_state, model=model, tx=tx, config=config.optim, auxiliary=True)
    state = jax.tree.map(partial(_sharded, sharding=whole), jax.eval_shape(init, 0))
    priors = PRESETS["ct1"]
    grid = deflection_grid(config, priors)
    source = StreamData(config.batch_size, priors, SPLITS.index("train"), config.batch_size, 0, mesh, grid)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    simulate = source.render.trace(number, number, number)
    batch = jax.tree.map(partial(_sharded, sharding=shares), simulate.out_info)
    step = partial(train_step, model=model, tx=tx, config=config)
    yield "train", jax.jit(step, donate_argnums=0, out_shardings=whole).trace(state, batch)
    yield "simulate", simulate


def _sharded(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_for(traced: jax.stages.Traced, platform: str) -> dict[str, Any]:
    """Returns compile_seconds; gflops, memory_mib (temporary) and collectives, each of one device."""
    start = time.perf_counter()
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return {
        "compile_seconds": seconds,
        "gflops": (compiled.cost_analysis() or {}).get("flops", 0) / 1e9,
        "memory_mib": memory.temp_size_in_bytes / 2**20,
        "collectives": count_collectives(compiled.as_text()),
    }


def count_collectives(program: str) -> dict[str, dict[str, int]]:
    """Returns the number of each kind of collective in the text of a program, and the bytes of their results."""
    found: dict[str, dict[str, int]] = {}
    for kind in COLLECTIVES:
        for result in re.findall(rf" = (.*?) {kind}(?:-start)?\(", program):
            own = found.setdefault(kind, {"number": 0, "bytes": 0})
            own["number"] += 1
            for bits, shape in re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", result):  # pred[8], f32[2,3]
                own["bytes"] += int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
    return found


HEADER = f"{'topology':14}{'chips':>6} {'program':9}{'batch':>7}{'compile s':>10}{'GFLOP':>8}{'MiB':>7}  collectives"


def line(row: dict[str, Any]) -> str:
    """Returns a row as a line of the table; GFLOP, MiB of temporary memory and collectives are those of one chip."""
    some = (f"{own['number']} {kind} of {own['bytes'] / 2**20:.2f} MiB" for kind, own in row["collectives"].items())
    return (
        f"{row['topology']:14}{row['chips']:6} {row['program']:9}{row['batch_size']:7}{row['compile_seconds']:10.1f}"
        f"{row['gflops']:8.2f}{row['memory_mib']:7.0f}  {', '.join(some) or '-'}"
    )
