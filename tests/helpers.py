"""Runs the scripts as a user does, each in a process of its own; helpers of the tests that do so."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from gravlens_jax.checkpoint import load_variables
from gravlens_jax.cli import HUGE_PAGES
from gravlens_jax.config import CLASSES
from gravlens_jax.model import make_model
from gravlens_jax.npz import write_npz
from gravlens_jax.run_dir import read_run

ROOT = Path(__file__).parent.parent
CONSTANT = ["--optim.decay", "constant"]  # runs of any length are then the same program, compiled once
NETWORK = ["--preset", "smoke", "--model.width", "4", "--input.crop", "48", "--input.pool", "4", *CONSTANT]
SMALL = [*NETWORK, "--simulation.train", "96", "--simulation.val", "24", "--simulation.test", "24"]
DEFAULT_NETWORK = [*CONSTANT, "--batch-size", "16"]  # and the image size that users have


def write_images(folder, **sizes):
    """Writes a data set of noise, with the size of simulated images and `sizes` images in each file."""
    for split, n in sizes.items():
        images = np.random.default_rng(n).poisson(50, (n, 150, 150)).astype(np.uint16)
        write_npz(folder / f"{split}.npz", [images], images.shape, images.dtype, np.arange(n) % 3, CLASSES, {})


def start(folder, script, *arguments, devices=1, before=(), optimized=False, **options):
    """Starts a script in `folder`.

    Args:
      devices: number of virtual devices of the CPU.
      before: words of the command line before Python's.
      optimized: whether XLA compiles as for users, instead of with the flags of conftest.py.
    """
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    environment |= {"GLIBC_TUNABLES": HUGE_PAGES}  # or train.py would start Python a second time
    if optimized:
        environment.pop("XLA_FLAGS", None)
    command = [*before, sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    return subprocess.Popen(command, cwd=folder, **options)


def finish(*processes, status=0):
    """Waits for processes that must end with this status, without a traceback; returns (stdout, stderr) of each."""
    results = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == status, (process.returncode, out, err)
        assert "Traceback" not in (err or ""), err
    return results


def run(folder, script, *arguments, status=0, **options):
    """Runs a script; returns its output, or if the status is not 0 its error message."""
    ((out, err),) = finish(start(folder, script, *arguments, **options), status=status)
    return out if status == 0 else err


def saved_step(run_dir):
    """Returns the step of the latest checkpoint, 0 if there is none."""
    return max((int(f.name) for f in (run_dir / "checkpoints").glob("*") if f.name.isdecimal()), default=0)


def history(run_dir):
    """Returns the complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(condition, *processes):
    """Returns when the condition holds; meanwhile no process may end."""
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def wait_for_epochs(run_dir, n, *processes):
    """Returns when metrics.jsonl has `n` lines."""
    wait_for(lambda: len(history(run_dir)) >= n, *processes)


def load(run_dir, which):
    """Returns the variables of a run's checkpoint as they were saved, and their step."""
    info = read_run(run_dir)
    return load_variables(run_dir, make_model(info.config.model, info.config.input, info.classes), which)


def assert_same_parameters(a, b):
    """Best and final parameters and batch statistics of two runs agree bitwise."""
    for which in ("best", "final"):
        (ours, step), (theirs, other_step) = (load(run_dir, which) for run_dir in (a, b))
        assert step == other_step and jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
