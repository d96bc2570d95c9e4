"""Trains a network and reports on it; without arguments it simulates its own images first."""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli, tensorboard
from gravlens_jax.config import PRESETS, Config, check_installed
from gravlens_jax.evaluate import table
from gravlens_jax.fit import fit
from gravlens_jax.mesh import is_main, join_processes
from gravlens_jax.run import read_history, read_run


@dataclass(frozen=True)
class Arguments:
    """Trains a network and reports on it; without arguments it simulates its own images first.

    examples:
      python scripts/train.py
      python scripts/train.py --data packed --run-dir runs/real --epochs 20
      python scripts/train.py --run-dir runs/real --resume
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Literal["default", "best", "smoke", "published"] = "default"  # what every other option starts from
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on with --run-dir where it was last saved
    save_minutes: float = 10.0  # time between saves within an epoch; 0 for none; an epoch's end is always saved
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # write RUN/tensorboard too
    coordinator: str | None = None  # HOST:PORT of process 0 of a run of several, or auto for what JAX finds out itself
    num_processes: int | None = None  # of that run
    process_id: int | None = None  # of this process: 0, 1, ...
    compile_cache: bool = True  # keep compiled programs in ~/.cache/gravlens_jax, so that the next run starts at once


def parse_arguments(arguments: list[str]) -> Arguments:
    """Reads the command line; what it leaves out comes from the preset, or from the run that is resumed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="default")
    first.add_argument("--run-dir", "--run_dir")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(arguments)
    config = PRESETS[known.preset]
    if known.resume:
        run_dir = known.run_dir or config.run_dir
        config = replace(read_run(Path(run_dir)).config, run_dir=run_dir)
    return tyro.cli(Arguments, default=Arguments(config, known.preset), args=arguments)


def main() -> None:
    """Runs the command line."""
    arguments = parse_arguments(sys.argv[1:])
    cli.use_huge_pages()
    if arguments.tensorboard:
        check_installed("tensorboardX", "--tensorboard", '"gravlens_jax[tensorboard]"')
    join_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.compile_cache:
        cli.use_compile_cache()
    run_dir = Path(arguments.config.run_dir)
    on_epoch = {"on_epoch": partial(tensorboard.write_epoch, run_dir)} if arguments.tensorboard else {}
    values = fit(arguments.config, arguments.resume, arguments.save_minutes, **on_epoch)
    if arguments.tensorboard and is_main():
        tensorboard.write_report(run_dir, read_history(run_dir / "metrics.jsonl")[-1]["step"], values)
    if is_main():
        print(f"test split: {table(values, run_dir / 'report')}\nrun: {run_dir}")


if __name__ == "__main__":
    cli.run(main)
