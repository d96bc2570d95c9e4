"""How fast random batches come from a packed file here, and from what others read; for `scripts/benchmark.py input`."""

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax.config import CLASSES, check
from gravlens_jax.data import epoch_rows, train_batches
from gravlens_jax.measure import medians
from gravlens_jax.npz import open_npz, write_npz

PIXELS = 150
READERS = ("memory map", "np.load", "compressed", "DataLoader")


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


def measure_reader(reader: str, folder: Path, batch_size: int, batches: int, workers: int = 0) -> dict[str, Any]:
    """Measures one reader of what `write_files` wrote; call it in a process of its own.

    Args:
      reader: one of READERS.
      folder: where the files are.
      batch_size: images a batch, drawn at random.
      batches: how many to read, at most an epoch.
      workers: processes of the DataLoader.

    Returns:
      open_seconds, until batches can be asked for; open_mib, the resident memory that this took; batches_per_second;
      read_mib, the most resident memory that opening and reading took.
    """
    check(reader in READERS, f"reader={reader!r}: expected one of {READERS}")
    for path in folder.glob(_FILES[reader]):  # into the page cache
        path.read_bytes()
    before = _resident_mib()
    start = time.perf_counter()
    iterator = _READERS[reader](folder, batch_size, workers)
    opened, open_mib = time.perf_counter() - start, _resident_mib() - before
    start, done, most = time.perf_counter(), 0, 0.0
    for _ in zip(range(batches), iterator, strict=False):
        done, most = done + 1, max(most, _resident_mib())
    rate = done / (time.perf_counter() - start)
    return {"open_seconds": opened, "open_mib": open_mib, "batches_per_second": rate, "read_mib": most - before}


def measure_readers(
    images: int, batch_size: int, batches: int, repeats: int, torch: bool
) -> dict[tuple[str, int], dict[str, float]]:
    """Measures all readers in turn, each time in a process of its own.

    Args:
      images, batch_size, batches: as in `write_files` and `measure_reader`.
      repeats: measurements of each reader.
      torch: whether to measure the DataLoader: with 0, 1 and as many workers as there are cores.

    Returns:
      (reader, workers) -> medians of what `measure_reader` returns; of the DataLoader with the best number of workers.
    """
    cases = [(reader, 0) for reader in READERS[:3]]
    if torch:
        cases += [(READERS[3], workers) for workers in sorted({0, 1, os.cpu_count() or 1})]
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), images, torch)
        for _ in range(repeats):
            for reader, workers in cases:
                with ProcessPoolExecutor(1, context) as pool:
                    future = pool.submit(measure_reader, reader, Path(folder), batch_size, batches, workers)
                    results.setdefault((reader, workers), []).append(future.result())
    return best_loader(medians(results))


def best_loader(results: dict[tuple[str, int], dict[str, float]]) -> dict[tuple[str, int], dict[str, float]]:
    """Returns the results with, of the DataLoader's, only the one of most batches per second."""
    loaders = [case for case in results if case[0] == READERS[3]]
    best = max(loaders, key=lambda case: results[case]["batches_per_second"], default=None)
    return {case: values for case, values in results.items() if case not in loaders or case == best}


def readers_table(results: dict[tuple[str, int], dict[str, float]], batch_size: int) -> str:
    """Returns the results of `measure_readers` as a text table."""
    lines = [f"{'':24}{'open ms':>10}{'MiB':>8}{'batches/s':>11}{'images/s':>10}{'GB/s':>7}{'MiB':>8}"]
    for (reader, workers), v in results.items():
        gb = v["batches_per_second"] * batch_size * PIXELS**2 * (8 if reader == READERS[3] else 2) / 1e9
        name = reader + (f", {workers} workers" if reader == READERS[3] else "")
        lines.append(
            f"{name:24}{1e3 * v['open_seconds']:10.1f}{v['open_mib']:8.0f}{v['batches_per_second']:11.1f}"
            f"{v['batches_per_second'] * batch_size:10,.0f}{gb:7.2f}{v['read_mib']:8.0f}"
        )
    return "\n".join(lines)


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _memory_map(folder: Path, batch_size: int, _: int) -> Iterator:
    dataset = open_npz(folder / "packed.npz")
    return train_batches(dataset, epoch_rows(dataset.size, batch_size, 0, 0))


def _loaded(folder: Path, batch_size: int, _: int, name: str = "packed.npz") -> Iterator:
    with np.load(folder / name) as file:
        images, labels = file["images"], file["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    rows = (order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size))
    return ((images[r], labels[r]) for r in rows)


def _compressed(folder: Path, batch_size: int, workers: int) -> Iterator:
    return _loaded(folder, batch_size, workers, "compressed.npz")


class _Images:
    """What a PyTorch DataLoader asks of a data set; its worker processes import it by name."""

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


_READERS = {"memory map": _memory_map, "np.load": _loaded, "compressed": _compressed, "DataLoader": _data_loader}
_FILES = {"memory map": "packed.npz", "np.load": "packed.npz", "compressed": "compressed.npz", "DataLoader": "npy/*"}
