"""Measures how fast this machine is; one subcommand for each thing that is measured."""

import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import check
from gravlens_jax.measure import peaks
from gravlens_jax.measure_input import measure_readers, readers_table
from gravlens_jax.measure_simulation import rates_table, simulation_rates
from gravlens_jax.measure_steps import Steps, sweep
from gravlens_jax.peers import check_peer


def simulate(seconds: float = 4.0, repeats: int = 3, lenstronomy: bool = True) -> None:
    """Measures images per second of `ct1` with photon noise, on one core and on all, beside lenstronomy.

    Every measurement is a process of its own on the cores it may use, and the codes take turns; medians are printed, as
    a table and as a JSON line. Compilation is not counted. lenstronomy sees lenses of the same population, the same
    grid, sub-pixels and PSF; its strings are 100 point masses; on all cores it runs one process on each.

    Args:
        seconds: length of one measurement of one class.
        repeats: measurements of each figure.
        lenstronomy: whether to measure it (pip install lenstronomy).
    """
    check(hasattr(os, "sched_setaffinity"), "this benchmark pins processes to cores, which only Linux allows")
    rates = simulation_rates(seconds, repeats, lenstronomy, sorted(os.sched_getaffinity(0)))
    print(rates_table(rates))
    result = [{"code": code, "cores": n} | values for (code, n), values in rates.items()]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "simulate", "images_per_second": result} | versions))


def measure_input(
    images: int = 6_000,
    batch_size: int = 256,
    batches: int = 20,
    repeats: int = 3,
    peer: Literal["torch"] | None = None,
) -> None:
    """Measures opening and random batches of a packed file beside what others read, in processes of their own.

    The same images as the packed, memory-mapped npz, as the same file read by np.load, as a compressed npz, and with
    --peer torch as one .npy file each read by a DataLoader (the best of 0, 1 and as many workers as there are cores).
    Files are written to the folder for temporary files first, and are in the page cache when they are read.

    Args:
        images: number of images, 150 x 150 pixels.
        batch_size: images a batch.
        batches: batches of each measurement.
        repeats: measurements of each reader, in turn.
        peer: whether to measure the DataLoader (pip install torch).
    """
    check(Path("/proc/self/statm").exists(), "this benchmark reads its memory from /proc, which only Linux has")
    check(images >= batch_size, f"--images {images} do not fill a batch of {batch_size}; give more")
    check_peer(peer)
    results = measure_readers(images, batch_size, batches, repeats, peer is not None)
    copy = peaks("float32")["bandwidth"] / 2 if jax.default_backend() == "cpu" else None
    print(readers_table(results, batch_size))
    print(f"a copy in memory: {copy:.1f} GB/s" if copy else "")
    rows = [{"reader": reader, "workers": workers} | values for (reader, workers), values in results.items()]
    print(
        json.dumps({"benchmark": "input", "images": images, "batch_size": batch_size, "copy_gb_s": copy, "rows": rows})
    )


def _sweep(training: bool, options: Steps) -> None:
    os.environ.setdefault("GLIBC_TUNABLES", cli.HUGE_PAGES)  # as train.py does; for both codes
    print(json.dumps(sweep(training, options, partial(print, flush=True))))


def train(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures training steps of ResNet-20: stored images on the device -> flips, forward, backward, update."""
    _sweep(True, options)


def infer(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures inference of ResNet-20: stored images on the device -> logits."""
    _sweep(False, options)


if __name__ == "__main__":
    commands = {"train": train, "infer": infer, "input": measure_input, "simulate": simulate}
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
