"""What measurements depend on: versions, devices and settings. Importing it imports no jax."""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import gravlens_jax

PACKAGES = "jax|jaxlib|flax|optax|numpy|torch|libtpu|jax-(cuda|rocm).*|nvidia-(cudnn|cuda-runtime|cublas)(-cu.*)?"
DRIVERS = "/proc/driver/nvidia/version", "/sys/module/amdgpu/version"
VARIABLES = "JAX_", "XLA_", "LIBTPU_", "GLIBC_TUNABLES"  # prefixes of environment variables


def utc_time() -> str:
    """Returns the time, such as 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


STARTED = utc_time()  # of this run, the same in all its lines


def machine_facts() -> dict[str, Any]:
    """Returns what measurements depend on here, for JSON; it uses the devices of JAX. None is what cannot be known."""
    import jax

    device = jax.devices()[0]
    return {
        "started": STARTED,
        "command": without_home(shlex.join(sys.argv)),
        "gravlens_jax": gravlens_jax.__version__,
        "commit": commit(),
        "versions": versions(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "device_memory_mib": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**20 or None,
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "driver": _find(r"\b\d+\.\d[\d.]*", *DRIVERS),
        "cpu": _find(r"(?<=model name\t: ).+", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "environment": {k: without_home(v) for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def describe(facts: dict[str, Any]) -> str:
    """Returns the most important of `machine_facts` in a line, to be quoted with a table."""
    devices = f"{facts['device_count']} x {facts['device_kind']}, {facts['cpu_cores']} cores of {facts['cpu']}"
    own = f"gravlens_jax {facts['gravlens_jax']} ({(facts['commit'] or 'no clone')[:9]})"
    shown = [f"{name} {v}" for name, v in facts["versions"].items() if re.match("jax$|libtpu|torch|nvidia-cudnn", name)]
    return ", ".join([devices, f"driver {facts['driver'] or 'none'}", own, *shown, facts["started"]])


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those PACKAGES that are installed, also CUDA and cuDNN if by pip."""
    found = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    own = {name: found[name] for name in sorted(found) if re.fullmatch(PACKAGES, name)}
    return {"python": platform.python_version()} | own


def commit() -> str | None:
    """Returns the git commit of this clone, ending in -dirty if a file was changed; None outside of a clone."""
    root = Path(gravlens_jax.__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):  # there is no git
        if (root / ".git").exists():  # else the repository around it is somebody else's
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def without_home(text: str) -> str:
    """Returns the text with ~ for home folders."""
    own = os.path.expanduser("~").rstrip("/")
    patterns = [re.escape(own) + r"(?![\w.-])"] * bool(own) + [r"/(?:home|Users)/[^/\s'\":,]+"]
    return re.sub("|".join(patterns), "~", text)


def _find(pattern: str, *paths: str) -> str | None:
    """Returns the first match in the first of the files that can be read."""
    for path in paths:
        with suppress(OSError):
            found = re.search(pattern, Path(path).read_text())
            return found and found[0].strip()
    return None
