"""Several devices and several processes; each case runs `train.py` in processes of its own, as a user does."""

import signal
import socket

import jax
import numpy as np
import pytest

from gravlens_jax.network import load_network
from gravlens_jax.sharding import check_batch_size, data_mesh, join_processes
from helpers import NETWORK, finish, history, load, refuse, run, save_npz, start, wait_for_epochs

FILES = [*NETWORK, "--data", "data", "--epochs", "2"]


def start_two(folder, *arguments):
    """Starts two processes of two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    several = ["--coordinator", coordinator, "--num-processes", 2, "--process-id"]
    return [start(folder, "train.py", *arguments, *several, i, devices=2) for i in (0, 1)]


def assert_same_run(a, b):
    """Losses agree up to float32 rounding in another order of summation, amplified by training: the first updates of
    Adam, which updates all that Muon does not, are the signs of gradients."""
    for ours, theirs in zip(history(a), history(b), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images and a run on one device in runs/1."""
    folder = tmp_path_factory.mktemp("work")
    for split, n in (("train", 48), ("val", 24), ("test", 25)):
        save_npz(folder / f"data/{split}.npz", np.random.default_rng(n).poisson(50, (n, 150, 150)).astype(np.uint16))
    run(folder, "train.py", *FILES, "--run-dir", "runs/1")
    return folder


def test_result_does_not_depend_on_the_number_of_processes_and_one_of_them_prints(folder):
    run_dir = folder / "runs/2x2"
    (out, _), (other, _) = finish(*start_two(folder, *FILES, "--run-dir", run_dir))
    assert "4 x cpu" in out and "epoch 2/2" in out and "epoch" not in other
    assert_same_run(run_dir, folder / "runs/1")
    assert (run_dir / "report/metrics.json").exists()
    a, b = (load_network(path).variables for path in (run_dir, folder / "runs/1"))
    # The whitening has entries of 760.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=max(1e-3, 1e-5 * np.abs(y).max())), a, b)


def test_processes_started_together_share_the_images_that_one_of_them_simulates(tmp_path):
    sizes = ["--train", "96", "--val", "24", "--test", "24"]  # as train.py does it for its own images
    results = finish(*(start(tmp_path, "simulate.py", "data", *sizes) for _ in range(2)))
    assert sorted("train: 96 images in" in out for out, _ in results) == [False, True]
    assert sorted("; waiting until it is done" in err for _, err in results) == [False, True]


def test_run_stopped_in_two_processes_resumes_on_other_devices(folder):
    run_dir = folder / "runs/moved"
    processes = start_two(folder, *FILES, "--run-dir", run_dir, "--epochs", 2000)
    wait_for_epochs(run_dir, 2, *processes)
    processes[1].send_signal(signal.SIGTERM)  # one is enough: they stop together
    for _, err in finish(*processes, status=143):
        assert "SIGTERM: stopped after step" in err and "continue with --resume" in err
    process = start(folder, "train.py", "--run-dir", run_dir, "--resume", devices=8)
    wait_for_epochs(run_dir, len(history(run_dir)) + 1, process)
    process.send_signal(signal.SIGINT)
    finish(process, status=130)
    steps = [line["step"] for line in history(run_dir)]
    assert steps == [3 * (i + 1) for i in range(len(steps))]  # no epoch is missing


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_dies_the_other_ends_with_a_message(folder, victim):
    name = f"runs/dies{victim}"
    processes = start_two(folder, *FILES, "--run-dir", name, "--epochs", 2000)
    wait_for_epochs(folder / name, 2, *processes)  # the first is saved
    processes[victim].kill()
    processes[victim].communicate()
    _, err = processes[1 - victim].communicate(timeout=120)  # at once in a step; while it saves, after DEAD_SECONDS
    status = processes[1 - victim].returncode
    if victim == 0 and "the JAX distributed service detected fatal errors" in err:
        # Process 0 is JAX's coordinator: JAX ends the others when it is gone, perhaps before our own message.
        assert status in (1, -signal.SIGABRT)
    else:
        assert status == 1 and "Traceback" not in err
        assert "another process of this run has ended" in err and "--resume" in err
    assert load(folder / name, "final")[1] >= 3


def test_inconsistent_arguments_of_several_processes_and_batches_that_do_not_divide_are_refused():
    refuse("give all three, none, or coordinator=auto alone", join_processes, "auto", 2, 0)
    refuse("expected HOST:PORT", join_processes, "localhost", 2, 0)
    refuse("process_id=2: expected 0 to 1", join_processes, "localhost:1", 2, 2)
    refuse("batch_size=7 is not divisible by 2 devices; try 6", check_batch_size, 7, data_mesh(2))
    refuse("3 devices asked for, 2 found", data_mesh, 3)
