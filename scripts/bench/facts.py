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
VARIABLES = "JAX_", "XLA_", "LIBTPU_", "GLIBC_TUNABLES"  # prefixes of environment variables


def machine_facts() -> dict[str, Any]:
    """Returns what measurements depend on here, for JSON; it uses the devices of JAX. None is what cannot be known."""
    import jax

    device, home = jax.devices()[0], str(Path.home())
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join(sys.argv).replace(home, "~"),
        "gravlens_jax": gravlens_jax.__version__,
        "commit": commit(),
        "versions": versions(),
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "device_memory_mib": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**20 or None,
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "environment": {k: v.replace(home, "~") for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def describe(facts: dict[str, Any]) -> str:
    """Returns the most important of `machine_facts` in a line, to be quoted with a table."""
    devices = f"{facts['device_count']} x {facts['device_kind']}, {facts['cores']} cores of {facts['cpu']}"
    own = f"gravlens_jax {facts['gravlens_jax']} ({(facts['commit'] or 'no clone')[:9]})"
    shown = [f"{name} {v}" for name, v in facts["versions"].items() if re.match("jax$|libtpu|torch|nvidia-cudnn", name)]
    return ", ".join([devices, own, *shown, facts["started"]])


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


def _cpu() -> str:
    """Returns the name of the CPU, or else of its architecture."""
    with suppress(OSError):
        if found := re.search(r"(?<=model name\t: ).+", Path("/proc/cpuinfo").read_text()):
            return found[0].strip()
    return platform.processor() or platform.machine()
