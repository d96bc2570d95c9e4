"""Converts PyTorch weights of GravLensNet to a run directory."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import PRESETS, Config, ModelConfig
from gravlens_jax.errors import InputError, check, check_installed
from gravlens_jax.npz import load_arrays


def load_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a PyTorch state dict, parameter name -> array, from .npz or .pth (needs torch), without free unpickling."""
    expected = "a PyTorch state dict as .npz or .pth"
    check(path.is_file(), f"{path}: no such file; expected {expected}")
    if path.suffix == ".npz":
        return load_arrays(path, expected, "uif")
    check_installed("torch", f"{path}: a .pth (unlike an .npz of the same arrays)", "torch")
    import torch

    version = tuple(map(int, torch.__version__.split(".")[:2]))
    check(version >= (2, 10), f"{path}: torch {torch.__version__} may run code from a .pth; update torch to 2.10")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.numpy() for name, value in state_dict.items()}
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise InputError(f"{path}: not a readable state dict ({' '.join(str(error).split())[:200]})") from error


def to_variables(state_dict: dict[str, np.ndarray], depth: int, order: list[int]) -> dict[str, Any]:
    """Returns the Flax variables, float32, of a `ResNet`; InputError if its depth is another one.

    Args:
      state_dict: names as in GravLensNet: conv0, bn0, block<stage>.<block>.features.{conv,bn}_{1,2}, linear.
      depth: 6n + 2.
      order: for each class of ours, its position in the state dict's head.
    """
    left = {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}

    def take(name: str, axes: int = 1) -> np.ndarray:
        check(name in left, f"the state dict has no {name!r}: its network is not of depth {depth}; try another --depth")
        array = np.asarray(left.pop(name), np.float32)
        check(array.ndim == axes, f"{name} has shape {array.shape}, expected {axes} axes")
        return array

    layers = {"conv0": "conv0", "norm0": "bn0"}
    for stage, block, i in product((1, 2, 3), range((depth - 2) // 6), (1, 2)):
        flax, torch = f"stage{stage}_block{block + 1}", f"block{stage}.{block}.features"
        layers |= {f"{flax}_conv{i}": f"{torch}.conv_{i}", f"{flax}_norm{i}": f"{torch}.bn_{i}"}
    params, batch_stats = {}, {}
    for flax, torch in layers.items():
        if "conv" in flax:
            params[flax] = {"kernel": take(f"{torch}.weight", 4).transpose(2, 3, 1, 0)}
        else:
            params[flax] = {"scale": take(f"{torch}.weight"), "bias": take(f"{torch}.bias")}
            batch_stats[flax] = {"mean": take(f"{torch}.running_mean"), "var": take(f"{torch}.running_var")}
    weight, bias = take("linear.weight", 2), take("linear.bias")
    check(len(weight) == len(bias), f"linear.weight has {len(weight)} rows, linear.bias {len(bias)}; expected as many")
    check(len(bias) == len(order), f"the head has {len(bias)} classes, --classes names {len(order)}")
    params["head"] = {"kernel": weight[order].T, "bias": bias[order]}
    check(not left, f"{next(iter(left), '')!r} is left over: the network is not of depth {depth}; try another --depth")
    return {"params": params, "batch_stats": batch_stats}


def main(
    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")],
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    depth: int = 32,
    classes: str = "no,vort,sphere",
) -> None:
    """Converts a PyTorch state dict of GravLensNet to a run that evaluate.py and predict.py accept.

    example:
      python scripts/import_torch.py resnet.pth runs/gravlensnet

    Args:
        weights: state dict, .npz (parameter name -> array) or .pth (needs torch).
        run: directory to create.
        depth: 6n + 2 layers; GravLensNet's published run has 32, its first one 20.
        classes: names of its outputs, in their order; the run has them in alphabetical order.
    """
    from jax.tree_util import keystr, tree_leaves, tree_leaves_with_path

    from gravlens_jax.checkpoint import save_variables
    from gravlens_jax.model import make_model, variable_shapes
    from gravlens_jax.run_files import RunInfo, create_run

    names = tuple(cli.parse_classes(classes))
    ordered = tuple(sorted(names))
    published = PRESETS["published"].input
    config = Config(run_dir=str(run), input=published, model=ModelConfig(depth=depth, activation="relu"))
    variables = to_variables(load_state_dict(weights), depth, [names.index(name) for name in ordered])
    model = make_model(config.model, published, ordered)
    for (path, array), expected in zip(
        tree_leaves_with_path(variables), tree_leaves(variable_shapes(model)), strict=True
    ):
        wrong = f"{weights}: {keystr(path)} would have shape {array.shape}, expected {expected.shape}"
        check(array.shape == expected.shape, f"{wrong} of GravLensNet with depth {depth}")
    create_run(run, RunInfo(config, ordered, (published.crop, published.crop)))
    save_variables(run, variables)
    print(f"{run}: depth {depth}, classes {', '.join(ordered)}")


if __name__ == "__main__":
    cli.run_function(main)
