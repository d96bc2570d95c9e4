"""What goes wrong around a run: it ends in one paragraph, what was saved stays good, and --resume loses nothing."""

import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import commands
import jax
import numpy as np
import pytest
from commands import (
    NETWORK,
    SMALL,
    assert_same_parameters,
    finish,
    history,
    run,
    saved_within,
    start,
    wait_for,
    write_images,
)
from test_checkpoint import INFO, assert_equal, make_run, make_state

from gravlens_jax import checkpoint
from gravlens_jax.config import CLASSES, Config, InputError
from gravlens_jax.data import epoch_rows
from gravlens_jax.evaluate import evaluate_run
from gravlens_jax.fit import fit
from gravlens_jax.folders import pack
from gravlens_jax.npz import open_npz, write_npz
from gravlens_jax.run import locked, read_run
from gravlens_jax.weights import export_run

FILES = [*NETWORK, "--data", "data", "--epochs", "2"]  # 6 easy steps, then epochs of 9: steps 7-15 and 16-24
STREAM = [*SMALL, "--data", "simulate:ct1", "--simulation.easy", "0", "--simulation.train", "144", "--epochs", "1"]
DEVICE = [*FILES, "--device-data", "--batch-size", "1", "--epochs", "1"]  # calls of 48 steps: 2 easy ones, then 3
SAVE_OFTEN = ["--save-minutes", "1e-6"]  # after every step, or call


def limited(size):
    """Words that start a program whose files may have `size` bytes and no more, as on a full disk.

    It keeps no compiled programs, which would be cut.
    """
    code = f"""import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
os.execv(sys.argv[1], sys.argv[1:])"""
    return [sys.executable, "-c", code]


@contextmanager
def small_files(size):
    """The same for this process, which meanwhile keeps no compiled programs."""
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)


