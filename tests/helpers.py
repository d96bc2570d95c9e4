"""What several test modules share: scripts as a user runs them, small data sets, runs and networks."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from gravlens_jax import PRIORS, InputError, checkpoint
from gravlens_jax.cli import HUGE_PAGES
from gravlens_jax.config import CLASSES, Config, InputConfig, ModelConfig
from gravlens_jax.model import make_model
from gravlens_jax.network import Network
from gravlens_jax.npz import write_npz
from gravlens_jax.optim import make_optimizer
from gravlens_jax.run_files import RunInfo, create_run, read_run
from gravlens_jax.train_step import init_state

ROOT = Path(__file__).parent.parent
CONSTANT = ["--optim.decay", "constant"]  # runs of any length are then the same program, compiled once
NETWORK = ["--preset", "smoke", "--model.width", "4", "--input.crop", "48", "--input.pool", "4", *CONSTANT]
SMALL = [*NETWORK, "--simulation.train", "96", "--simulation.val", "24", "--simulation.test", "24"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

TINY_PRIORS = replace(PRIORS["ct1"], num_pixels=24, pixel_scale=0.3)
TINY = Config(model=ModelConfig(depth=8, width=4), input=InputConfig(crop=16, pool=1))
TINY_INFO = RunInfo(TINY, CLASSES, (16, 16))
TINY_MODEL = make_model(TINY.model, TINY.input, CLASSES)
INIT = jax.jit(partial(init_state, model=TINY_MODEL, tx=make_optimizer(TINY.optim, 10), config=TINY.optim))


def make_state(step):
    """Returns the state of a tiny network, a function of `step`."""
    return INIT(step)._replace(step=jax.numpy.int32(step))


def make_variables(step):
    """Returns the variables of `make_state`."""
    return {"params": make_state(step).params, "batch_stats": make_state(step).batch_stats}


def make_run(run_dir, losses):
    """Makes a run with a checkpoint of each loss, at steps 1, 2, ...; None is a save within an epoch."""
    create_run(run_dir, TINY_INFO)
    with checkpoint.open_checkpoints(run_dir) as manager:
        for epoch, loss in enumerate(losses):
            checkpoint.save(manager, make_state(epoch + 1), loss)


def assert_equal(a, b):
    """Two trees of arrays are the same, bitwise."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_npz(path, images, **options):
    """Writes images with labels 0, 1, 2, 0, ... in this project's format."""
    labels = np.arange(len(images)) % 3
    write_npz(path, [images], images.shape, images.dtype, labels, CLASSES, {"source": "test"}, **options)
    return path


def make_folders(root, train=2, val=4, shape=(1, 8, 8), dtype=np.float64, classes=CLASSES):
    """Writes noise as `root/{train,val}/<class>/<number>.npy`, with a number of files for each class."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for name in classes if n else ():
            (root / split / name).mkdir(parents=True)
            for i in range(1, n + 1):
                np.save(root / split / name / f"{i}.npy", (rng.random(shape) * 200).astype(dtype))
    return root


def start(folder, script, *arguments, devices=1, optimized=False, **options):
    """Starts a script in `folder` on `devices` virtual devices; `optimized` is with XLA's flags for users."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    # Without HUGE_PAGES train.py would start Python a second time; a notebook may set MPLBACKEND.
    environment |= {"GLIBC_TUNABLES": HUGE_PAGES, "MPLBACKEND": "module://not_there"}
    if optimized:
        environment.pop("XLA_FLAGS", None)
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, **(PIPES | {"env": environment} | options))


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


def run_code(code, *arguments, **environment):
    """Runs Python code in a process of its own, with these variables in its environment; returns its output."""
    paths = {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "scripts", "tests"))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ((out, _),) = finish(subprocess.Popen(command, env=os.environ | paths | environment, **PIPES))
    return out


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
    return checkpoint.load_variables(run_dir, make_model(info.config.model, info.config.input, info.classes), which)


def tiny_config(folder, **changes):
    """Writes noise of 16 x 16 pixels into `folder`/data; returns the config of a run on it of 2 + 2 x 4 steps."""
    for split, n in (("easy", 8), ("train", 16), ("val", 6), ("test", 6)):
        images = np.random.default_rng(n).poisson(50, (n, 16, 16)).astype(np.uint16)
        save_npz(folder / f"data/{split}.npz", images)
    optim = replace(TINY.optim, decay="constant")
    places = {"data": str(folder / "data"), "run_dir": str(folder / "run")}
    return replace(TINY, batch_size=4, epochs=2, optim=optim, **places | changes)


@cache
def make_network(side=16, **changes):
    """Returns an untrained tiny network for images of `side` x `side` pixels; `changes` are of its model."""
    return Network(TINY_MODEL.clone(**changes), make_variables(1), (side, side))


def make_mapping_network(pixel_scale, side=16, **changes):
    """Returns `make_network` with a random head of deflection maps."""
    network, rng = make_network(side, pixel_scale=pixel_scale, **changes), np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(16, 2)).astype(np.float32), "bias": np.float32([0.1, -0.2])}
    return replace(network, variables={**network.variables, "deflection": head})


@contextmanager
def limited_memory(most):
    """Asserts that Python and NumPy hold less than `most` more bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def make_bars(n, classes, side=16):
    """Returns images, labels: 2 classes, horizontal and vertical bars; with `classes` = 3, noise is class 0."""
    labels = np.arange(n, dtype=np.int32) % classes
    images = np.random.default_rng(0).random((n, side, side)).astype(np.float32) * 0.2
    images[labels == classes - 2, 4:12] += 0.5
    images[labels == classes - 1, :, 4:12] += 0.5
    return images, labels


def refuse(message, function, *arguments, **options):
    """Asserts that the call is an InputError whose text matches the message, a regular expression."""
    with pytest.raises(InputError, match=message):
        function(*arguments, **options)
