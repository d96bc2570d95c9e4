"""One axis, "data", over all devices of all processes: parameters are on every device, a batch is spread over them.

Every process runs the same program on batches of the same order, and reads only its own rows of each.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gravlens_jax.errors import InputError, check

DEAD_SECONDS = 60  # a process without a heartbeat for so long is considered dead, and the others end
EXPLICIT = "give --coordinator HOST:PORT --num-processes N --process-id I"


def join_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run; does nothing if this is the only one. Call it before anything touches a device.

    Args:
      coordinator: HOST:PORT of process 0; or "auto" for what JAX knows of the cluster (SLURM, Open MPI, Cloud TPU,
        Kubernetes), the default for several SLURM or Open MPI tasks or TPU workers.
      num_processes: of the run; with HOST:PORT only.
      process_id: 0, 1, ... of this one; with HOST:PORT only.

    Raises:
      InputError: arguments that do not belong together, or an incomplete or unknown cluster.
    """
    given = coordinator not in (None, "auto")
    check(
        (num_processes is not None) == (process_id is not None) == given,
        f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: give all three, or none",
    )
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        check(bool(host) and port.isdecimal(), f"coordinator={coordinator}: expected HOST:PORT, or auto")
        last = num_processes - 1
        check(0 <= process_id <= last, f"process_id={process_id}: expected 0 to {last} for {num_processes=}")
        # On this machine alone nobody else needs to reach the port.
        bind = coordinator if host in ("localhost", "127.0.0.1", "[::1]") else None
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=DEAD_SECONDS,
            cluster_detection_method="deactivate",
        )
    elif cause := "--coordinator auto" if coordinator else _find_cluster():
        _join_cluster(cause)


def _find_cluster() -> str | None:
    """Returns the environment variable, NAME=VALUE, that tells of several processes; None for a single one."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        tasks = os.environ.get(name) or "1"
        check(tasks.isdecimal(), f"{name}={tasks}: expected a number of processes; unset {name}, or {EXPLICIT}")
        if int(tasks) > 1:
            return f"{name}={tasks}"
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return f"TPU_WORKER_HOSTNAMES={hosts}" if "," in hosts else None


def _join_cluster(cause: str) -> None:
    """Joins the processes that JAX detects; InputError that names `cause`, why it should, if it cannot."""
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_SECONDS)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # what JAX raises for missing or bad variables
        if jax.distributed.is_initialized():  # complete, but a process cannot be reached
            raise
        name, alone = cause.partition("=")[0], "if this is the only process"
        undo = f"leave it out {alone}" if cause.startswith("--") else f"unset {name} {alone}"
        raise InputError(f"{cause}: JAX detects no complete cluster ({error}); {undo}, or {EXPLICIT}") from error


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
    """Returns when every process has come here; `where` is in words, the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def agree(value: int) -> int:
    """Returns the largest of the values that the processes give; all must call, at the same point."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch on the devices, split evenly, from each process's share of it: new arrays, which JAX may keep."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shard_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Returns the rows (steps, batch) of many batches on the devices, the second axis split evenly."""
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, "data")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless the devices can share a batch evenly."""
    n, possible = mesh.size, max(mesh.size, batch_size // mesh.size * mesh.size)
    check(batch_size % n == 0, f"batch_size={batch_size} is not divisible by {n} devices; try {possible}")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree of arrays, the same in every process, with a copy on every device."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))
