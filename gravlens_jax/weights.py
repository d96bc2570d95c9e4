"""A trained network in one .npz that NumPy alone reads; among them the one that comes with the package."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gravlens_jax.archive import members, open_archive, read_members
from gravlens_jax.checkpoint import Which, load_run, read_history, read_run
from gravlens_jax.config import InputConfig, ModelConfig, check, from_dict, parse_json
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


class _About(NamedTuple):
    """What an exported network says of itself, as far as it is needed to run it."""

    model: ModelConfig
    input: InputConfig
    classes: tuple[str, ...]
    image_shape: tuple[int, int]


def _read(path: Path) -> Network:
    with open_archive(path, "a network written by scripts/export.py") as archive:
        infos = members(archive)
        check("about" in infos, f"{path}: has no 'about'; expected a network written by scripts/export.py")
        text = read_members(archive, {"about": infos.pop("about")}, "U")["about"].item()
        arrays = read_members(archive, infos, "f")
    values = parse_json(text, f"{path}: about")
    check(isinstance(values, dict), f"{path}: about is not an object of JSON")
    known = {name: values[name] for name in values.keys() & set(_About._fields)}
    about = from_dict(_About, known, f"{path}: about")
    model = make_model(about.model, about.input, about.classes)
    size = model.input.crop // model.input.pool
    image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    expected = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    shapes, expected_shapes = ({name: array.shape for name, array in some.items()} for some in (arrays, expected))
    check(shapes == expected_shapes, f"{path}: its arrays are not those of its model")
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return Network(model, unflatten_dict(arrays, sep="/"), about.image_shape)
