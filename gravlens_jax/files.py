"""Files: atomic writes, locks, digests, visible names, and errors of full disks."""

import fcntl
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gravlens_jax.errors import InputError, check

DIGESTS = "digests.json"


@contextmanager
def catch_write_errors(path: Path) -> Iterator[None]:
    """Turns the OSError of a full disk or a read-only folder into InputError."""
    try:
        yield
    except OSError as error:
        failed = f"{path} could not be written: {error.strerror or error}; existing files are unchanged"
        advice = "Free disk space or fix the permissions (and continue a run with --resume), or choose another folder"
        raise InputError(f"{failed}. {advice}") from error


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other process uses, on any host."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to, and renames that file to `path` unless there is an error.

    The folder is created if needed; an OSError becomes InputError.
    """
    temporary = temporary_name(path)
    with catch_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it: see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def check_folder(path: Path) -> None:
    """Raises InputError unless the parent folder of `path`, a file to be written, exists."""
    check(path.parent.is_dir(), f"{path}: there is no folder {path.parent}; create it or choose another one")


def is_visible(name: str) -> bool:
    """Returns False for hidden (.DS_Store, ._1.npy) and system files (__MACOSX), and for paths in such folders."""
    return not any(part.startswith((".", "__")) for part in name.split("/"))


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


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Locks a folder, which is created if needed, if its file system supports it.

    If another process has locked it, waits for that process to end, with `wait`, or raises InputError.
    """
    with catch_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            used = f"{folder} is in use by another process ({file.read().strip()})"
            check(wait, f"{used}; wait for it or stop it, or give this run another --run-dir")
            print(f"{used}; waiting until it is done", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{folder} cannot be locked ({error.strerror}): start only one process on it", file=sys.stderr)
        file.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", file=file, flush=True)
        yield
