"""Tests run on two virtual CPU devices, and JAX refuses to broadcast between ranks.

Most of their time is compilation. So compiled programs are kept in a folder that all tests, and the programs that they
start, share while they run.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name

import pytest

SHARED = Path(__file__).parent.parent.parent / "shared"  # real images and published weights, where there are any


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "real" / "dataset").is_dir():
        pytest.skip("needs real images and published weights beside the repository")
    return SHARED
