"""One axis, "data", over all devices of all processes: parameters are on every device, a batch is spread over them.

Every process runs the same program on batches of the same order, and reads only its own rows of each.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gravlens_jax.config import check


def data_mesh(devices: int | None = None) -> Mesh:
    """Returns the mesh of the first `devices` devices, or of all."""
    used = jax.devices()[:devices]
    check(devices in (None, len(used)), f"{devices} devices asked for, {len(used)} found: {used}")
    return jax.make_mesh((len(used),), ("data",), axis_types=(AxisType.Auto,), devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split evenly."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(rows: np.ndarray) -> np.ndarray:
    """Returns this process's share (steps, batch / processes) of the rows (steps, batch) of many batches."""
    return np.split(rows, jax.process_count(), axis=1)[jax.process_index()]


def is_main() -> bool:
    """Whether this process is the one that prints and writes reports."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """Returns the largest of the values that the processes give; all must call, at the same point."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch on the devices, its first axis split evenly, from each process's own share of it.

    Give new arrays: JAX may use their memory.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shard_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the rows (steps, batch) of many batches on the devices, the second axis split evenly."""
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, "data")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless the devices can share a batch evenly."""
    n = mesh.size
    check(
        batch_size % n == 0,
        f"batch_size={batch_size} is not divisible by {n} devices; try {max(n, batch_size // n * n)}",
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree of arrays, the same in every process, with a copy on every device."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))
