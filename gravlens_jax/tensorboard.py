"""The figures of a run for TensorBoard, in RUN/tensorboard; the only module that imports tensorboardX.

Each call writes a file of its own, named by its step: an epoch that is repeated after a kill replaces its file, and
nothing runs in the background that could lose what a full disk does not take.
"""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from gravlens_jax.files import writing

EPOCH = {"train_loss": "loss/train", "val_loss": "loss/val", "train_accuracy": "accuracy/train"}
EPOCH |= {"val_accuracy": "accuracy/val", "learning_rate": "learning_rate", "images_per_second": "images_per_second"}


def write_epoch(run_dir: Path, line: dict[str, Any]) -> None:
    """Writes what a line of metrics.jsonl says."""
    _write(run_dir, "epoch", line["step"], {tag: line[name] for name, tag in EPOCH.items()})


def write_report(run_dir: Path, step: int, values: dict[str, Any]) -> None:
    """Writes the figures of the report, `values` as `evaluate_run` returns them."""
    values = values | {f"auc/{name}": value for name, value in values["auc"].items()}
    _write(run_dir, "report", step, {f"test/{name}": x for name, x in values.items() if isinstance(x, float)})


def _write(run_dir: Path, name: str, step: int, scalars: dict[str, float]) -> None:
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary, now = Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]), time.time()
    events = Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, step=step, summary=summary)
    path = run_dir / "tensorboard" / f"events.out.tfevents.{step:010}.{name}"
    temporary = path.with_name(f".{step}.{name}.tmp")  # without "tfevents", which TensorBoard looks for
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with closing(RecordWriter(str(temporary))) as writer:
                for event in events:
                    writer.write(event.SerializeToString())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
