"""A trained network in one .npz that NumPy alone reads; among them the one that comes with the package."""

import dataclasses
import importlib.metadata
import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gravlens_jax.checkpoint import Which, load_run, read_history, read_run
from gravlens_jax.config import InputConfig, InputError, ModelConfig, check, from_dict
from gravlens_jax.model import ResNet, make_model

PRETRAINED = Path(__file__).with_name("pretrained.npz")


class Network(NamedTuple):
    """A trained network, ready for `predict`."""

    model: ResNet
    variables: Any
    image_shape: tuple[int, int]  # height and width of the images it was trained on


def load_network(source: str | Path, checkpoint: Which = "best") -> Network:
    """Returns a network from wherever it is.

    Args:
      source: the directory of a run; an .npz written by scripts/export.py; or "pretrained", the package's own.
      checkpoint: of a run, "best" or "final".

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = Path(source)
    if str(source) == "pretrained" and not path.exists():
        path = PRETRAINED
    if path.suffix == ".npz":
        return _read(path)
    return Network(*load_run(path, checkpoint), read_run(path).image_shape)


def load_pretrained() -> tuple[ResNet, Any]:
    """Returns the network that comes with the package, trained on simulated images alone, and its variables."""
    return load_network(PRETRAINED)[:2]


def export_run(run_dir: Path, out: Path, checkpoint: Which = "best") -> dict[str, Any]:
    """Writes the network of a run to an .npz of float32 arrays; returns what the file says of itself.

    Args:
      run_dir: the run.
      out: the file, replaced if it exists.
      checkpoint: "best" or "final".
    """
    check(out.suffix == ".npz", f"{out}: expected a name that ends in .npz")
    info, (_, variables) = read_run(run_dir), load_run(run_dir, checkpoint)
    config = info.config
    about = {
        "model": dataclasses.asdict(config.model),
        "input": dataclasses.asdict(config.input),
        "classes": info.classes,
        "image_shape": info.image_shape,
        "version": importlib.metadata.version("gravlens_jax"),
        "config": dataclasses.asdict(config),
        "history": read_history(run_dir / "metrics.jsonl"),
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in flatten_dict(variables, sep="/").items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp.npz")
    np.savez(temporary, about=np.array(json.dumps(about)), **arrays)
    os.replace(temporary, out)
    return about


def _read(path: Path) -> Network:
    check(path.is_file(), f"{path}: no such file; expected one written by scripts/export.py")
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        classes, shape = tuple(about["classes"]), tuple(about["image_shape"])
        configs = from_dict(ModelConfig, about["model"], "model"), from_dict(InputConfig, about["input"], "input")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a network ({error}); expected a file written by scripts/export.py") from error
    model = make_model(*configs, classes)
    size = model.input.crop // model.input.pool
    expected = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 1))), sep="/")
    shapes = ({name: array.shape for name, array in some.items()} for some in (arrays, expected))
    check(len({json.dumps(s, sort_keys=True) for s in shapes}) == 1, f"{path}: its arrays are not those of its model")
    return Network(model, unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/"), shape)
