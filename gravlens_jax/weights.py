"""A trained network in one .npz that NumPy alone reads; among them the one that comes with the package."""

import dataclasses
import importlib.metadata
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gravlens_jax import export
from gravlens_jax.archive import members, open_archive, read_members
from gravlens_jax.checkpoint import Which, load_calibrated
from gravlens_jax.config import InputConfig, InputError, ModelConfig, check, check_installed, from_dict, parse_json
from gravlens_jax.files import check_folder, write_atomically, writing
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.run import read_history, read_run

EXPECTED = "a network written by scripts/export.py"
FORMATS = {".npz": None, ".safetensors": "safetensors", ".stablehlo": "flatbuffers"}  # the package that each needs
PRETRAINED = Path(__file__).with_name("pretrained.npz")


class Network(NamedTuple):
    """A trained network, ready for `predict`."""

    model: ResNet
    variables: Any
    image_shape: tuple[int, int]  # height and width of the images it was trained on
    temperature: float = 1.0  # that calibration has divided the head by, once and for all


def load_network(source: str | Path, checkpoint: Which = "best") -> Network:
    """Returns a network from wherever it is.

    Args:
      source: the directory of a run; an .npz written by scripts/export.py; or "pretrained", the package's own.
      checkpoint: of a run, "best" or "final".

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = _resolve(source)
    if path.suffix == ".npz":
        return _read(path)
    model, variables, temperature = load_calibrated(path, checkpoint)
    return Network(model, variables, read_run(path).image_shape, temperature)


def load_history(source: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, with `image_steps` added, of a run or of the run that a file came from.

    Args:
      source: as in `load_network`.

    Raises:
      InputError: there is none, or the file does not say.
    """
    path = _resolve(source)
    if path.suffix == ".npz":
        with open_archive(path, EXPECTED) as archive:
            about = _read_about(path, archive)
    else:
        about = {"config": dataclasses.asdict(read_run(path).config), "history": read_history(path / "metrics.jsonl")}
    try:
        size = about["config"]["batch_size"]
        history = [line | {"image_steps": line["step"] * size} for line in about["history"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: does not say how it was trained ({error!r})") from error
    check(bool(history), f"{path}: has no epoch of training yet")
    return history


def load_pretrained() -> tuple[ResNet, Any]:
    """Returns the network that comes with the package, trained on simulated images alone, and its variables."""
    return load_network(PRETRAINED)[:2]


def export_run(run: str | Path, out: Path, checkpoint: Which = "best") -> dict[str, Any]:
    """Writes the network of a run as `write_network` does; returns what the file says of itself.

    Args:
      run: the run, or another source of `load_network`.
      out: the file, replaced if it exists.
      checkpoint: "best" or "final".
    """
    network = load_network(run, checkpoint)
    about = describe(network)
    if (Path(run) / "config.json").exists():
        config, history = read_run(Path(run)).config, read_history(Path(run) / "metrics.jsonl")
        about |= {"config": dataclasses.asdict(config), "history": history}
    write_network(out, network, about)
    return about


def describe(network: Network) -> dict[str, Any]:
    """Returns what a file must say of its network, ready for JSON."""
    model, _, image_shape, temperature = network
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)}
    return {
        "model": fields | {"dtype": jnp.dtype(model.dtype).name},
        "input": dataclasses.asdict(model.input),
        "classes": model.classes,
        "image_shape": image_shape,
        "temperature": temperature,
        "version": importlib.metadata.version("gravlens_jax"),
    }


def check_output(out: Path) -> None:
    """Raises InputError unless `write_network` knows the suffix, and finds the package for it and the folder."""
    check(out.suffix in FORMATS, f"{out}: expected a name that ends in {', '.join(FORMATS)}")
    package = FORMATS[out.suffix]
    if package:
        check_installed(package, out.suffix, '"gravlens_jax[export]"')
    check_folder(out)


def write_network(out: Path, network: Network, about: dict[str, Any]) -> None:
    """Writes a network to one file, in the format that its suffix names; a file that is there is replaced at the end.

    Args:
      out: .npz, which `load_network` reads, .safetensors or .stablehlo: see `export`.
      network: the network.
      about: `describe(network)`, and more if you like; not part of a .stablehlo.

    Raises:
      InputError: another suffix, a package that the format needs is missing, or the file cannot be written.
    """
    check_output(out)
    model, variables, image_shape, _ = network
    formats = {
        ".npz": lambda: export.as_npz(variables, about),
        ".safetensors": lambda: export.as_safetensors(variables, about),
        ".stablehlo": lambda: export.as_stablehlo(model, variables, image_shape),
    }
    data = formats[out.suffix]()
    with writing(out):
        write_atomically(out, data)


class _About(NamedTuple):
    """What an exported network says of itself, as far as it is needed to run it."""

    model: ModelConfig
    input: InputConfig
    classes: tuple[str, ...]
    image_shape: tuple[int, int]
    temperature: float


def _resolve(source: str | Path) -> Path:
    path = Path(source)
    return PRETRAINED if str(source) == "pretrained" and not path.exists() else path


def _read_about(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    infos = members(archive)
    check("about" in infos, f"{path}: has no 'about'; expected {EXPECTED}")
    text = read_members(archive, {"about": infos["about"]}, "U")["about"].item()
    values = parse_json(text, f"{path}: about")
    check(isinstance(values, dict), f"{path}: about is not an object of JSON")
    return values


def _read(path: Path) -> Network:
    with open_archive(path, EXPECTED) as archive:
        values = {"temperature": 1.0} | _read_about(path, archive)
        infos = members(archive)
        arrays = read_members(archive, {name: info for name, info in infos.items() if name != "about"}, "f")
    known = {name: values[name] for name in values.keys() & set(_About._fields)}
    about = from_dict(_About, known, f"{path}: about")
    model = make_model(about.model, about.input, about.classes)
    size = model.input.crop // model.input.pool
    image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    expected = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    shapes, expected_shapes = ({name: array.shape for name, array in some.items()} for some in (arrays, expected))
    check(shapes == expected_shapes, f"{path}: its arrays are not those of its model")
    variables = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return Network(model, unflatten_dict(variables, sep="/"), about.image_shape, about.temperature)
