"""Full and read-only disks: one error, and existing files stay."""

import gc
import logging
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from export import FORMATS, export_network
from gravlens_jax import InputError, checkpoint, fit, load_network, open_npz
from gravlens_jax.config import SimulationConfig
from gravlens_jax.datasets import simulate_dataset
from gravlens_jax.files import locked
from gravlens_jax.report import evaluate_network
from gravlens_jax.run_files import read_history, write_history
from helpers import TINY_PRIORS, load, make_folders, make_run, make_state, refuse, save_npz, tiny_config
from pack import pack

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextmanager
def small_files(size):
    """Files may have at most `size` bytes, as on a full disk; no compiled programs are stored, which would be cut."""
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)


@pytest.fixture
def disk(tmp_path):
    """A file system of 600 KB, for root on Linux."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def silence(caplog):
    """Hides what the scripts hide: several tasks of Orbax fail, each with a message."""
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.CRITICAL, name)
    yield
    gc.collect()


def complete(run_dir):
    """Returns the names of the complete checkpoints, without what a failed save left for the next one to remove."""
    return [f.name for f in (run_dir / "checkpoints").iterdir() if not f.name.endswith(".orbax-checkpoint-tmp")]


def simulate(folder):
    simulate_dataset(folder / "simulated", SimulationConfig(train=30), priors=TINY_PRIORS)


def write_report(folder):
    images = save_npz(folder / "three.npz", np.zeros((3, 16, 16), np.float32))
    evaluate_network(load_network(folder / "run"), open_npz(images), out=folder / "report")


@pytest.mark.parametrize(
    "name, write",
    [
        ("packed/.*/train.npz", lambda folder: pack(folder / "source", folder / "packed")),
        ("simulated/train.npz", simulate),
        *((f"net{x}", lambda folder, x=x: export_network(folder / "run", folder / f"net{x}")) for x in FORMATS),
        ("metrics.jsonl", lambda folder: write_history(folder / "run", [{"step": 2}] * 1000)),
        ("report/.*", write_report),
    ],
)
def test_file_too_large_for_the_disk_is_an_error_and_the_one_before_stays(tmp_path, name, write):
    make_run(tmp_path / "run", [0.5])
    write_history(tmp_path / "run", [{"step": 1}])
    for suffix in FORMATS:
        (tmp_path / f"net{suffix}").write_text("before")
    make_folders(tmp_path / "source", train=1, val=0, shape=(64, 64))
    message = f"{name} could not be written: File too large; existing files are unchanged"
    with small_files(6000), pytest.raises(InputError, match=message):
        write(tmp_path)
    assert {(tmp_path / f"net{suffix}").read_text() for suffix in FORMATS} == {"before"}
    assert read_history(tmp_path / "run") == [{"step": 1}]
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name or f.name == "train.npz"]


def save_and_fail(run_dir, reason):
    with checkpoint.open_checkpoints(run_dir) as manager:
        message = f"checkpoints.2 could not be written: {reason}; existing files are unchanged"
        refuse(message, checkpoint.save, manager, make_state(2), 0.4)
        assert complete(run_dir) == ["1"]
        assert load(run_dir, "final")[1] == 1  # its digests are right


@pytest.mark.parametrize("size", [100, 4000, 60000])  # of the files of a checkpoint, some are larger
def test_checkpoint_too_large_for_the_disk_leaves_the_one_before_and_can_be_saved_later(tmp_path, silence, size):
    make_run(tmp_path, [0.5])
    with small_files(size):
        save_and_fail(tmp_path, "File too large")
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, make_state(2), 0.4)
    assert load(tmp_path, "final")[1] == 2
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name]


def test_checkpoint_on_a_full_disk_leaves_the_one_before(disk, silence):
    make_run(disk / "run", [0.5])
    with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    save_and_fail(disk / "run", "No space left on device")
    refuse(r"a\.npz could not be written: No space left on device", export_network, disk / "run", disk / "a.npz")
    assert sorted(f.name for f in disk.iterdir()) == ["rest", "run"]


def test_run_on_a_read_only_disk_is_read_but_not_resumed(disk, tmp_path):
    make_run(disk / "run", [0.5])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    load_network(disk / "run")
    refuse(r"run could not be written: Read-only file system", locked(disk / "run").__enter__)
    refuse(r"new could not be written: Read-only file system", fit, tiny_config(tmp_path, run_dir=str(disk / "new")))


def test_run_directory_that_is_a_file_is_an_error(tmp_path):
    config = tiny_config(tmp_path)
    Path(config.run_dir).write_text("mine")
    refuse("run could not be written: File exists", fit, config)
    refuse(r"is not a run \(no config\.json\)", fit, config, resume=True)
    assert Path(config.run_dir).read_text() == "mine"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_error():
    code = "from gravlens_jax import cli; cli.run(lambda: print('probabilities'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno 28] No space left on device; ")
    assert done.stderr.count("\n") == 1
