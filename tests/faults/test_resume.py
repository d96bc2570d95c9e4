"""Runs that are killed, stopped or damaged.

The first test runs train.py as users do: the default network and image size, XLA's flags for users, processes that end.
The others train a tiny network in this process.
"""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gravlens_jax import PRIORS, fit, loader, training
from gravlens_jax.config import SimulationConfig
from gravlens_jax.datasets import simulate_dataset
from gravlens_jax.files import locked
from gravlens_jax.progress import Stopped
from gravlens_jax.run_files import read_run, saved_step
from helpers import SMALL, TINY_PRIORS, assert_equal, finish, history, load, refuse, run, start, tiny_config, wait_for

KILLS = int(os.environ.get("GRAVLENS_SOAK_KILLS", "50"))
METRICS = ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate")


def assert_same_run(a, b):
    """Parameters and metrics of two runs agree bitwise."""
    for which in ("best", "final"):
        assert_equal(load(a, which), load(b, which))
    lines = [[[line[name] for name in METRICS] for line in history(run_dir)] for run_dir in (a, b)]
    assert lines[0] == lines[1]


def leftovers(run_dir):
    return [f for f in run_dir.rglob("*") if "tmp" in f.name or f.name == "removed"]


def test_killed_run_ends_with_exactly_the_same_parameters(tmp_path):
    simulate_dataset(tmp_path / "data", SimulationConfig(train=96, easy=0, val=24, test=24))
    whole, run_dir, total = tmp_path / "whole", tmp_path / "killed", 12  # steps, 6 of each epoch
    train = partial(start, tmp_path, "train.py", "--save-minutes", "1e-6", optimized=True)  # saves after every step
    process = train("--batch-size", "16", "--epochs", "2", "--data", "data", "--run-dir", whole)
    wait_for(lambda: (saved_step(whole) or 0) >= 2, process)
    process.send_signal(signal.SIGSTOP)
    step = saved_step(shutil.copytree(whole, run_dir))  # the files that a kill leaves
    assert 2 <= step < total / 2
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: saved_step(whole) == total, process)
    process.kill()  # its report is not needed
    process.communicate()

    unsaved = json.dumps({"epoch": 1, "step": total // 2})  # as if killed before the checkpoint
    (run_dir / "metrics.jsonl").write_text(unsaved + "\n" + unsaved[:9])
    (run_dir / f"checkpoints/{total}.orbax-checkpoint-tmp/variables").mkdir(parents=True)
    (run_dir / "checkpoints/removed/3").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "moved")
    process = train("--run-dir", run_dir, "--resume", "--data", "moved")
    wait_for(lambda: saved_step(run_dir) == total and not leftovers(run_dir), process)
    process.kill()
    assert f"0 of 2 epochs done with the auxiliary loss (step {step} of {total})" in process.communicate()[0]
    assert_same_run(run_dir, whole)


def train(config, at=None, number=signal.SIGTERM, resume=False):
    """Trains without calibration and report; a signal comes during step `at`. Returns the saved step before each."""
    train_batches, saved = loader.train_batches, []

    def batches(*arguments):
        for step, batch in train_batches(*arguments):
            saved.append(saved_step(Path(config.run_dir)) or 0)
            if step == at:
                signal.raise_signal(number)
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_batches", batches)
        for name in ("calibrate_run", "load_network", "evaluate_network"):
            patch.setattr(training, name, lambda *_, **__: None)
        fit(config, resume)
    return saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config of a run that is complete: 2 steps on easy images, then 2 epochs of 4."""
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    train(config)
    return config


STOPS = [({"device_data": True}, signal.SIGINT, 4, 10), ({"data": "simulate:ct1"}, signal.SIGHUP, 2, 8)]


@pytest.mark.parametrize("changes, number, at, total", STOPS, ids=["device", "stream"])
def test_run_stopped_within_an_epoch_resumes_bitwise(tmp_path, monkeypatch, changes, number, at, total):
    monkeypatch.setattr(loader, "STEPS_PER_CALL", 2)
    monkeypatch.setitem(PRIORS, "ct1", TINY_PRIORS)
    simulation = SimulationConfig(train=16, easy=0, val=12, test=12, folder=str(tmp_path / "simulated"))
    config = tiny_config(tmp_path, simulation=simulation, **changes)
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    message = f"{number.name}: stopped after step {at} of {total}, which is saved; continue with --resume"
    with pytest.raises(Stopped, match=message) as stopped:
        train(config, at, number)
    assert stopped.value.number == number and history(tmp_path / "run") == []
    train(config, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigusr1_saves_and_more_epochs_of_a_finished_run_are_those_of_a_longer_run(whole, tmp_path):
    config = replace(whole, run_dir=str(tmp_path))
    assert train(replace(config, epochs=1), 4, signal.SIGUSR1) == [0, 0, 2, 2, 4, 4]
    train(config, resume=True)
    assert_same_run(tmp_path, Path(whole.run_dir))
    assert read_run(tmp_path).config.epochs == 2


def test_signal_during_the_last_validation_stops_the_run_and_resume_writes_its_report(whole, tmp_path, monkeypatch):
    validate, config = training._validate, replace(whole, run_dir=str(tmp_path))

    def interrupted(evaluate, state, *arguments):
        if int(state.step) == 10:
            signal.raise_signal(signal.SIGTERM)
        return validate(evaluate, state, *arguments)

    monkeypatch.setattr(training, "_validate", interrupted)
    with pytest.raises(Stopped, match="stopped after step 10 of 10") as stopped:
        fit(config)
    assert stopped.value.number == signal.SIGTERM and not (tmp_path / "report").exists()
    monkeypatch.undo()
    fit(config, resume=True)
    assert (tmp_path / "report/metrics.json").exists()
    assert_same_run(tmp_path, Path(whole.run_dir))


def test_run_in_use_and_other_images_than_a_run_began_with_are_refused(whole, tmp_path):
    with locked(Path(whole.run_dir)):
        refuse(f"run is in use by another process .process {os.getpid()} on", fit, whole, resume=True)
    other = tiny_config(tmp_path)
    shutil.copy(tmp_path / "data/easy.npz", tmp_path / "data/test.npz")
    message = r"/data: test\.npz does not hold the images that the run began with \(8 x 16"
    refuse(message, fit, replace(whole, data=other.data), resume=True)
    assert read_run(Path(whole.run_dir)).config.data == whole.data


def test_diverging_run_is_an_error_and_saves_nothing(whole, tmp_path):
    optim = replace(whole.optim, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"at step .* start again with a lower learning rate"):
        fit(replace(whole, run_dir=str(tmp_path), optim=optim))
    assert saved_step(tmp_path) is None


def test_simulation_that_is_stopped_leaves_no_file(tmp_path):
    process = start(tmp_path, "simulate.py", "data", "--train", "9000", "--val", "0", "--test", "0")
    wait_for(lambda: list((tmp_path / "data").glob(".train.npz.*.tmp")), process)
    process.terminate()
    finish(process, status=143)
    assert [file.name for file in (tmp_path / "data").iterdir()] == [".lock"]


@pytest.mark.slow
def test_run_killed_many_times_ends_with_exactly_the_same_parameters(tmp_path):
    """Takes about 10 minutes: python -m pytest -m slow tests/faults/test_resume.py -k many."""
    kills, rng, folder, whole = 0, np.random.default_rng(0), tmp_path / "killed", tmp_path / "whole"
    long = [*SMALL, "--simulation.train", "48", "--simulation.easy", "0", "--epochs", 10 * KILLS]  # 3 steps each
    run(tmp_path, "train.py", *long, "--run-dir", whole, optimized=True)
    while kills < KILLS:
        options = ["--resume"] if (folder / "config.json").exists() else long
        options = [*options, "--run-dir", folder, "--save-minutes", "0.0005"]
        process = start(tmp_path, "train.py", *options, optimized=True)
        if rng.random() > 0.1:  # otherwise it is killed while the program starts
            process.stdout.readline()  # "... epochs done": the first step comes next
        time.sleep(rng.uniform(0, 4))
        assert process.poll() in (None, 0), process.communicate()
        process.kill()
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert err == ""
        kills += 1

        if history(folder)[:-1]:  # of the last epoch the line is there before the checkpoint
            load(folder, "final")
    run(tmp_path, "train.py", "--run-dir", folder, "--resume", optimized=True)
    assert_same_run(folder, whole)
    assert kills >= KILLS / 2
