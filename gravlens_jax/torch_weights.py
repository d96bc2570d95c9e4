"""Weights of the same network trained in PyTorch (GravLensNet's names): a state dict -> Flax variables."""

from pathlib import Path
from typing import Any

import numpy as np

from gravlens_jax.archive import members, open_archive, read_members
from gravlens_jax.config import InputError, check


def load_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict, parameter name -> array, from .npz, or from .pth (needs torch). Nothing is unpickled freely.

    Raises:
      InputError: no such file, unreadable, or a .pth without torch.
    """
    path, expected = Path(path), "a PyTorch state dict as .npz or .pth"
    check(path.is_file(), f"{path}: no such file; expected {expected}")
    if path.suffix == ".npz":
        with open_archive(path, expected) as archive:
            return read_members(archive, members(archive), "uif")
    try:
        import torch

        version = tuple(map(int, torch.__version__.split(".")[:2]))
        check(version >= (2, 10), f"{path}: torch {torch.__version__} may run code from a .pth; update torch to 2.10")
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.numpy() for name, value in state_dict.items()}
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: reading .pth needs torch; install it, or save the arrays as .npz") from error
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise InputError(f"{path}: not a readable state dict ({' '.join(str(error).split())[:200]})") from error


def to_variables(state_dict: dict[str, np.ndarray], depth: int, order: list[int]) -> dict[str, Any]:
    """Returns the Flax variables of a `ResNet` without projections.

    Args:
      state_dict: names as in GravLensNet: conv0, bn0, block<stage>.<block>.features.{conv,bn}_{1,2}, linear.
      depth: 6n + 2.
      order: for each class of ours, its position in the state dict's head.

    Returns:
      {"params", "batch_stats"}, float32.

    Raises:
      InputError: arrays are missing or left over: another depth.
    """
    left = {name: v for name, v in state_dict.items() if not name.endswith("num_batches_tracked")}

    def take(name: str) -> np.ndarray:
        check(name in left, f"the state dict has no {name!r}: its network is not of depth {depth}; try another --depth")
        return np.asarray(left.pop(name), np.float32)

    params, batch_stats = {}, {}

    def convolution(ours: str, theirs: str) -> None:
        params[ours] = {"kernel": take(f"{theirs}.weight").transpose(2, 3, 1, 0)}

    def norm(ours: str, theirs: str) -> None:
        params[ours] = {"scale": take(f"{theirs}.weight"), "bias": take(f"{theirs}.bias")}
        batch_stats[ours] = {"mean": take(f"{theirs}.running_mean"), "var": take(f"{theirs}.running_var")}

    convolution("conv0", "conv0")
    norm("norm0", "bn0")
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            for i in (1, 2):
                theirs = f"block{stage}.{block}.features"
                convolution(f"stage{stage}_block{block + 1}_conv{i}", f"{theirs}.conv_{i}")
                norm(f"stage{stage}_block{block + 1}_norm{i}", f"{theirs}.bn_{i}")
    weight, bias = take("linear.weight"), take("linear.bias")
    check(len(bias) == len(order), f"the head has {len(bias)} classes, --classes names {len(order)}")
    params["head"] = {"kernel": weight[order].T, "bias": bias[order]}
    check(not left, f"{next(iter(left), '')!r} is left over: the network is not of depth {depth}; try another --depth")
    return {"params": params, "batch_stats": batch_stats}
