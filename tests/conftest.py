"""Tests run on two virtual CPU devices, and JAX refuses to broadcast between ranks."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import pytest

SHARED = Path(__file__).parent.parent.parent / "shared"  # real images and published weights, where there are any


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "real" / "dataset").is_dir():
        pytest.skip("needs real images and published weights beside the repository")
    return SHARED
