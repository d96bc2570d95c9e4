"""Trained networks: load them from a run, a file or the package, and write them to files."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gravlens_jax.checkpoint import Which, load_variables
from gravlens_jax.config import InputConfig, ModelConfig, from_dict
from gravlens_jax.errors import check, check_installed, parse_json
from gravlens_jax.inference import export_program, outputs
from gravlens_jax.metrics import fit_population, fit_temperature
from gravlens_jax.model import ResNet, make_model, variable_shapes
from gravlens_jax.npz import Dataset, load_arrays
from gravlens_jax.run_dir import (
    check_folder,
    read_config,
    read_history,
    read_temperature,
    write_arrays,
    write_atomically,
    writing,
)

EXPECTED = "a network written by scripts/export.py"
FORMATS = {".npz": None, ".safetensors": "safetensors", ".stablehlo": "flatbuffers"}  # suffix -> required package
PRETRAINED = Path(__file__).with_name("pretrained.npz")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A trained network; iterating yields its model and variables: `model, variables = load_pretrained()`."""

    model: ResNet
    variables: Any  # {"params", "batch_stats"}, calibrated, and perhaps "population": see `metrics.fit_population`
    image_shape: tuple[int, int]  # height and width of the training images
    temperature: float = 1.0  # by which the head has already been divided

    def __iter__(self) -> Iterator[Any]:
        yield from (self.model, self.variables)


class _About(NamedTuple):  # the part of `describe` that loading needs
    model: ModelConfig
    input: InputConfig
    classes: tuple[str, ...]
    image_shape: tuple[int, int]
    temperature: float


def load_network(source: str | Path, checkpoint: Which = "best") -> Network:
    """Returns a trained network, ready for `predict`; the probabilities of a finished run are calibrated.

    Args:
      source: the directory of a run, an .npz written by scripts/export.py, or "pretrained" for the package's network.
      checkpoint: of a run: "best" (lowest validation loss) or "final" (last epoch).

    Raises:
      InputError: not a run or a network, no checkpoint yet, damaged, or parameters that are not finite.
    """
    path = resolve(source)
    if path.suffix == ".npz":
        network = _load_file(path)
    else:
        values = read_config(path)
        about = _read_about(values["config"] | values | {"temperature": 1.0}, f"{path}/config.json")
        model = make_model(about.model, about.input, about.classes)
        variables, step = load_variables(path, model, checkpoint)
        temperature = read_temperature(path, step)
        variables = calibrated(variables, temperature, _read_population(path, step, model))
        network = Network(model, variables, about.image_shape, temperature)
    _check_finite(network, path, "used")
    return network


def load_run(run_dir: str | Path, checkpoint: Which = "best") -> Network:
    """Returns the network of a run: see `load_network`."""
    return load_network(run_dir, checkpoint)


def load_pretrained() -> Network:
    """Returns the network that comes with the package, trained on simulated images alone."""
    return load_network(PRETRAINED)


def calibrate(model: ResNet, variables: Any, dataset: Dataset) -> tuple[float, dict[str, np.ndarray] | None]:
    """Returns the temperature and the population, fitted to images that the network was not trained on."""
    logits, means = outputs(model, variables, dataset.images)
    return fit_temperature(logits, dataset.labels), fit_population(means, dataset.labels, len(model.classes))