def names(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*"))


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


@pytest.fixture(scope="module", autouse=True)
def optimized():
    """The programs that these tests start are optimized, as users run them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "XLA_FLAGS", "")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images in data/ and a run in runs/a that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data", easy=96, train=144, val=24, test=24)
    run(folder, "train.py", *FILES, "--run-dir", "runs/a")
    return folder


@pytest.fixture(scope="module")
def stopped(folder):
    """The same run, killed within its first epoch, and after a resume stopped by SIGTERM within its second."""
    run_dir = folder / "runs/b"
    process = start(folder, "train.py", *FILES, "--run-dir", "runs/b", *SAVE_OFTEN)
    wait_for(lambda: saved_within(run_dir) >= 8, process)
    process.kill()
    process.communicate()
    killed_at = saved_within(run_dir)
    process = start(folder, "train.py", "--run-dir", "runs/b", "--resume", *SAVE_OFTEN)
    wait_for(lambda: saved_within(run_dir) >= 17, process)
    process.terminate()
    ((out, err),) = finish(process, status=143)
    assert f"runs/b: 0 of 2 epochs done (step {killed_at} of 24)" in out and 8 <= killed_at < 15
    step = saved_within(run_dir)
    assert err == f"runs/b: SIGTERM: stopped after step {step} of 24, which is saved; continue with --resume\n"
    assert 17 <= step < 24 and names(run_dir / "checkpoints")[0] == "15" and len(history(run_dir)) == 1
    return run_dir


def complete(run_dir):
    """Returns the names of the complete checkpoints.

    Where a save failed there may be a temporary one, in which one of Orbax's threads still wrote when it was removed;
    the next save, or start, removes it.
    """
    return [f.name for f in (run_dir / "checkpoints").iterdir() if not f.name.endswith(".orbax-checkpoint-tmp")]


def copy(run_dir, name):
    shutil.copytree(run_dir, run_dir.with_name(name))
    return run_dir.with_name(name)


def test_each_fault_of_a_resumed_run_is_one_paragraph_and_the_best_checkpoint_stays(folder, stopped):
    """They run at the same time, on copies of the stopped run."""
    poisoned, last_row = folder / "poisoned", epoch_rows(144, 16, 0, 1)[-1][0]
    shutil.copytree(folder / "data", poisoned)
    train = open_npz(folder / "data/train.npz")
    images = np.array(train.images, np.float32)
    images[last_row] = np.nan
    np.savez(poisoned / "train.npz", images=images, labels=train.labels, classes=np.array(train.classes))
    values = json.loads((copy(stopped, "nan") / "config.json").read_text())
    values["config"]["data"] = "poisoned"
    (folder / "runs/nan/config.json").write_text(json.dumps(values))
    cut = copy(stopped, "cut") / "metrics.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])
    size = copy(stopped, "full1").joinpath("metrics.jsonl").stat().st_size
    cases = {
        "nan": (1, "training loss is nan at step 24; ", ()),
        "cut": (2, "runs/cut/metrics.jsonl has a damaged line", ()),
        "full1": (2, "runs/full1/metrics.jsonl could not be written: File too large; ", limited(size + 50)),
        "full2": (2, "runs/full2/checkpoints/24 could not be written: File too large; ", limited(16384)),
    }
    copy(stopped, "full2")
    processes = [
        start(folder, "train.py", "--run-dir", f"runs/{name}", "--resume", before=before)
        for name, (_, _, before) in cases.items()
    ]
    for process, (name, (status, message, _)) in zip(processes, cases.items(), strict=True):
        ((_, err),) = finish(process, status=status)
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
        assert complete(folder / "runs" / name) == ["15"]
        assert_same_parameters(folder / "runs" / name, stopped)


def test_a_killed_stopped_and_cut_run_ends_with_exactly_the_same_parameters(folder, stopped, monkeypatch):
    resumed = copy(stopped, "c")
    last = history(resumed)[0] | {"epoch": 2, "step": 24}  # of an epoch that was killed before its checkpoint
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last) + "\n" + json.dumps(last)[:50])
    monkeypatch.chdir(folder)
    with locked(resumed), pytest.raises(InputError, match=f"in use by another process .process {os.getpid()} "):
        fit(replace(read_run(resumed).config, run_dir=str(resumed)), resume=True)
    (resumed / "checkpoints/24.orbax-checkpoint-tmp/variables").mkdir(parents=True)
    (resumed / "partial/removed/3").mkdir(parents=True)
    out = run(folder, "train.py", "--run-dir", "runs/c", "--resume", "--tensorboard")
    assert f"runs/c: 1 of 2 epochs done (step {saved_within(stopped)} of 24)" in out and "epoch 1/2" not in out
    assert_same_parameters(resumed, folder / "runs/a")
    for ours, theirs in zip(history(resumed), history(folder / "runs/a"), strict=True):
        for name in ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
            assert ours[name] == theirs[name]
    assert names(resumed / "partial") == []
    assert [name.split(".")[-2:] for name in names(resumed / "tensorboard")] == [
        ["0000000015", "epoch"],  # which the resumed run writes too
        ["0000000024", "epoch"],
        ["0000000024", "report"],
    ]
    assert not [name for name in names(resumed) if "tmp" in name or "removed" in name]


@pytest.mark.parametrize(
    "options, number, at, total",
    [
        pytest.param(STREAM, signal.SIGINT, 2, 9, id="fresh images, Ctrl-C"),
        pytest.param(DEVICE, signal.SIGTERM, 48, 240, id="data on the device, SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_so_does_one_stopped_within_an_epoch_of(folder, options, number, at, total):
    whole, run_dir = folder / f"runs/whole{total}", folder / f"runs/stopped{total}"
    run(folder, "train.py", *options, "--run-dir", whole)
    process = start(folder, "train.py", *options, "--run-dir", run_dir, *SAVE_OFTEN)
    wait_for(lambda: saved_within(run_dir) >= at, process)
    process.send_signal(number)
    ((_, err),) = finish(process, status=128 + number)
    step = saved_within(run_dir)
    assert f"stopped after step {step} of {total}, which is saved; continue with --resume" in err
    assert at <= step < total and history(run_dir) == []
    assert f"(step {step} of {total})" in run(folder, "train.py", "--run-dir", run_dir, "--resume")
    assert_same_parameters(run_dir, whole)


def test_a_simulation_that_is_stopped_or_fills_the_disk_leaves_nothing_half_written(folder):
    many = ["--train", "9000", "--val", "0", "--test", "0"]
    stopped = start(folder, "simulate.py", "sim1", *many)
    full = start(folder, "simulate.py", "sim2", *many, before=limited(2**20))
    wait_for(lambda: list((folder / "sim1").glob(".train.npz.*.tmp")), stopped)
    stopped.terminate()
    finish(stopped, status=143)
    ((_, err),) = finish(full, status=2)
    assert "train.npz could not be written: File too large" in err and err.count("\n") == 1
    assert names(folder / "sim1") == names(folder / "sim2") == []


def test_a_file_too_large_for_the_disk_is_one_error_and_the_one_before_stays(tmp_path):
    make_run(tmp_path / "run", [0.5])
    (tmp_path / "net.npz").write_text("before")
    (tmp_path / "report").mkdir()
    for name in ("no", "sphere", "vort"):
        (tmp_path / "source/train" / name).mkdir(parents=True)
        np.save(tmp_path / f"source/train/{name}/1.npy", np.zeros((64, 64)))
    images = np.zeros((3, 16, 16), np.float32)
    write_npz(tmp_path / "three.npz", [images], images.shape, images.dtype, np.arange(3), CLASSES, {})
    before = names(tmp_path)
    with small_files(6000):
        for name, write in {
            "packed/train.npz": lambda: pack(tmp_path / "source", tmp_path / "packed"),
            "net.npz": lambda: export_run(tmp_path / "run", tmp_path / "net.npz"),
            "report": lambda: evaluate_run(
                tmp_path / "run", open_npz(tmp_path / "three.npz"), "best", tmp_path / "report"
            ),
        }.items():
            with pytest.raises(InputError, match=f"{name} could not be written: File too large; what was there before"):
                write()
    assert set(names(tmp_path)) - set(before) <= {"packed", "report/metrics.json", "report/predictions.npz"}
    assert (tmp_path / "net.npz").read_text() == "before"


@pytest.fixture
def silence(caplog):
    """Hides what the scripts hide: several of Orbax's tasks fail, and say so one by one."""
    for name in ("absl", "asyncio"):
        caplog.set_level(logging.CRITICAL, name)
    yield
    gc.collect()


several_tasks_fail = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def save_and_fail(run_dir, reason):
    with checkpoint.open_checkpoints(run_dir) as manager:
        with pytest.raises(InputError, match=f"checkpoints.2 could not be written: {reason}; what was there before"):
            checkpoint.save_state(manager, make_state(2), 0.4)
        assert complete(run_dir) == ["1"]
        assert_equal(checkpoint.load_run(run_dir, "final")[1]["params"], make_state(1).params)


@several_tasks_fail
@pytest.mark.parametrize("size", [100, 4000, 60000])  # of the files of a checkpoint, some are larger
def test_a_checkpoint_that_fills_the_disk_leaves_the_one_before_and_can_be_saved_later(tmp_path, silence, size):
    make_run(tmp_path, [0.5])
    with small_files(size):
        save_and_fail(tmp_path, "File too large")
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save_state(manager, make_state(2), 0.4)
    assert_equal(checkpoint.load_run(tmp_path, "final")[1]["params"], make_state(2).params)
    assert not [name for name in names(tmp_path) if "tmp" in name]


@several_tasks_fail
def test_so_does_one_on_a_disk_that_is_full(disk, silence):
    make_run(disk / "run", [0.5])
    with open(disk / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    save_and_fail(disk / "run", "No space left on device")
    with pytest.raises(InputError, match=r"a\.npz could not be written: No space left on device"):
        export_run(disk / "run", disk / "a.npz")
    assert names(disk)[:2] == ["rest", "run"]


def test_a_run_on_a_read_only_disk_is_read_but_not_resumed(disk, folder):
    shutil.copytree(folder / "runs/a/checkpoints/24", disk / "run/checkpoints/24")
    shutil.copy(folder / "runs/a/config.json", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    checkpoint.load_run(disk / "run")
    config = replace(read_run(disk / "run").config, data=str(folder / "data"))
    with pytest.raises(InputError, match=r"run could not be written: Read-only file system"):
        locked(disk / "run").__enter__()
    with pytest.raises(InputError, match=r"new could not be written: Read-only file system"):
        fit(replace(config, run_dir=str(disk / "new")))


def test_a_run_directory_that_is_a_file_is_one_error(tmp_path, folder):
    (tmp_path / "run").write_text("mine")
    config = Config(str(tmp_path / "run"), str(folder / "data"), batch_size=24)
    with pytest.raises(InputError, match="run could not be written: File exists"):
        fit(config)
    with pytest.raises(InputError, match=r"is not a run \(no config\.json\)"):
        fit(config, resume=True)
    assert (tmp_path / "run").read_text() == "mine" and INFO.config != config


def test_an_output_that_cannot_be_written_is_one_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    code = "from gravlens_jax import cli; cli.run(lambda: print('probabilities'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: [Errno 28] No space left on device; free space")
    assert done.stderr.count("\n") == 1
