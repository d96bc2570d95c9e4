"""Throughput of random batches from a packed file: memory-mapped, beside np.load."""

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row, alternate, call_apart
from gravlens_jax.config import CLASSES
from gravlens_jax.loader import epoch_rows
from gravlens_jax.npz import open_npz, read_rows, write_npz

PIXELS = 150
READERS = "memory map", "np.load"
COLUMNS = "reader     {reader}open s{open_seconds:.3g}batches/s{batches_per_second:.1f}memory MiB{memory_mib:.0f}"


def write_images(path: Path, n: int) -> None:
    """Writes a packed file of `n` random images."""
    images = np.random.default_rng(0).poisson(40, (n, PIXELS, PIXELS)).astype(np.uint16)
    labels = np.arange(n, dtype=np.int32) % len(CLASSES)
    write_npz(path, [images], images.shape, images.dtype, labels, CLASSES, {})


def open_reader(reader: str, path: Path, batch_size: int) -> Iterator[Any]:
    """Opens a packed file by one of READERS; returns random batches, (images, labels), of an epoch."""
    if reader == "memory map":
        dataset = open_npz(path)
        images, labels = dataset.images, dataset.labels
    else:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    return ((read_rows(images, rows), labels[rows]) for rows in epoch_rows(len(labels), batch_size, 0, 0))


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_reader(reader: str, path: Path, batch_size: int, batches: int) -> Row:
    """Measures up to `batches` batches of `open_reader`, at most an epoch; call it in a process of its own.

    Returns:
      open_seconds, until batches can be requested; batches_per_second; memory_mib, by which the resident memory of the
      process has grown.
    """
    with path.open("rb") as source, open(os.devnull, "wb") as nowhere:  # into the page cache
        shutil.copyfileobj(source, nowhere)
    before = _resident_mib()
    start = time.perf_counter()
    iterator = open_reader(reader, path, batch_size)
    opened = time.perf_counter()
    done = sum(1 for _ in zip(range(batches), iterator, strict=False))
    rate = done / (time.perf_counter() - opened)
    return {"open_seconds": opened - start, "batches_per_second": rate, "memory_mib": _resident_mib() - before}


def measure_readers(images: int, batch_size: int, batches: int, repeats: int) -> Iterator[Row]:
    """Measures READERS alternately, each time in a process of its own; yields reader and medians of each.

    Args:
      images: number of images.
      batch_size, batches: as in `measure_reader`.
      repeats: measurements of each reader.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.npz"
        write_images(path, images)
        arguments = path, batch_size, batches
        runs = alternate(READERS, lambda reader: call_apart(measure_reader, (reader, *arguments))[0], repeats)
    for reader, some in runs.items():
        yield {"reader": reader} | {k: statistics.median(run[k] for run in some) for k in some[0]}