def calibrated(variables: Any, temperature: float, population: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Returns the variables with the head, and so the logits, divided by `temperature`, and with the population."""
    head = jax.tree.map(lambda x: x / temperature, variables["params"]["head"])
    added = {} if population is None else {"population": population}
    return {**variables, "params": {**variables["params"], "head": head}, **added}


def export_run(run: str | Path, out: Path, checkpoint: Which = "best") -> dict[str, Any]:
    """Writes a network from any source of `load_network` to a file; returns the description stored in it."""
    network = load_network(run, checkpoint)
    about = describe(network)
    if (Path(run) / "config.json").exists():
        about |= {"config": read_config(Path(run))["config"], "history": read_history(Path(run))}
    write_network(out, network, about)
    return about


def describe(network: Network) -> dict[str, Any]:
    """Returns the description of a network that `load_network` needs, ready for JSON."""
    model, dtype = network.model, jnp.dtype(network.model.dtype).name
    return {
        "model": {"depth": model.depth, "width": model.width, "projection": model.projection, "dtype": dtype},
        "input": dataclasses.asdict(model.input.resolve()),
        "classes": model.classes,
        "image_shape": network.image_shape,
        "temperature": network.temperature,
        "version": importlib.metadata.version("gravlens_jax"),
    }


def check_output(out: Path) -> None:
    """Raises InputError unless `write_network` can write a file of this name: suffix, required package, folder."""
    check(out.suffix in FORMATS, f"{out}: expected a name that ends in {', '.join(FORMATS)}")
    if package := FORMATS[out.suffix]:
        check_installed(package, out.suffix, '"gravlens_jax[export]"')
    check_folder(out)


def write_network(out: Path, network: Network, about: dict[str, Any]) -> None:
    """Writes a network to one file, atomically, in the format of its suffix; InputError if parameters are not finite.

    .npz: float32 arrays under names such as params/head/bias, and `about` as JSON text.
    .safetensors: the same arrays, with `about` in the metadata.
    .stablehlo: the whole prediction; see `inference.export_program`.

    An existing file is replaced. `about` is `describe(network)`, and more if you like; not part of a .stablehlo.
    """
    check_output(out)
    _check_finite(network, out, "exported")
    named = flatten_dict(network.variables, sep="/")
    arrays: dict[str, Any] = {name: np.array(x, np.float32, order="C") for name, x in named.items()}
    if out.suffix == ".stablehlo":
        data = export_program(network.model, network.variables, network.image_shape)
    elif out.suffix == ".safetensors":
        from safetensors.numpy import save

        data = save(arrays, {"about": json.dumps(about)})
    with writing(out):
        if out.suffix == ".npz":
            write_arrays(out, {"about": np.array(json.dumps(about)), **arrays})
        else:
            write_atomically(out, data)


def resolve(source: str | Path) -> Path:
    """Returns the path of a `load_network` source."""
    path = Path(source)
    return PRETRAINED if str(source) == "pretrained" and not path.exists() else path


def _check_finite(network: Network, where: Path, use: str) -> None:
    finite = all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(network.variables))  # not by XLA: drops NaN
    reason = f"the network has parameters that are not finite, it cannot be {use}"
    check(finite, f"{where}: {reason}; train again with a lower learning rate")


def _read_population(run_dir: Path, step: int, model: ResNet) -> dict[str, np.ndarray] | None:
    path = run_dir / "population.npz"
    arrays = load_arrays(path, "arrays", "f") if path.exists() else {}
    own = {name: arrays[f"{step}/{name}"] for name in ("whitening", "centres") if f"{step}/{name}" in arrays}
    right = {name: x.shape for name, x in own.items()} == _population_shapes(model)
    check(right or not own, f"{path}: its arrays do not fit the network; remove it")
    return own or None


def _population_shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    channels = 8 * model.width
    return {"whitening": (channels, channels), "centres": (len(model.classes), channels)}


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description and the arrays of an exported network."""
    arrays = load_arrays(path, EXPECTED, "fU")
    text = arrays.pop("about", np.zeros(0))
    check(text.dtype.kind == "U" and text.ndim == 0, f"{path}: has no text 'about'; expected {EXPECTED}")
    about = parse_json(text.item(), f"{path}: about")
    check(isinstance(about, dict), f"{path}: about is not a JSON object")
    return {"temperature": 1.0} | about, arrays


def _read_about(values: dict[str, Any], where: str) -> _About:
    return from_dict(_About, {name: values[name] for name in _About._fields if name in values}, where)


def _load_file(path: Path) -> Network:
    values, arrays = read_file(path)
    about = _read_about(values, f"{path}: about")
    model = make_model(about.model, about.input, about.classes)
    shapes = {name: array.shape for name, array in arrays.items() if array.dtype.kind == "f"}
    expected = {name: x.shape for name, x in flatten_dict(variable_shapes(model), sep="/").items()}
    if "population/whitening" in arrays:  # files of older versions have none
        expected |= {f"population/{name}": shape for name, shape in _population_shapes(model).items()}
    check(shapes == expected and len(arrays) == len(shapes), f"{path}: its arrays do not fit its model")
    with np.errstate(over="ignore"):  # of float64; `load_network` finds the infinity
        variables = {name: jnp.asarray(array.astype(np.float32)) for name, array in arrays.items()}
    return Network(model, unflatten_dict(variables, sep="/"), about.image_shape, about.temperature)
