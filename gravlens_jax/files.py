"""Writing files: whole or not at all, and a full disk or a read-only folder is a mistake of the user's."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gravlens_jax.config import InputError, check


def temporary_name(path: Path) -> Path:
    """Returns a name beside `path` that no other writer has, on whatever machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def check_folder(path: Path) -> None:
    """Raises InputError unless the folder of a file that is to be written is there."""
    check(path.parent.is_dir(), f"{path}: there is no folder {path.parent}; make it or choose another one")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = temporary_name(path)
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only folder raises into InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path} could not be written: {reason}; what was there before is intact. Free space or mend the "
            f"permissions (and continue a run with --resume), or choose another folder"
        ) from error
