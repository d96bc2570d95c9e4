"""Trains a network and reports on it; without arguments it simulates its own images first."""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.config import PRESETS, Config
from gravlens_jax.errors import check_installed
from gravlens_jax.files import catch_write_errors

# field of metrics.jsonl -> tag of TensorBoard
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}


@dataclass(frozen=True)
class Arguments:
    """Trains a network and reports on it; without arguments it simulates its own images first.

    examples:
      python scripts/train.py
      python scripts/train.py --data packed --run-dir runs/public --epochs 10
      python scripts/train.py --run-dir runs/public --resume
      python scripts/train.py --run-dir runs/public --resume --data moved
      python scripts/train.py --run-dir runs/flat --resume --epochs 40  # more, if it began with --optim.decay constant
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Literal["default", "best", "smoke", "published"] = "default"  # that all other options start from
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # continue the run in --run-dir from its last save
    save_minutes: float = 10.0  # time between saves within an epoch; 0 for none; the end of an epoch is always saved
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # write event files to RUN/tensorboard too
    coordinator: str | None = None  # for several processes: HOST:PORT of process 0, or auto (JAX detects the cluster)
    num_processes: int | None = None  # of the run
    process_id: int | None = None  # of this process: 0, 1, ...
    compile_cache: bool = True  # cache compiled programs (not those with oneDNN) in ~/.cache/gravlens_jax


def parse_arguments(arguments: list[str]) -> Arguments:
    """Reads the command line; options that are not given come from the preset, or from the run that is resumed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="default")
    first.add_argument("--run-dir", "--run_dir")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    config = PRESETS[known.preset]
    if known.resume:
        from gravlens_jax.run_files import read_run

        run_dir = known.run_dir or config.run_dir
        config = replace(read_run(Path(run_dir)).config, run_dir=run_dir)
    return tyro.cli(Arguments, default=Arguments(config, known.preset), args=arguments)


def write_epoch(run_dir: Path, line: dict[str, Any]) -> None:
    """Writes a line of metrics.jsonl for TensorBoard; it replaces what was written of this step and later ones."""
    scalars = {tag: line[name] for name, tag in TAGS.items()}
    write_scalars(run_dir, line["step"], scalars, purge_step=line["step"], filename_suffix=f".{line['step']:010}.epoch")


def write_report(run_dir: Path, step: int, values: dict[str, Any]) -> None:
    """Writes the metrics of the report, as `evaluate_network` returns them, for TensorBoard."""
    values = values | {f"auc/{name}": value for name, value in values["auc"].items()}
    scalars = {f"test/{name}": value for name, value in values.items() if isinstance(value, float)}
    write_scalars(run_dir, step, scalars, filename_suffix=f".{step:010}.report")


def write_scalars(run_dir: Path, step: int, scalars: dict[str, float], **options: Any) -> None:
    """Writes an event file to RUN/tensorboard; `options` are those of `SummaryWriter`."""
    from tensorboardX import SummaryWriter

    folder = run_dir / "tensorboard"
    with catch_write_errors(folder), SummaryWriter(str(folder), **options) as writer:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)


def main() -> None:
    """Runs the command line."""
    arguments = parse_arguments(sys.argv[1:])
    cli.set_environment()
    from gravlens_jax.report import table
    from gravlens_jax.run_files import read_history
    from gravlens_jax.sharding import is_main, join_processes
    from gravlens_jax.training import fit

    if arguments.tensorboard:
        check_installed("tensorboardX", "--tensorboard", '"gravlens_jax[tensorboard]"')
    join_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.compile_cache:
        cli.use_compile_cache()
    run_dir = Path(arguments.config.run_dir)
    on_epoch = {"on_epoch": partial(write_epoch, run_dir)} if arguments.tensorboard else {}
    values = fit(arguments.config, arguments.resume, arguments.save_minutes, **on_epoch)
    if arguments.tensorboard and is_main():
        write_report(run_dir, read_history(run_dir)[-1]["step"], values)
    if is_main():
        print(f"test split: {table(values, run_dir / 'report')}\nrun: {run_dir}")


if __name__ == "__main__":
    cli.run(main)
