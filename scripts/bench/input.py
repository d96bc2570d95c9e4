"""Throughput of random batches from a packed file, beside other readers."""

import operator
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Row, alternate, call_apart
from gravlens_jax.config import CLASSES
from gravlens_jax.loader import epoch_rows
from gravlens_jax.npz import open_npz, read_rows, write_npz

PIXELS = 150
READERS = {  # and the files that they read
    "memory map": "packed.npz",
    "np.load": "packed.npz",
    "compressed": "compressed.npz",
    "DataLoader": "npy",
}
COLUMNS = (
    "reader     {reader}workers{workers}open s{open_seconds:.3g}batches/s{batches_per_second:.1f}"
    "images/s{images_per_second:,.0f}  GB/s{gb_per_second:.2f}memory MiB{memory_mib:.0f}"
)


def write_files(folder: Path, n: int, npy: bool) -> None:
    """Writes the same `n` random images as packed.npz, compressed.npz, and with `npy` as one float64 .npy file each."""
    rng = np.random.default_rng(0)
    images = rng.poisson(40, (n, PIXELS, PIXELS)).astype(np.uint16)
    labels = np.arange(n, dtype=np.int32) % len(CLASSES)
    write_npz(folder / "packed.npz", [images], images.shape, images.dtype, labels, CLASSES, {})
    np.savez_compressed(folder / "compressed.npz", images=images, labels=labels)
    if npy:
        (folder / "npy").mkdir()
        for i, image in enumerate(images):
            np.save(folder / "npy" / f"{i}.npy", (image / image.max())[None])  # as the public images are


def _collate(paths: list[Path]) -> Any:
    from torch.utils.data import default_collate

    return default_collate([(np.load(path).astype(np.float32), int(path.stem) % len(CLASSES)) for path in paths])


def open_reader(reader: str, workers: int, folder: Path, batch_size: int) -> Iterator[Any]:
    """Opens the files of `write_files`; returns random batches, (images, labels), of an epoch.

    Args:
      reader: one of READERS.
      workers: processes of the DataLoader.
      folder: where the files are.
      batch_size: images a batch.
    """
    path = folder / READERS[reader]
    if reader == "DataLoader":
        from torch.utils.data import DataLoader

        paths: Any = sorted(path.iterdir())
        options = {"shuffle": True, "drop_last": True, "num_workers": workers, "collate_fn": _collate}
        return iter(DataLoader(paths, batch_size, **options))
    read: Callable = operator.getitem
    if reader == "memory map":
        dataset = open_npz(path)
        images, labels, read = dataset.images, dataset.labels, read_rows
    else:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    return ((read(images, rows), labels[rows]) for rows in epoch_rows(len(labels), batch_size, 0, 0))


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_reader(reader: str, workers: int, folder: Path, batch_size: int, batches: int) -> Row:
    """Measures up to `batches` batches of `open_reader`, at most an epoch; call it in a process of its own.

    Returns:
      open_seconds, until batches can be requested; batches_per_second; images_per_second; gb_per_second, of stored
      pixels; memory_mib, by which the resident memory of the process has grown.
    """
    path = folder / READERS[reader]
    for file in path.iterdir() if path.is_dir() else [path]:  # into the page cache
        with file.open("rb") as source, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(source, nowhere)
    before = _resident_mib()
    start = time.perf_counter()
    iterator = open_reader(reader, workers, folder, batch_size)
    opened = time.perf_counter()
    done = sum(1 for _ in zip(range(batches), iterator, strict=False))
    rate = done / (time.perf_counter() - opened)
    return {
        "open_seconds": opened - start,
        "batches_per_second": rate,
        "images_per_second": rate * batch_size,
        "gb_per_second": rate * batch_size * PIXELS**2 * (8 if path.is_dir() else 2) / 1e9,
        "memory_mib": _resident_mib() - before,
    }


def measure_readers(images: int, batch_size: int, batches: int, repeats: int, torch: bool) -> Iterator[Row]:
    """Measures all readers alternately, each time in a process of its own; yields reader, workers and medians of each.

    Args:
      images, batch_size, batches: as in `write_files` and `measure_reader`.
      repeats: measurements of each reader.
      torch: whether to measure the DataLoader: with 0, 1 and as many workers as there are cores.
    """
    cases = [(reader, 0) for reader in READERS if reader != "DataLoader"]
    if torch:
        cases += [("DataLoader", workers) for workers in sorted({0, 1, os.cpu_count() or 1})]
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), images, torch)
        options = Path(folder), batch_size, batches
        runs = alternate(cases, lambda case: call_apart(measure_reader, (*case, *options))[0], repeats)
    for (reader, workers), some in runs.items():
        yield {"reader": reader, "workers": workers} | {k: statistics.median(run[k] for run in some) for k in some[0]}
