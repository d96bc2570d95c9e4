"""Tests run on two virtual CPU devices, and JAX refuses to broadcast between ranks.

Most of their time is compilation. So XLA does not optimize machine code (it optimizes the program as always), and
compiled programs are cached in a folder that all tests, and the scripts that they start, share. A process that reads an
entry that is being written, or was cut by a kill, warns and compiles. Other code is compiled, and other kernels are
chosen, than for users: test_resume has a run with default flags and the default network, test_platform checks numbers.
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
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # see cli.fast_environment
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent,ignore:Error writing persistent")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name

import pytest

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # of nohup and of commands in the background, also for processes
        signal.signal(number, handler)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # real images and published weights, if they are there
sys.path.append(str(ROOT / "scripts"))  # for `import bench`

LONGEST = ("test_processes.py", "test_resume.py", "test_scripts.py", "test_disk.py", "test_images.py")


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so that the short ones keep all workers busy to the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "real" / "dataset").is_dir():
        pytest.skip("needs real images and published weights beside the repository")
    return SHARED


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Returns a function that runs a script in this process, which is faster than starting another one.

    It returns the script's output, or if the status is not 0 its error message.
    """
    from gravlens_jax import cli

    def run(folder, script, *arguments, status=0):
        path = ROOT / "scripts" / script
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        monkeypatch.setattr(cli, "silence_orbax", lambda: None)
        numbers, code = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), 0
        handlers = {number: signal.getsignal(number) for number in numbers}
        capsys.readouterr()
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert code == status, (code, out, err)
        return out if status == 0 else err

    return run
