"""Tests run on two virtual CPU devices, and JAX refuses to broadcast between ranks.

Most of their time is compilation. So XLA makes the machine code without optimizing it (of the program itself it leaves
no optimization out), and compiled programs are kept in a folder that all tests, and the programs that they start, share
while they run. Who reads there what another one is writing, or was killed while writing, warns and compiles.
"""

import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent,ignore:Error writing persistent")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real images and published weights, where there are any


LONGEST = ("test_processes.py", "test_faults.py", "test_end_to_end.py", "test_simulate.py")


def pytest_collection_modifyitems(items):
    """The longest files come first, so that the short ones keep all workers busy to the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "real" / "dataset").is_dir():
        pytest.skip("needs real images and published weights beside the repository")
    return SHARED


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function that runs a script in this process, which is faster than to start another.

    It returns what the script prints, or if the status is not 0 what it says went wrong.
    """
    from gravlens_jax import cli

    def run(folder, script, *arguments, status=0):
        path = ROOT / "scripts" / script
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        monkeypatch.setattr(cli, "silence_orbax", lambda: None)
        handler, code = signal.getsignal(signal.SIGTERM), 0
        capsys.readouterr()
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        assert code == status, (code, out, err)
        return out if status == 0 else err

    return run
