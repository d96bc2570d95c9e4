"""Measures the speed of this machine, with a subcommand for each benchmark."""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench.costs import Dtype, Steps, copy_bandwidth
from bench.harness import as_json, check_least, table
from gravlens_jax import cli
from gravlens_jax.config import PRESETS, ModelConfig
from gravlens_jax.errors import check, check_installed


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
    check_least(1, repeats=repeats)
    check(seconds > 0, f"seconds={seconds}: expected a positive number")
    for peer in peers:
        check_installed(peer, f"--peers {peer}", peer)
    check(hasattr(os, "sched_setaffinity"), "this benchmark pins processes to cores, which only Linux allows")
    from bench.simulation import CODES, COLUMNS, simulation_rates

    codes = [code for code in CODES if code.split(",")[0] in ("gravlens_jax", *peers)]
    rows = table(simulation_rates(seconds, repeats, codes, sorted(os.sched_getaffinity(0))), COLUMNS)
    print(as_json("simulate", rows))


def measure_input(
    images: int = 6_000,
    batch_size: int = 256,
    batches: int = 20,
    repeats: int = 3,
    peer: Literal["torch"] | None = None,
) -> None:
    """Measures opening and random batches of a packed file beside other readers, each in a process of its own.

    Reads the same images from the packed, memory-mapped npz, from the same file by np.load, from a compressed npz, and
    with --peer torch from one .npy file each by a DataLoader (with 0, 1 and as many workers as there are cores). The
    files are written to the folder for temporary files, and are in the page cache when they are read.

    Args:
        images: number of images, 150 x 150 pixels.
        batch_size: images a batch.
        batches: batches of each measurement.
        repeats: measurements of each reader, alternating.
        peer: whether to measure the DataLoader (pip install torch).
    """
    check_least(1, batch_size=batch_size, batches=batches, repeats=repeats)
    check(Path("/proc/self/statm").exists(), "this benchmark reads its memory from /proc, which only Linux has")
    check(images >= batch_size, f"--images {images} do not fill a batch of {batch_size}; give more")
    if peer:
        check_installed(peer, "--peer", peer)
    os.environ |= cli.fast_environment()  # of the processes that it starts
    from bench.input import COLUMNS, measure_readers

    rows = table(measure_readers(images, batch_size, batches, repeats, peer is not None), COLUMNS)
    copy = copy_bandwidth() / 2
    print(f"a copy in memory: {copy:.1f} GB/s")
    print(as_json("input", rows, images=images, batch_size=batch_size, copy_gb_s=copy))


def _sweep(train: bool, options: Steps) -> None:
    cli.set_environment()
    from bench.sweep import COLUMNS, sweep

    print(as_json("train" if train else "infer", table(sweep(train, options), COLUMNS)))


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
    dtype: Dtype = "float32",
    warmup: int = 3,
    steps: int = 10,
    repeats: int = 5,
    figure: Path | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Measures training steps of ResNet-20 over 1, 2, ... devices: weak scaling and strong scaling.

    All cases alternate; prints medians as a table and as a JSON line. Efficiency is the images per second of each
    device over those of each of the fewest. Devices of a CPU are virtual and share its cores: at best images per second
    stay the same. A run of several processes is started like one of train.py, on CPUs with JAX_NUM_CPU_DEVICES set.

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
    from bench import sweep
    from gravlens_jax.files import check_folder
    from gravlens_jax.sharding import is_main, join_processes

    if figure is not None:
        check_folder(figure)
    join_processes(coordinator, num_processes, process_id)
    sweep.split_cpu(devices)
    cases = sweep.scaling_cases(devices, batch_per_device, batch_size, image_size, dtype)
    rows = sweep.scale(cases, warmup, steps, repeats)
    if is_main():
        table(rows, sweep.SCALING_COLUMNS)
        if figure is not None:
            sweep.draw_scaling(figure, rows)
            print(figure)
        print(as_json("scale", rows))


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
    check_least(1, epochs=epochs)
    if peer:
        check_installed(peer, "--peer", peer)
    os.environ |= cli.fast_environment()  # of the processes that it starts
    from bench.runs import COLUMNS, measure_accuracy, minutes_to

    with tempfile.TemporaryDirectory() as folder:
        rows = table(measure_accuracy(PRESETS[preset], epochs, peer is not None, Path(folder)), COLUMNS)
    minutes = {target: minutes_to(rows, target) for target in targets}
    for target, own in minutes.items():
        print(f"minutes to {target:.1%}: {', '.join(f'{code} {value:.1f}' for code, value in own.items()) or 'none'}")
    print(as_json("accuracy", rows, preset=preset, minutes_to=minutes))


def compile_ahead(
    topology: tuple[str, ...] = ("v5e:1x1", "v5e:2x2", "v5e:16x16"),
    batch_per_chip: int = 64,
    dtype: Dtype = "float32",
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
    check_least(1, batch_per_chip=batch_per_chip)
    check(len(topology) > 0, "topology is empty: expected one such as v5e:2x2")
    check_installed("libtpu", "compile", '"jax[tpu]"')
    import jax

    from bench.steps import TOPOLOGY_COLUMNS, compile_for_tpus

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_optimization_level", effort)
    rows = table(compile_for_tpus(topology, batch_per_chip, ModelConfig(dtype=dtype)), TOPOLOGY_COLUMNS)
    print(as_json("compile", rows, effort=effort, dtype=dtype))


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
    check_least(1, batch_sizes=batch_sizes)
    from bench import runs, sweep
    from gravlens_jax.files import check_folder

    check_folder(json_file)
    logits = runs.compare_logits()
    print(
        f"logits, here and on the CPU: largest difference {logits['difference']:.1e}, same class {logits['same']:.1%}"
    )
    options = Steps(batch_sizes, image_size=(42,), dtype=("float32", "bfloat16"), warmup=5, steps=20, repeats=1)
    rows = [row for train in (True, False) for row in table(sweep.sweep(train, options), sweep.COLUMNS)]
    rows += table(runs.render_batches(batch_sizes), runs.SIMULATION_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        epochs = table(runs.run_recipes(recipes, Path(folder)), runs.COLUMNS)
    json_file.write_text(as_json("gpu", rows + epochs, logits=logits, minutes_to=runs.minutes_to(epochs, 0.95)) + "\n")
    print(json_file)


if __name__ == "__main__":
    commands = train, infer, scale, measure_input, simulate, compile_ahead, accuracy, gpu
    names = "train", "infer", "scale", "input", "simulate", "compile", "accuracy", "gpu"
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(dict(zip(names, commands, strict=True))))
