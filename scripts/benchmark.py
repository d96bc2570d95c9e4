"""Measures the speed of this machine, with a subcommand for each benchmark.

Each prints a Markdown table, and adds a line of JSON for each row to a file.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench.costs import Device, Dtype, Steps
from bench.harness import check_least, report
from gravlens_jax import cli
from gravlens_jax.config import Config, ModelConfig
from gravlens_jax.errors import check, check_installed

JSON = Path("benchmark.jsonl")


def simulate(
    seconds: float = 4.0,
    repeats: int = 3,
    peers: tuple[Literal["lenstronomy", "herculens"], ...] = (),
    json_file: Path = JSON,
) -> None:
    """Measures images per second of `sphere` lenses with 25 subhalos, compared with other codes.

    The codes alternate; results are medians. Compilation is not counted. Batches have 32 lenses. Other codes get the
    same lenses, grid, sub-pixels and PSF, in float32 without noise; lenstronomy renders one lens at a time, on one
    core. `taskset -c 0 python scripts/benchmark.py simulate` (Linux) measures all on one core.

    Args:
        seconds: length of one measurement.
        repeats: measurements of each figure.
        peers: other codes to measure (pip install "gravlens_jax[peers]").
        json_file: where a line is added for each row.
    """
    check_least(1, repeats=repeats)
    check(seconds > 0, f"seconds={seconds}: expected a positive number")
    for peer in peers:
        check_installed(peer, f"--peers {peer}", '"gravlens_jax[peers]"')
    from bench.simulation import CODES, COLUMNS, simulation_rates

    codes = [code for code in CODES if code.split(",")[0] in ("gravlens_jax", *peers)]
    report("simulate", simulation_rates(seconds, repeats, codes), COLUMNS, json_file)


def train(options: Annotated[Steps, tyro.conf.arg(name="")], json_file: Path = JSON) -> None:
    """Measures training steps of ResNet-20: stored images on the device -> flips, forward, backward, update."""
    _sweep("train", options, json_file)


def infer(options: Annotated[Steps, tyro.conf.arg(name="")], json_file: Path = JSON) -> None:
    """Measures inference of ResNet-20: stored images on the device -> logits."""
    _sweep("infer", options, json_file)


def _sweep(command: str, options: Steps, json_file: Path) -> None:
    cli.set_environment()
    import jax

    from bench.sweep import COLUMNS, sweep

    if max(options.devices) > 1:
        jax.config.update("jax_num_cpu_devices", max(options.devices))
    report(command, sweep(command == "train", options), COLUMNS, json_file)


def compile_ahead(
    topology: tuple[str, ...] = ("v5e:1x1", "v5e:2x2", "v5e:16x16"),
    batch_per_chip: int = 64,
    dtype: Dtype = "float32",
    effort: Literal["O0", "O1", "O2", "O3"] = "O1",
    json_file: Path = JSON,
) -> None:
    """Compiles the training step, the step that simulates its batch, and inference, for TPUs; no TPU is needed.

    Reports compile time, and FLOPs, temporary memory and collectives of each chip.

    Args:
        topology: chips, such as v5e:2x2, v5p:2x2x1 or v6e:16x16 (pip install "jax[tpu]").
        batch_per_chip: images a step on each chip.
        dtype: of activations.
        effort: of the compiler; more than O1 takes minutes.
        json_file: where a line is added for each row.
    """
    check_least(1, batch_per_chip=batch_per_chip)
    check(len(topology) > 0, "topology is empty: expected one such as v5e:2x2")
    check_installed("libtpu", "compile", '"jax[tpu]"')
    import jax

    from bench.steps import TOPOLOGY_COLUMNS, compile_run, topology_mesh

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_optimization_level", effort)
    settings = {"effort": effort, "dtype": dtype}
    meshes = {name: topology_mesh(name) for name in topology}
    rows = (
        {"topology": name, "chips": mesh.size} | row | settings
        for name, mesh in meshes.items()
        for row in compile_run(
            Config(batch_size=batch_per_chip * mesh.size, model=ModelConfig(dtype=dtype)), mesh, "tpu"
        )
    )
    report("compile", rows, TOPOLOGY_COLUMNS, json_file)


def device(options: Annotated[Device, tyro.conf.arg(name="")], json_file: Path = JSON) -> None:
    """Measures a GPU, a TPU or a CPU: steps, inference, one image, simulation, and whole runs; checks its logits.

    The most important figures come first; a table and a JSON file hold what was measured before the budget of time is
    used up, Ctrl-C, or in spite of an error.
    """
    cli.set_environment()
    from bench.device import COLUMNS, measure_device, time_limit

    with time_limit(options.budget_minutes):
        report("device", measure_device(options), COLUMNS, json_file)


if __name__ == "__main__":
    commands: dict = {"device": device, "train": train, "infer": infer, "simulate": simulate, "compile": compile_ahead}
    cli.run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
