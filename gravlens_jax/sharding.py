"""One axis, "data", over all devices of all processes: parameters are on every device, a batch is spread over them.

Every process runs the same program on batches of the same order, and reads only its own rows of each.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gravlens_jax.errors import InputError, check

DEAD_SECONDS = 60  # a process without a heartbeat for so long is considered dead, and the others end


def join_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, if there are several. Call it before anything touches a device.

    `coordinator` is HOST:PORT of process 0, with the number of processes and the id of this one, 0, 1, ...; or "auto",
    alone, to let JAX detect the cluster (SLURM, Open MPI, Cloud TPU, Kubernetes); or None for a single process.
    InputError if the arguments do not belong together, or JAX detects no complete cluster.
    """
    initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=DEAD_SECONDS)
    right = (num_processes is not None) == (process_id is not None) == (coordinator not in (None, "auto"))
    check(right, f"{coordinator=}, {num_processes=}, {process_id=}: give all three, none, or coordinator=auto alone")
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        check(bool(host) and port.isdecimal(), f"coordinator={coordinator}: expected HOST:PORT, or auto")
        last = num_processes - 1
        check(0 <= process_id <= last, f"process_id={process_id}: expected 0 to {last} for {num_processes=}")
        # On this machine alone nobody else needs to reach the port.
        bind = coordinator if host in ("localhost", "127.0.0.1", "[::1]") else None
        initialize(
            coordinator, num_processes, process_id, coordinator_bind_address=bind, cluster_detection_method="deactivate"
        )
    elif coordinator is not None:
        try:
            initialize()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # JAX raises these for an incomplete cluster
            if jax.distributed.is_initialized():  # complete, but a process cannot be reached
                raise
            explicit = "leave it out for a single process, or give HOST:PORT, --num-processes and --process-id"
            raise InputError(f"--coordinator auto: JAX detects no complete cluster ({error}); {explicit}") from error


def data_mesh(devices: int | None = None) -> Mesh:
    """Returns the mesh of the first `devices` devices, or of all."""
    used = jax.devices()[:devices]
    check(devices in (None, len(used)), f"{devices} devices asked for, {len(used)} found: {used}")
    return jax.make_mesh((len(used),), ("data",), axis_types=(AxisType.Auto,), devices=used)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(rows: np.ndarray) -> np.ndarray:
    """Returns this process's share (steps, batch / processes) of the rows (steps, batch) of many batches."""
    return np.split(rows, jax.process_count(), axis=1)[jax.process_index()]


def is_main() -> bool:
    """Whether this process is the one that prints and writes reports."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Waits until every process has called it; `where` is in words, the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def max_over_processes(value: int) -> int:
    """Returns the largest of the values that the processes give; all must call, at the same point."""
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch on the devices, split evenly, from each process's share of it (new arrays: JAX may keep them)."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shard_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the rows (steps, batch) of many batches on the devices, the second axis split evenly."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    return jax.make_array_from_process_local_data(sharding, local_rows(rows), rows.shape)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless the devices can share a batch evenly."""
    n = mesh.size
    check(batch_size % n == 0, f"{batch_size=} is not divisible by {n} devices; try {max(n, batch_size // n * n)}")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree of arrays, which must be the same in every process, with a copy on every device."""
    copy = jax.make_array_from_process_local_data  # `jax.device_put` would gather and compare those of all processes
    return jax.tree.map(lambda x: copy(replicated(mesh), np.asarray(x), np.shape(x)), tree)
