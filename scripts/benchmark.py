"""Measures the speed of this machine, with a subcommand for each benchmark."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from bench.input import measure_readers, readers_table
from bench.machine import machine, peaks, use_cpu_devices, versions
from bench.scaling import draw_scaling, powers_of_two, scaling_cases, scaling_rows, scaling_table, time_cases
from bench.simulation import CODES, rates_table, simulation_rates
from bench.sweep import Steps, sweep
from gravlens_jax import cli
from gravlens_jax.errors import check, check_installed
from gravlens_jax.run_dir import check_folder
from gravlens_jax.sharding import is_main, join_processes


def simulate(
    seconds: float = 4.0, repeats: int = 3, peers: tuple[Literal["lenstronomy", "herculens", "caustics"], ...] = ()
) -> None:
    """Measures images per second of `sphere` lenses with 25 subhalos, on one core and on all, beside other codes.

    Every measurement is a process of its own on the cores it may use, and the codes alternate; prints medians as a
    table and as a JSON line. Compilation is not counted. Batches have 32 lenses. Other codes get the same lenses, grid,
    sub-pixels and PSF, in float32 without noise; lenstronomy renders one lens at a time, on each of the cores.

    Args:
        seconds: length of one measurement.
        repeats: measurements of each figure.
        peers: other codes to measure (pip install lenstronomy herculens caustics six).
    """
    check(seconds > 0 and repeats > 0, f"seconds={seconds}, repeats={repeats}: expected positive numbers")
    for peer in peers:
        check_installed(peer, f"--peers {peer}", peer)
    check(hasattr(os, "sched_setaffinity"), "this benchmark pins processes to cores, which only Linux allows")
    codes = [code for code in CODES if code.split(",")[0] in ("gravlens_jax", *peers)]
    rates = simulation_rates(seconds, repeats, codes, sorted(os.sched_getaffinity(0)))
    print(rates_table(rates))
    print(json.dumps({"benchmark": "simulate", "images_per_second": rates} | versions()))


def measure_input(
    images: int = 6_000,
    batch_size: int = 256,
    batches: int = 20,
    repeats: int = 3,
    peer: Literal["torch"] | None = None,
) -> None:
    """Measures opening and random batches of a packed file beside other readers, each in a process of its own.

    Reads the same images from the packed, memory-mapped npz, from the same file by np.load, from a compressed npz, and
    with --peer torch from one .npy file each by a DataLoader (the best of 0, 1 and as many workers as there are cores).
    The files are written to the folder for temporary files, and are in the page cache when they are read.

    Args:
        images: number of images, 150 x 150 pixels.
        batch_size: images a batch.
        batches: batches of each measurement.
        repeats: measurements of each reader, alternating.
        peer: whether to measure the DataLoader (pip install torch).
    """
    check(Path("/proc/self/statm").exists(), "this benchmark reads its memory from /proc, which only Linux has")
    check(images >= batch_size, f"--images {images} do not fill a batch of {batch_size}; give more")
    if peer:
        check_installed(peer, "--peer", peer)
    _set_huge_pages()
    results = measure_readers(images, batch_size, batches, repeats, peer is not None)
    copy = peaks("float32")["bandwidth"] / 2 if jax.default_backend() == "cpu" else None
    print(readers_table(results, batch_size))
    print(f"a copy in memory: {copy:.1f} GB/s" if copy else "")
    rows = [{"reader": reader, "workers": workers} | values for (reader, workers), values in results.items()]
    print(
        json.dumps({"benchmark": "input", "images": images, "batch_size": batch_size, "copy_gb_s": copy, "rows": rows})
    )


def _set_huge_pages() -> None:
    """Gives child processes the same memory pages as train.py; PyTorch's too."""
    os.environ.setdefault("GLIBC_TUNABLES", cli.HUGE_PAGES)


def _sweep(training: bool, options: Steps) -> None:
    _set_huge_pages()
    print(json.dumps(sweep(training, options, partial(print, flush=True))))


def train(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures training steps of ResNet-20: stored images on the device -> flips, forward, backward, update."""
    _sweep(True, options)


def infer(options: Annotated[Steps, tyro.conf.arg(name="")]) -> None:
    """Measures inference of ResNet-20: stored images on the device -> logits."""
    _sweep(False, options)


def scale(
    devices: tuple[int, ...] = (),
    batch_per_device: int = 64,
    batch_size: int | None = None,
    image_size: int = 50,
    dtype: Literal["float32", "bfloat16"] = "float32",
    warmup: int = 3,
    steps: int = 10,
    repeats: int = 5,
    figure: Path | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Measures training steps of ResNet-20 over 1, 2, ... devices: weak scaling and strong scaling.

    All cases alternate; prints medians as a table and as a JSON line. Efficiency is the images per second of n devices
    over n times those of one. Devices of a CPU are virtual and share its cores: at best images per second stay the
    same. A run of several processes is started like one of train.py, on CPUs with JAX_NUM_CPU_DEVICES set.

    Args:
        devices: numbers of devices; by default powers of two up to all. A CPU is split into as many as needed.
        batch_per_device: images a step on each device, for weak scaling.
        batch_size: images a step on all devices together, for strong scaling; by default the largest of weak scaling.
        image_size: pixels of the network's input, height and width.
        dtype: of activations.
        warmup: steps before each measurement.
        steps: steps of each measurement.
        repeats: measurements of each case, alternating.
        figure: PNG to draw.
        coordinator: HOST:PORT of process 0 of a run of several, or auto to let JAX detect the cluster.
        num_processes: of that run.
        process_id: of this process: 0, 1, ...
    """
    cli.set_environment()
    if figure is not None:
        check_folder(figure)
    join_processes(coordinator, num_processes, process_id)
    if not jax.distributed.is_initialized():
        use_cpu_devices(max(devices, default=1))
    cases = scaling_cases(devices or powers_of_two(jax.device_count()), batch_per_device, batch_size)
    seconds = time_cases(cases, image_size, dtype, warmup, steps, repeats)
    if is_main():
        rows = scaling_rows(cases, seconds, image_size)
        facts = {"image_size": image_size, "dtype": dtype, "processes": jax.process_count(), "rows": rows}
        print(scaling_table(rows))
        if figure is not None:
            draw_scaling(figure, rows)
            print(figure)
        print(json.dumps({"benchmark": "scale"} | facts | machine((dtype,))))


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "infer": infer,
        "scale": scale,
        "input": measure_input,
        "simulate": simulate,
    }
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
