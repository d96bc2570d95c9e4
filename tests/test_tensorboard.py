import struct
import subprocess
import sys

import pytest
from commands import ROOT

from gravlens_jax import tensorboard
from gravlens_jax.config import InputError

LINE = {"epoch": 1, "step": 3, "train_loss": 1.5, "train_accuracy": 0.25, "val_loss": 1.25, "val_accuracy": 0.5}
LINE |= {"learning_rate": 0.125, "images_per_second": 64.0, "wall_seconds": 1.0}
REPORT = {"n": 24, "accuracy": 0.75, "auc": {"no": 0.5, "vort": None}, "macro_auc": None, "checkpoint": "best"}


def scalars(run_dir):
    """Returns (tag, step) -> value, from the records of all files in their order: length, its CRC, data, their CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((run_dir / "tensorboard").glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_each_epoch_and_the_report_are_there_once_even_if_written_again(tmp_path):
    for loss in (2.0, 1.5):
        tensorboard.write_epoch(tmp_path, LINE | {"train_loss": loss})
    tensorboard.write_epoch(tmp_path, LINE | {"step": 6})
    tensorboard.write_report(tmp_path, 6, REPORT)
    expected = {"loss/train": 1.5, "loss/val": 1.25, "accuracy/train": 0.25, "accuracy/val": 0.5}
    expected |= {"learning_rate": 0.125, "images_per_second": 64.0}
    report = {("test/accuracy", 6): 0.75, ("test/auc/no", 6): 0.5}
    assert scalars(tmp_path) == {(tag, step): x for step in (3, 6) for tag, x in expected.items()} | report
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match="could not be written: File exists"):
        tensorboard.write_epoch(tmp_path, LINE)


def test_without_tensorboardx_training_does_not_begin(tmp_path):
    code = f"""
import sys
sys.modules["tensorboardX"] = None  # as if it were not installed
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
sys.argv = ["train.py", "--preset", "smoke", "--tensorboard", "--run-dir", "run"]
import train
train.cli.run(train.main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    message = 'error: --tensorboard needs tensorboardX; pip install "gravlens_jax[tensorboard]"\n'
    assert (done.returncode, done.stderr) == (2, message) and list(tmp_path.iterdir()) == []
