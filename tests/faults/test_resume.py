"""Runs that are killed, stopped or damaged: the default network and image size, compiled as users run it."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from commands import (
    DEFAULT_NETWORK,
    NETWORK,
    assert_same_parameters,
    finish,
    history,
    run,
    saved_step,
    start,
    wait_for,
    write_images,
)
from gravlens_jax.errors import InputError
from gravlens_jax.run_dir import locked, read_run
from gravlens_jax.training import fit

FILES = [*DEFAULT_NETWORK, "--data", "data", "--epochs", "2"]  # 3 easy steps, then epochs of 6: steps 4-9 and 10-15
STREAM = [*NETWORK, "--data", "simulate:ct1", "--epochs", "1"]
STREAM += [word for size in ("easy=0", "train=96", "val=24", "test=24") for word in ("--simulation." + size).split("=")]
DEVICE = [*DEFAULT_NETWORK, "--data", "data", "--device-data", "--batch-size", "1", "--epochs", "1"]
SAVE_OFTEN = ["--save-minutes", "1e-6"]  # after every call


def train(folder, *arguments, **options):
    return run(folder, "train.py", *arguments, optimized=True, **options)


def names(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*"))


def copy(run_dir, name):
    return shutil.copytree(run_dir, run_dir.with_name(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images in data/ and an undisturbed run in runs/whole."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "data", easy=48, train=96, val=24, test=24)
    train(folder, *FILES, "--run-dir", "runs/whole")
    return folder


@pytest.fixture(scope="module")
def stopped(folder):
    """The same run, killed within its first epoch, and after a resume stopped by SIGTERM within its second."""
    run_dir = folder / "runs/stopped"
    process = start(folder, "train.py", *FILES, "--run-dir", "runs/stopped", *SAVE_OFTEN, optimized=True)
    wait_for(lambda: saved_step(run_dir) >= 5, process)
    process.kill()
    process.communicate()
    killed_at = saved_step(run_dir)
    process = start(folder, "train.py", "--run-dir", "runs/stopped", "--resume", *SAVE_OFTEN, optimized=True)
    wait_for(lambda: saved_step(run_dir) >= 11, process)
    process.terminate()
    ((out, err),) = finish(process, status=143)
    assert f"runs/stopped: 0 of 2 epochs done (step {killed_at} of 15)" in out and 5 <= killed_at < 9
    step = saved_step(run_dir)
    assert err == f"runs/stopped: SIGTERM: stopped after step {step} of 15, which is saved; continue with --resume\n"
    assert 11 <= step < 15 and names(run_dir / "checkpoints")[0] in ("9", str(step)) and len(history(run_dir)) == 1
    return run_dir


def test_killed_and_stopped_run_ends_with_exactly_the_same_parameters(folder, stopped):
    resumed = copy(stopped, "resumed")
    last = history(resumed)[0] | {"epoch": 2, "step": 15}  # of an epoch that was killed before its checkpoint
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write(json.dumps(last) + "\n" + json.dumps(last)[:50])
    (resumed / "checkpoints/15.orbax-checkpoint-tmp/variables").mkdir(parents=True)
    (resumed / "checkpoints/removed/3").mkdir(parents=True)
    elsewhere = shutil.copytree(folder / "data", folder / "elsewhere/data").parent
    out = train(elsewhere, "--run-dir", "../runs/resumed", "--resume", "--data", "data", "--tensorboard")
    assert read_run(resumed).config.data == str(elsewhere / "data")
    assert f"runs/resumed: 1 of 2 epochs done (step {saved_step(stopped)} of 15)" in out and "epoch 1/2" not in out
    assert_same_parameters(resumed, folder / "runs/whole")
    for ours, theirs in zip(history(resumed), history(folder / "runs/whole"), strict=True):
        for name in ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate"):
            assert ours[name] == theirs[name]
    assert not [name for name in names(resumed) if "tmp" in name or "removed" in name]


@pytest.mark.parametrize(
    "options, number, total",
    [
        pytest.param(STREAM, signal.SIGINT, 6, id="simulated when needed, Ctrl-C"),
        pytest.param(DEVICE, signal.SIGTERM, 144, id="data on the device, SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_run_stopped_within_an_epoch_ends_with_exactly_the_same_parameters(folder, options, number, total):
    whole, run_dir = folder / f"runs/whole{total}", folder / f"runs/stopped{total}"
    train(folder, *options, "--run-dir", whole)
    process = start(folder, "train.py", *options, "--run-dir", run_dir, *SAVE_OFTEN, optimized=True)
    wait_for(lambda: saved_step(run_dir) > 0, process)
    process.send_signal(number)
    ((_, err),) = finish(process, status=128 + number)
    step = saved_step(run_dir)
    assert f"stopped after step {step} of {total}, which is saved; continue with --resume" in err
    assert 0 < step < total and history(run_dir) == []
    assert f"(step {step} of {total})" in train(folder, "--run-dir", run_dir, "--resume")
    assert_same_parameters(run_dir, whole)


def test_more_epochs_of_a_finished_run_are_those_of_a_longer_run(folder):
    run_dir = folder / "runs/longer"
    train(folder, *FILES, "--epochs", "1", "--run-dir", run_dir)
    assert "1 of 2 epochs done (step 9 of 15)" in train(folder, "--run-dir", run_dir, "--resume", "--epochs", "2")
    assert_same_parameters(run_dir, folder / "runs/whole")
    assert len(history(run_dir)) == 2 and read_run(run_dir).config.epochs == 2


def test_other_images_than_the_run_began_with_are_refused(folder, stopped):
    write_images(folder / "other", easy=48, train=96, val=24, test=23)
    err = train(folder, "--run-dir", stopped, "--resume", "--data", "other", status=2)
    assert f"{folder}/other: test.npz does not hold the images that the run began with (23 x 150" in err
    assert err.count("\n") == 1 and read_run(stopped).config.data == str(folder / "data")


def test_run_in_use_is_refused(folder, stopped, monkeypatch):
    monkeypatch.chdir(folder)
    with locked(stopped), pytest.raises(InputError, match=f"in use by another process .process {os.getpid()} "):
        fit(replace(read_run(stopped).config, run_dir=str(stopped)), resume=True)


def test_damaged_history_is_one_error_and_the_checkpoints_stay(folder, stopped):
    cut = copy(stopped, "cut") / "metrics.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])
    err = train(folder, "--run-dir", "runs/cut", "--resume", status=2)
    assert err.startswith("error: runs/cut/metrics.jsonl has a damaged line") and err.count("\n") == 1
    assert_same_parameters(folder / "runs/cut", stopped)


def test_diverging_run_ends_with_status_1_and_saves_nothing(folder):
    options = [*FILES, "--run-dir", "runs/diverged", "--optim.learning-rate", "1e30", "--optim.warmup-steps", "0"]
    err = train(folder, *options, status=1)
    assert err.startswith("error: ") and "at step" in err and "start again with a lower learning rate" in err
    assert err.count("\n") == 1 and saved_step(folder / "runs/diverged") == 0
