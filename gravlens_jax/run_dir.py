"""The directory of a run: its config, lock, metrics and calibration; `checkpoint` saves the networks in it.

runs/<name>/config.json              the configuration; written before the first step
runs/<name>/metrics.jsonl            one line per epoch
runs/<name>/checkpoints/             see `checkpoint`
runs/<name>/calibration.json         step -> temperature of the logits, for the checkpoints of a finished run
runs/<name>/report/                  figures, metrics and predictions on the test split

All files are written atomically: under a temporary name, then renamed.
"""

import fcntl
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from gravlens_jax.config import Config, from_dict
from gravlens_jax.errors import InputError, check, parse_json

DIGESTS = "digests.json"


class RunInfo(NamedTuple):
    """The contents of config.json."""

    config: Config
    classes: tuple[str, ...]
    image_shape: tuple[int, int]  # height and width of the training images


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the OSError of a full disk or a read-only folder into InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path} could not be written: {reason}; existing files are unchanged. Free disk space or fix the "
            f"permissions (and continue a run with --resume), or choose another folder"
        ) from error


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other process uses, on any host."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Raises InputError unless the parent folder of `path`, a file to be written, exists."""
    check(path.parent.is_dir(), f"{path}: there is no folder {path.parent}; create it or choose another one")


def cache_folder() -> Path:
    """Returns the folder for this package's files in the user's cache; it may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification ignores relative paths
    return (base if base.is_absolute() else Path.home() / ".cache") / "gravlens_jax"


def write_digests(folder: Path) -> None:
    """Writes digests.json into a folder: the SHA-256 of every file in it."""
    write_atomically(folder / DIGESTS, json.dumps(_digests(folder)))


def verify_digests(folder: Path, part: str = "") -> None:
    """Raises ValueError if a file whose name begins with `part` differs from digests.json, if there is one."""
    if not (folder / DIGESTS).exists():  # killed before it was written
        return
    saved, found = json.loads((folder / DIGESTS).read_text()), _digests(folder)
    for name, digest in saved.items():
        if name.startswith(part) and found.get(name) != digest:
            raise ValueError(f"{name} is {'not as it was saved' if name in found else 'missing'}")


def _digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != DIGESTS)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_unused(run_dir: Path) -> None:
    """Raises InputError if the directory already holds a run."""
    used = (run_dir / "config.json").exists()
    check(not used, f"{run_dir} already holds a run; continue it with --resume, or give the new run another --run-dir")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Locks the run directory, which is created if needed, if its file system can; InputError if it is in use."""
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
    """Creates the run directory and its config.json; a directory that already holds a run is an InputError."""
    check_unused(run_dir)
    values = info._asdict() | {"config": asdict(info.config)}
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.json", json.dumps(values, indent=2) + "\n")


def read_run(run_dir: Path) -> RunInfo:
    """Reads config.json of a run directory."""
    path = Path(run_dir) / "config.json"
    check(path.is_file(), f"{run_dir} is not a run (no config.json); expected a directory made by scripts/train.py")
    return from_dict(RunInfo, parse_json(path.read_bytes(), str(path)), str(path))


def check_resumable(run_dir: Path, config: Config) -> None:
    """Raises InputError unless the directory holds a run of the same config."""
    saved, given = (flatten_dict(asdict(c), sep=".") for c in (read_run(run_dir).config, config))
    for name, value in saved.items():
        check(
            value == given[name] or name in ("run_dir", "device_data"),  # which do not change the result
            f"--{name.replace('_', '-')} is {given[name]} but the run to resume has {value}; leave the option out, or "
            f"start a new run with another --run-dir",
        )


def read_history(run_dir: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, or the first `epochs`; [] if there is no such file, InputError if damaged."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()[:epochs] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:  # also bad UTF-8
        raise InputError(f"{path} has a damaged line ({error}); remove the file or that line") from error


def write_history(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces metrics.jsonl by `lines`."""
    path = run_dir / "metrics.jsonl"
    with writing(path):
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_temperatures(run_dir: Path, temperatures: dict[int, float]) -> None:
    """Writes calibration.json: the temperature for the checkpoint of each step."""
    path = run_dir / "calibration.json"
    with writing(path):
        write_atomically(path, json.dumps(temperatures) + "\n")


def read_temperature(run_dir: Path, step: int) -> float:
    """Returns the temperature for the checkpoint of `step`; 1.0 if none was fitted."""
    path = run_dir / "calibration.json"
    if not path.exists():
        return 1.0
    values = parse_json(path.read_bytes(), str(path))
    temperature = values.get(str(step), 1.0) if isinstance(values, dict) else None
    if isinstance(temperature, float) and 0 < temperature < 1e3:
        return temperature
    raise InputError(f"{path} is damaged: expected a temperature for each step; remove it")
