"""Full and read-only disks: one error, and the files before stay."""

import gc
import logging
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from commands import NETWORK, finish, run, start, wait_for, write_images
from gravlens_jax import checkpoint
from gravlens_jax.config import CLASSES, Config
from gravlens_jax.errors import InputError
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.report import evaluate_network
from gravlens_jax.run_dir import locked, read_run
from gravlens_jax.training import fit
from gravlens_jax.weights import export_run, load_run
from pack import pack
from test_checkpoint import CONFIG, assert_equal, make_run, make_state, make_variables
from test_checkpoint import MODEL as SMALL_MODEL


def limited(size):
    """Returns words that start a program whose files may have at most `size` bytes, as on a full disk.

    It stores no compiled programs, which would be cut.
    """
    code = f"""import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
os.execv(sys.argv[1], sys.argv[1:])"""
    return [sys.executable, "-c", code]


@contextmanager
def small_files(size):
    """The same for this process."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images in data/ and in runs/half a run with one of two epochs done."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data", train=48, val=24, test=24)
    run(folder, "train.py", *NETWORK, "--data", "data", "--run-dir", "runs/half", "--epochs", "1")
    config = folder / "runs/half/config.json"
    config.write_text(config.read_text().replace('"epochs": 1', '"epochs": 2'))
    return folder


def complete(run_dir):
    """Returns the names of the complete checkpoints.

    Where a save failed there may be a temporary one, in which a thread of Orbax still wrote when it was removed; the
    next save, or start, removes it.
    """
    return [f.name for f in (run_dir / "checkpoints").iterdir() if not f.name.endswith(".orbax-checkpoint-tmp")]


@pytest.mark.parametrize("file, size", [("metrics.jsonl", 300), ("checkpoints/6", 4096)])
def test_full_disk_while_training_is_one_error_and_the_best_checkpoint_stays(folder, file, size):
    name = f"full{size}"
    shutil.copytree(folder / "runs/half", folder / "runs" / name)
    err = run(folder, "train.py", "--run-dir", f"runs/{name}", "--resume", before=limited(size), status=2)
    assert f"runs/{name}/{file} could not be written: File too large; " in err and err.count("\n") == 1
    assert complete(folder / "runs" / name) == ["3"]
    load_run(folder / "runs" / name)


def test_simulation_that_is_stopped_or_fills_the_disk_leaves_no_file(tmp_path):
    many = ["--train", "9000", "--val", "0", "--test", "0"]
    stopped = start(tmp_path, "simulate.py", "sim1", *many)
    full = start(tmp_path, "simulate.py", "sim2", *many, before=limited(2**20))
    wait_for(lambda: list((tmp_path / "sim1").glob(".train.npz.*.tmp")), stopped)
    stopped.terminate()
    finish(stopped, status=143)
    ((_, err),) = finish(full, status=2)
    assert "train.npz could not be written: File too large" in err and err.count("\n") == 1
    assert not [file for file in tmp_path.glob("sim?/*") if file.name != ".lock"]


def write_inputs(folder):
    """Makes what the writers of the next test need."""
    make_run(folder / "run", [0.5])
    (folder / "net.npz").write_text("before")
    (folder / "report").mkdir()
    for name in CLASSES:
        (folder / "source/train" / name).mkdir(parents=True)
        np.save(folder / f"source/train/{name}/1.npy", np.zeros((64, 64)))
    images = np.zeros((3, 16, 16), np.float32)
    write_npz(folder / "three.npz", [images], images.shape, images.dtype, np.arange(3), CLASSES, {})


@pytest.mark.parametrize(
    "name, write",
    [
        ("packed/.*/train.npz", lambda folder: pack(folder / "source", folder / "packed")),
        ("net.npz", lambda folder: export_run(folder / "run", folder / "net.npz")),
        (
            "report",
            lambda folder: evaluate_network(
                load_run(folder / "run"), open_npz(folder / "three.npz"), out=folder / "report"
            ),
        ),
    ],
)
def test_file_too_large_for_the_disk_is_one_error_and_the_one_before_stays(tmp_path, name, write):
    write_inputs(tmp_path)
    with (
        small_files(6000),
        pytest.raises(InputError, match=f"{name} could not be written: File too large; existing files are unchanged"),
    ):
        write(tmp_path)
    assert (tmp_path / "net.npz").read_text() == "before"
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name or f.name == "train.npz"]


@pytest.fixture
def silence(caplog):
    """Hides what the scripts hide: several tasks of Orbax fail, each with a message."""
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.CRITICAL, name)
    yield
    gc.collect()


several_tasks_fail = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def save_and_fail(run_dir, reason):
    with checkpoint.open_checkpoints(run_dir) as manager:
        with pytest.raises(InputError, match=f"checkpoints.2 could not be written: {reason}; existing files are unch"):
            checkpoint.save(manager, make_state(2), 0.4)
        assert complete(run_dir) == ["1"]
        assert_equal(checkpoint.load_variables(run_dir, SMALL_MODEL, "final")[0], make_variables(1))


@several_tasks_fail
@pytest.mark.parametrize("size", [100, 4000, 60000])  # of the files of a checkpoint, some are larger
def test_checkpoint_too_large_for_the_disk_leaves_the_one_before_and_can_be_saved_later(tmp_path, silence, size):
    make_run(tmp_path, [0.5])
    with small_files(size):
        save_and_fail(tmp_path, "File too large")
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, make_state(2), 0.4)
    assert_equal(checkpoint.load_variables(tmp_path, SMALL_MODEL, "final")[0], make_variables(2))
    assert not [f for f in tmp_path.rglob("*") if "tmp" in f.name]


@several_tasks_fail
def test_checkpoint_on_a_full_disk_leaves_the_one_before(disk, silence):
    make_run(disk / "run", [0.5])
    with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    save_and_fail(disk / "run", "No space left on device")
    with pytest.raises(InputError, match=r"a\.npz could not be written: No space left on device"):
        export_run(disk / "run", disk / "a.npz")
    assert sorted(f.name for f in disk.iterdir()) == ["rest", "run"]


def test_run_on_a_read_only_disk_is_read_but_not_resumed(disk, folder):
    make_run(disk / "run", [0.5])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    load_run(disk / "run")
    with pytest.raises(InputError, match=r"run could not be written: Read-only file system"):
        locked(disk / "run").__enter__()
    config = replace(read_run(folder / "runs/half").config, data=str(folder / "data"), run_dir=str(disk / "new"))
    with pytest.raises(InputError, match=r"new could not be written: Read-only file system"):
        fit(config)


def test_run_directory_that_is_a_file_is_one_error(tmp_path, folder):
    (tmp_path / "run").write_text("mine")
    config = Config(str(tmp_path / "run"), str(folder / "data"), batch_size=24)
    with pytest.raises(InputError, match="run could not be written: File exists"):
        fit(config)
    with pytest.raises(InputError, match=r"is not a run \(no config\.json\)"):
        fit(config, resume=True)
    assert (tmp_path / "run").read_text() == "mine" and config != CONFIG


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_error():
    code = "from gravlens_jax import cli; cli.run(lambda: print('probabilities'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno 28] No space left on device; ")
    assert done.stderr.count("\n") == 1
