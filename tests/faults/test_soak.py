"""Kills a run many times, at random moments; takes about 10 minutes with 50 kills.

python -m pytest -s -m slow tests/faults/test_soak.py
"""

import os
import time

import numpy as np
import pytest

from gravlens_jax.network import load_network
from helpers import SMALL, assert_same_parameters, history, run, start

KILLS = int(os.environ.get("GRAVLENS_SOAK_KILLS", "50"))
RUN = [*SMALL, "--simulation.train", "48", "--simulation.easy", "0", "--epochs", str(10 * KILLS)]  # 3 steps each


@pytest.mark.slow
def test_run_killed_many_times_ends_with_exactly_the_same_parameters(tmp_path):
    run(tmp_path, "train.py", *RUN, "--run-dir", "whole", optimized=True)
    rng, folder, kills, saving, starting = np.random.default_rng(0), tmp_path / "killed", 0, 0, 0
    while kills < KILLS:
        options = ["--resume"] if (folder / "config.json").exists() else RUN
        options = [*options, "--run-dir", "killed", "--save-minutes", "0.0005"]
        process = start(tmp_path, "train.py", *options, optimized=True)
        if rng.random() < 0.1:
            starting += 1
        else:
            process.stdout.readline()  # "... epochs done": the first step comes next
        time.sleep(rng.uniform(0, 4))
        assert process.poll() in (None, 0), process.communicate()
        process.kill()
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert err == ""
        kills += 1
        saving += any(not f.name.isdecimal() for f in (folder / "checkpoints").glob("*"))
        if history(folder)[:-1]:  # of the last epoch the line is there before the checkpoint
            load_network(folder, "final")
    run(tmp_path, "train.py", "--run-dir", "killed", "--resume", optimized=True)
    assert_same_parameters(folder, tmp_path / "whole")
    assert [line["val_loss"] for line in history(folder)] == [line["val_loss"] for line in history(tmp_path / "whole")]
    print(f"{kills} kills: {saving} while something was saved or removed, {starting} while the program started")
    assert kills >= KILLS / 2
