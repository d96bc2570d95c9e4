"""Turns PyTorch weights of the published network into a run directory."""

from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.checkpoint import save_variables
from gravlens_jax.config import PRESETS, Config, ModelConfig
from gravlens_jax.run import RunInfo, check_unused, create_run
from gravlens_jax.torch_weights import load_state_dict, to_variables


def main(
    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")],
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    depth: int = 32,
    classes: str = "no,vort,sphere",
) -> None:
    """Turns a PyTorch state dict of GravLensNet into a run that evaluate.py and predict.py accept.

    example:
      python scripts/import_torch.py resnet.pth runs/gravlensnet

    Args:
        weights: state dict, .npz (parameter name -> array) or .pth (needs torch).
        run: directory to make.
        depth: 6n + 2 layers; GravLensNet's published run has 32, its first one 20.
        classes: names of its outputs, in their order; the run has them in alphabetical order.
    """
    check_unused(run)
    names = cli.split_names(classes)
    ordered = tuple(sorted(names))
    published = PRESETS["published"].input
    config = Config(run_dir=str(run), input=published, model=ModelConfig(depth=depth))
    variables = to_variables(load_state_dict(weights), depth, [names.index(name) for name in ordered])
    create_run(run, RunInfo(config, ordered, (published.crop, published.crop)))
    save_variables(run, variables)
    print(f"{run}: depth {depth}, classes {', '.join(ordered)}")


if __name__ == "__main__":
    cli.run_function(main)
