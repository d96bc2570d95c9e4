"""Writing files: whole or not at all, and a full disk or a read-only folder is a mistake of the user's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gravlens_jax.config import InputError


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
