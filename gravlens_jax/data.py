"""Batches: a pure function of the data set, the seed and the epoch, read ahead in a thread."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gravlens_jax.config import FILES, SPLITS, check
from gravlens_jax.npz import Dataset, native, open_npz


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the `n` training images in epoch 0, 1, ...: an int permutation, a function of the rest."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def epoch_rows(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the rows of the full batches of an epoch, int32 (steps, batch_size)."""
    steps = n // batch_size
    return epoch_order(n, seed, epoch)[: steps * batch_size].astype(np.int32).reshape(steps, batch_size)


def eval_rows(n: int, batch_size: int) -> np.ndarray:
    """Returns all rows in order, int (steps, batch_size); the last batch is filled up with rows that do not exist."""
    return np.arange(-(-n // batch_size) * batch_size).reshape(-1, batch_size)


def train_batches(dataset: Dataset, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of `rows` (steps, batch), new host arrays: images (batch, height, width), labels (batch,)."""
    for some in rows:
        yield {"images": take_rows(dataset.images, some), "labels": dataset.labels[some]}


def eval_batches(dataset: Dataset, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yields the same with `mask`, bool (batch,), false for rows that do not exist, which repeat the last image."""
    n = dataset.size
    for batch, some in zip(train_batches(dataset, np.minimum(rows, n - 1)), rows, strict=True):
        yield batch | {"mask": some < n}


def take_rows(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns images[rows] as a new array; raises InputError if a mapped file is not what it was when it was opened.

    Rows of a mapped file are read from the file: touching the map costs page faults, a kill signal where the file has
    become shorter, and all pages ever touched count as the process's memory.
    """
    batch = np.empty((len(rows), *images.shape[1:]), images.dtype)
    opened = getattr(images, "stat", None)
    if not isinstance(images, np.memmap) or opened is None:  # in memory, or a part of what `open_npz` returns
        for i, row in enumerate(rows):  # one by one: the fastest where a map is not aligned to its dtype
            batch[i] = images[row]
        return native(batch)
    row_bytes = batch.nbytes // max(1, len(rows))
    with open(str(images.filename), "rb", buffering=0) as file:
        now = os.fstat(file.fileno())
        same = os.path.samestat(now, opened) and (now.st_size, now.st_mtime_ns) == (opened.st_size, opened.st_mtime_ns)
        check(same, f"{images.filename} is not the file that was opened any more; start again")
        for image, row in zip(batch, rows, strict=True):
            count = os.preadv(file.fileno(), [image], images.offset + int(row) * row_bytes)
            check(count == row_bytes, f"{images.filename}: ends before image {row}; make it again")
    return native(batch)


def prefetch(batches: Iterator, depth: int = 2) -> Iterator:
    """Yields the same items, read up to `depth` ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(next, batches, None) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield item


def load_splits(folder: Path, splits: tuple[str, ...] = FILES) -> dict[str, Dataset]:
    """Opens <split>.npz of each split, easy.npz only if there is one; checks that they belong together."""
    paths = {split: Path(folder) / f"{split}.npz" for split in splits}
    datasets = {split: open_npz(path) for split, path in paths.items() if split in SPLITS or path.exists()}
    first = splits[0]
    for split, other in datasets.items():
        check(
            other.classes == datasets[first].classes and other.image_shape == datasets[first].image_shape,
            f"{folder}/{split}.npz has classes {other.classes} and images of {other.image_shape} pixels, "
            f"{first}.npz {datasets[first].classes} and {datasets[first].image_shape}; pack them together",
        )
    return datasets
