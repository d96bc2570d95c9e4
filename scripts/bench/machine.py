"""Facts about this machine that measurements depend on, and helpers for timing."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.costs import find_peaks


def time_calls(function: Callable[[], Any], warmup: int, calls: int) -> list[float]:
    """Returns the sorted seconds of `calls` calls of `function` after `warmup` others; each waits for its result."""
    seconds = []
    for _ in range(warmup + calls):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[warmup:])


def medians(runs: dict[Any, list[dict[str, float]]]) -> dict[Any, dict[str, float]]:
    """Returns the medians over repeated measurements of each case."""
    return {case: {k: float(np.median([run[k] for run in some])) for k in some[0]} for case, some in runs.items()}


def peaks(dtype: str) -> dict[str, float]:
    """Returns the device's peak {"tflops", "bandwidth"} (TFLOP/s, GB/s): from the table; measured on a CPU.

    On a CPU these are the best of a few 2048 x 2048 float32 matrix products and copies of 256 MiB (read and write).
    Empty for an unknown device.
    """
    if jax.default_backend() == "cpu":
        a = jnp.ones((2048, 2048))
        matmul = jax.jit(lambda a: a @ a)
        product = min(time_calls(lambda: matmul(a), 3, 10))
        source, target = np.ones(2**25), np.ones(2**25)
        copy = min(time_calls(lambda: np.copyto(target, source), 1, 5))
        return {"tflops": 2 * 2048**3 / product / 1e12, "bandwidth": 2 * source.nbytes / copy / 1e9}
    values = find_peaks(jax.devices()[0].device_kind)
    return {"tflops": values[dtype], "bandwidth": values["bandwidth"]} if values else {}


def versions() -> dict[str, str]:
    """Returns the versions of jax, numpy and Python."""
    return {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}


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
        "versions": versions(),
    }


def use_cpu_devices(devices: int) -> None:
    """Splits the CPU into `devices` virtual devices, where JAX runs on one; call it before anything uses a device."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
