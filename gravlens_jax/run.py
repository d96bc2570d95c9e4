"""The directory of a run: its config, its lock, its history; `checkpoint` is about the networks in it.

runs/<name>/config.json              what the run is; written before the first step
runs/<name>/metrics.jsonl            a line for each epoch
runs/<name>/checkpoints, partial     see `checkpoint`
runs/<name>/calibration.json         step -> temperature, of the checkpoints of a finished run
runs/<name>/report                   figures, metrics and predictions on the test split
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gravlens_jax.config import Config, InputError, check, from_dict, parse_json, to_json
from gravlens_jax.files import write_atomically, writing


class RunInfo(NamedTuple):
    """What config.json holds."""

    config: Config
    classes: tuple[str, ...]
    image_shape: tuple[int, int]  # height and width of the images it was trained on


def check_unused(run_dir: Path) -> None:
    """Raises InputError if the directory holds a run already."""
    check(
        not (run_dir / "config.json").exists(),
        f"{run_dir} already holds a run; continue it with --resume, or give the new run another --run-dir",
    )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run directory, made if needed, for this process; InputError if another process holds it.

    Where the file system knows no locks, it is not held, and this is said.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "a+")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{run_dir} is in use by another process ({file.read().strip()}); wait for it or stop it, or give "
                f"this run another --run-dir"
            ) from None
        except OSError as error:
            print(f"{run_dir} cannot be locked ({error.strerror}): start only one process on it", file=sys.stderr)
        file.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", file=file, flush=True)
        yield


def create_run(run_dir: Path, info: RunInfo) -> None:
    """Makes the run directory and its config.json; a directory that holds a run is refused."""
    check_unused(run_dir)
    values = {
        "config": json.loads(to_json(info.config)),
        "classes": list(info.classes),
        "image_shape": list(info.image_shape),
    }
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.json", json.dumps(values, indent=2) + "\n")


def read_run(run_dir: Path) -> RunInfo:
    """Reads config.json of a run directory."""
    path = Path(run_dir) / "config.json"
    check(path.is_file(), f"{run_dir} is not a run (no config.json); expected a directory made by scripts/train.py")
    return from_dict(RunInfo, parse_json(path.read_bytes(), str(path)), str(path))


def read_history(path: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, or the first `epochs` of them; none if there is no such file.

    Raises:
      InputError: a line is damaged.
    """
    lines = path.read_bytes().splitlines()[:epochs] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:  # also bad UTF-8
        raise InputError(f"{path} has a damaged line ({error}); remove the file or that line") from error
