"""Measures the speed of this machine, with a subcommand for each benchmark."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from gravlens_jax.run_dir import check_folder

from bench.accelerator import measure_accelerator
from bench.accuracy import HEADER as ACCURACY_HEADER
from bench.accuracy import line as accuracy_line
from bench.accuracy import measure_accuracy, minutes_to
from bench.input import measure_readers, readers_table
from bench.machine import machine, peaks, use_cpu_devices, versions
from bench.scaling import draw_scaling, powers_of_two, scaling_cases, scaling_rows, scaling_table, time_cases
from bench.simulation import CODES, rates_table, simulation_rates
from bench.sweep import Steps, sweep
from bench.topology import HEADER, compile_for, line, programs, topology_mesh
from gravlens_jax import cli
from gravlens_jax.config import PRESETS, Config, ModelConfig
from gravlens_jax.errors import check, check_installed
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
    os.environ |= cli.fast_environment()  # of the processes that it starts
    results = measure_readers(images, batch_size, batches, repeats, peer is not None)
    copy = peaks("float32")["bandwidth"] / 2 if jax.default_backend() == "cpu" else None
    print(readers_table(results, batch_size))
    print(f"a copy in memory: {copy:.1f} GB/s" if copy else "")
    rows = [{"reader": reader, "workers": workers} | values for (reader, workers), values in results.items()]
    print(
        json.dumps({"benchmark": "input", "images": images, "batch_size": batch_size, "copy_gb_s": copy, "rows": rows})
    )


def _sweep(training: bool, options: Steps) -> None:
    os.environ |= cli.fast_environment()  # of the processes that it starts
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


def accuracy(
    preset: Literal["default", "smoke"] = "default",
    epochs: tuple[int, ...] = (1, 3),
    targets: tuple[float, ...] = (0.896, 0.95),
    peer: Literal["torch"] | None = None,
) -> None:
    """Measures the minutes from nothing to validation accuracies: simulation, compilation and training.

    With --peer torch also the same recipe in PyTorch, and GravLensNet's, whose minutes are its published number of
    image-steps times the measured time of one.

    Args:
        preset: the recipe.
        epochs: numbers of epochs; each is a run, at whose end the learning rate is 0.
        targets: accuracies.
        peer: whether to train in PyTorch too (pip install torch).
    """
    check(len(epochs) > 0 and min(epochs) > 0, f"--epochs {epochs}: expected one positive number or more")
    if peer:
        check_installed(peer, "--peer", peer)
    os.environ |= cli.fast_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_accuracy(PRESETS[preset], epochs, peer is not None, Path(folder))
    print(ACCURACY_HEADER, *map(accuracy_line, rows), sep="\n")
    minutes = {target: minutes_to(rows, target) for target in targets}
    for target, own in minutes.items():
        print(f"minutes to {target:.1%}: {', '.join(f'{code} {value:.1f}' for code, value in own.items()) or 'none'}")
    print(json.dumps({"benchmark": "accuracy", "preset": preset, "rows": rows, "minutes_to": minutes} | versions()))


def compile_ahead(
    topology: tuple[str, ...] = ("v5e:1x1", "v5e:2x2", "v5e:16x16"),
    batch_per_chip: int = 64,
    dtype: Literal["float32", "bfloat16"] = "float32",
    effort: Literal["O0", "O1", "O2", "O3"] = "O1",
) -> None:
    """Compiles the training step, and the step that simulates its batch, for TPUs, of which none is needed.

    Prints compile time, and FLOPs, temporary memory and collectives of each chip, as a table and as a JSON line.

    Args:
        topology: chips, such as v5e:2x2, v5p:2x2x1 or v6e:16x16 (pip install "jax[tpu]").
        batch_per_chip: images a step on each chip.
        dtype: of activations.
        effort: of the compiler; more than O1 takes minutes.
    """
    check(
        len(topology) > 0 and batch_per_chip > 0, f"--topology {topology}, --batch-per-chip {batch_per_chip}: too few"
    )
    check_installed("libtpu", "compile", '"jax[tpu]"')
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_optimization_level", effort)
    rows = []
    print(HEADER)
    for name in topology:
        mesh = topology_mesh(name)
        config = Config(batch_size=batch_per_chip * mesh.size, model=ModelConfig(dtype=dtype))
        for program, traced in programs(config, mesh):
            row = {"topology": name, "chips": mesh.size, "program": program, "batch_size": config.batch_size}
            rows.append(row | compile_for(traced, "tpu"))
            print(line(rows[-1]), flush=True)
    print(json.dumps({"benchmark": "compile", "effort": effort, "dtype": dtype, "rows": rows} | versions()))


def gpu(
    batch_sizes: tuple[int, ...] = (32, 256, 2048),
    recipes: tuple[Literal["default", "best"], ...] = ("default", "best"),
    json_file: Path = Path("gpu.json"),
) -> None:
    """Measures a GPU or a TPU: steps, inference, simulation, and whole runs from nothing; checks its logits.

    Prints a table and writes all figures to a JSON file.

    Args:
        batch_sizes: images a step.
        recipes: presets of train.py to run; none: leave this part out.
        json_file: to write.
    """
    check(len(batch_sizes) > 0 and min(batch_sizes) > 0, f"--batch-sizes {batch_sizes}: expected positive numbers")
    check_folder(json_file)
    here = machine(("float32", "bfloat16"))
    print(f"{here['device_kind']}, jax {here['versions']['jax']}")
    with tempfile.TemporaryDirectory() as folder:
        result = measure_accelerator(batch_sizes, recipes, Path(folder), partial(print, flush=True))
    json_file.write_text(json.dumps({"benchmark": "gpu"} | result | here, indent=1) + "\n")
    print(json_file)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "infer": infer,
        "scale": scale,
        "input": measure_input,
        "simulate": simulate,
        "compile": compile_ahead,
        "accuracy": accuracy,
        "gpu": gpu,
    }
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
