"""Throughput of random batches from a packed file, beside other readers; for `scripts/benchmark.py input`."""

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np


from bench.machine import medians
from gravlens_jax.config import CLASSES
from gravlens_jax.npz import open_npz, write_npz

PIXELS = 150
LOADER = "DataLoader"
Results = dict[tuple[str, int], dict[str, float]]  # (reader, workers) -> results of `measure_reader`


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


def _random_rows(n: int, batch_size: int) -> np.ndarray:
    steps = n // batch_size
    return np.random.default_rng(0).permutation(n)[: steps * batch_size].reshape(steps, batch_size)


def _memory_map(folder: Path, batch_size: int, _: int) -> Iterator:
    dataset = open_npz(folder / "packed.npz")
    return ((read_rows(dataset.images, rows), dataset.labels[rows]) for rows in _random_rows(dataset.size, batch_size))


def _loaded(folder: Path, batch_size: int, _: int, name: str = "packed.npz") -> Iterator:
    with np.load(folder / name) as file:
        images, labels = file["images"], file["labels"]
    return ((images[rows], labels[rows]) for rows in _random_rows(len(labels), batch_size))


def _compressed(folder: Path, batch_size: int, workers: int) -> Iterator:
    return _loaded(folder, batch_size, workers, "compressed.npz")


class _Images:
    """The data set of a PyTorch DataLoader; its worker processes import it by name."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.load(self.paths[i]).astype(np.float32), i % len(CLASSES)


def _data_loader(folder: Path, batch_size: int, workers: int) -> Iterator:
    from torch.utils.data import DataLoader

    images = _Images(sorted((folder / "npy").iterdir()))
    return iter(DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=workers))


READERS = {  # name: function (folder, batch_size, workers) -> batches, and the files that it reads
    "memory map": (_memory_map, "packed.npz"),
    "np.load": (_loaded, "packed.npz"),
    "compressed": (_compressed, "compressed.npz"),
    LOADER: (_data_loader, "npy/*"),
}


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_reader(reader: str, folder: Path, batch_size: int, batches: int, workers: int = 0) -> dict[str, float]:
    """Measures one reader of the files of `write_files`; call it in a process of its own.

    Args:
      reader: one of READERS.
      folder: where the files are.
      batch_size: images a batch, drawn at random.
      batches: how many to read, at most an epoch.
      workers: processes of the DataLoader.

    Returns:
      open_seconds, until batches can be requested; open_mib, the resident memory that this took; batches_per_second;
      read_mib, the largest resident memory that opening and reading took.
    """
    open_reader, pattern = READERS[reader]
    for path in folder.glob(pattern):  # into the page cache
        path.read_bytes()
    before = _resident_mib()
    start = time.perf_counter()
    iterator = open_reader(folder, batch_size, workers)
    opened, open_mib = time.perf_counter() - start, _resident_mib() - before
    start, done, most = time.perf_counter(), 0, 0.0
    for _ in zip(range(batches), iterator, strict=False):
        done, most = done + 1, max(most, _resident_mib())
    rate = done / (time.perf_counter() - start)
    return {"open_seconds": opened, "open_mib": open_mib, "batches_per_second": rate, "read_mib": most - before}


def measure_readers(images: int, batch_size: int, batches: int, repeats: int, torch: bool) -> Results:
    """Measures all readers alternately, each time in a process of its own.

    Args:
      images, batch_size, batches: as in `write_files` and `measure_reader`.
      repeats: measurements of each reader.
      torch: whether to measure the DataLoader: with 0, 1 and as many workers as there are cores.

    Returns:
      medians of the results of `measure_reader`; of the DataLoader with the best number of workers.
    """
    cases = [(reader, 0) for reader in READERS if reader != LOADER]
    if torch:
        cases += [(LOADER, workers) for workers in sorted({0, 1, os.cpu_count() or 1})]
    results: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), images, torch)
        for _ in range(repeats):
            for reader, workers in cases:
                with ProcessPoolExecutor(1, context) as pool:
                    future = pool.submit(measure_reader, reader, Path(folder), batch_size, batches, workers)
                    results[reader, workers].append(future.result())
    return best_loader(medians(results))


def best_loader(results: Results) -> Results:
    """Returns the results with only the DataLoader of the most batches per second."""
    loaders = [case for case in results if case[0] == LOADER]
    best = max(loaders, key=lambda case: results[case]["batches_per_second"], default=None)
    return {case: values for case, values in results.items() if case not in loaders or case == best}


def readers_table(results: Results, batch_size: int) -> str:
    """Returns the results of `measure_readers` as a text table."""
    lines = [f"{'':24}{'open ms':>10}{'MiB':>8}{'batches/s':>11}{'images/s':>10}{'GB/s':>7}{'MiB':>8}"]
    for (reader, workers), values in results.items():
        name, pixel_bytes = (f"{reader}, {workers} workers", 8) if reader == LOADER else (reader, 2)
        images_per_second = values["batches_per_second"] * batch_size
        lines.append(
            f"{name:24}{1e3 * values['open_seconds']:10.1f}{values['open_mib']:8.0f}"
            f"{values['batches_per_second']:11.1f}{images_per_second:10,.0f}"
            f"{images_per_second * PIXELS**2 * pixel_bytes / 1e9:7.2f}{values['read_mib']:8.0f}"
        )
    return "\n".join(lines)
