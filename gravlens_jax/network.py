"""Trained networks: load them from a run, a file or the package, calibrate them, and write them to files."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gravlens_jax import __version__, files, metrics, run_files
from gravlens_jax.checkpoint import load_variables
from gravlens_jax.config import Checkpoint, InputConfig, ModelConfig, from_dict
from gravlens_jax.datasets import map_renderer
from gravlens_jax.errors import check, parse_json
from gravlens_jax.inference import fit_deflection, outputs
from gravlens_jax.model import ResNet, make_model, variable_shapes
from gravlens_jax.npz import Dataset, load_arrays

EXPECTED = "a network written by scripts/export.py or scripts/finetune.py"
PRETRAINED = Path(__file__).with_name("pretrained.npz")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A trained network; iterating yields its model and variables: `model, variables = load_pretrained()`."""

    model: ResNet
    variables: Any  # {"params", "batch_stats"}, calibrated, and perhaps "population" and "deflection": see `calibrate`
    image_shape: tuple[int, int]  # height and width of the training images
    temperature: float = 1.0  # already applied to the head

    @property
    def cell_width(self) -> float:
        """Width of the cells of deflection maps, arcsec; pixels if their scale is not known."""
        return self.model.input.cell * (self.model.pixel_scale or 1.0)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.variables))

    def __repr__(self) -> str:
        height, width = self.image_shape
        return f"Network(ResNet-{self.model.depth}, {', '.join(self.model.classes)}, {height} x {width} pixels)"


class _About(NamedTuple):  # the part of `describe` that loading needs
    model: ModelConfig
    input: InputConfig
    classes: tuple[str, ...]
    image_shape: tuple[int, int]
    temperature: float = 1.0
    pixel_scale: float | None = None


def load_network(run: str | Path, checkpoint: Checkpoint = "best") -> Network:
    """Returns a trained network, ready for `predict`; the probabilities of a finished run are calibrated.

    `run` is the directory of a run, of which `checkpoint` is "best" (lowest validation loss) or "final" (last epoch);
    or an .npz written by export.py or finetune.py; or "pretrained" for the package's network. InputError if it is none
    of these, is damaged, has no checkpoint yet, or has parameters that are not finite.
    """
    path = find_network(run)
    if path.suffix == ".npz" and not path.is_dir():
        check(checkpoint == "best", f"{path} holds one network; leave --checkpoint {checkpoint} out")
        network = _load_file(path)
    else:
        values = run_files.read_config(path)
        model, about = _read_about(values["config"] | values, f"{path}/config.json")
        variables, step = load_variables(path, model, checkpoint)
        temperature, added = run_files.read_calibration(path, step)
        fits = _shapes(added) == _added_shapes(model, added)
        check(fits, f"{path}/calibration.npz does not fit the network; make it again by train.py --resume")
        variables = calibrated(variables, temperature, added)
        network = Network(model, variables, about.image_shape, temperature)
    _check_finite(network, path)
    return network


def load_pretrained() -> Network:
    """Returns the network that comes with the package, trained on simulated images alone."""
    return load_network(PRETRAINED)


def find_network(run: str | Path) -> Path:
    """Returns the path of a network that is given as in `load_network`."""
    path = Path(run)
    return PRETRAINED if str(run) == "pretrained" and not path.exists() else path


def calibrate(model: ResNet, variables: Any, dataset: Dataset) -> tuple[float, dict[str, np.ndarray]]:
    """Returns what is fitted to images that the network was not trained on: its temperature, and arrays by their names.

    population/... is where outlier scores measure from, see `metrics.fit_population`. deflection/kernel, float32 (4
    width, 2), and deflection/bias, (2,), turn each cell of the last feature map into the deflection there, see
    `inference.predict_deflection`; they need simulated images.
    """
    logits, means = outputs(model, variables, dataset.images)[:2]
    added = {"population": metrics.fit_population(means, dataset.labels, len(model.classes)) or {}}
    if model.pixel_scale is not None and (render := map_renderer(dataset, model.input, model.pixel_scale)):
        added["deflection"] = fit_deflection(model, variables, dataset.images, render)
    return metrics.fit_temperature(logits, dataset.labels), flatten_dict(added, sep="/")


def calibrate_run(run_dir: Path, model: ResNet, dataset: Dataset, write: bool) -> None:
    """Calibrates the best and the final checkpoint of a run, and with `write` writes the results to its directory."""
    calibrations: dict[int, Any] = {}
    for checkpoint in ("best", "final"):
        variables, step = load_variables(run_dir, model, checkpoint)
        calibrations[step] = calibrations.get(step) or calibrate(model, variables, dataset)
    if write:
        run_files.write_calibration(run_dir, calibrations)


def calibrated(variables: Any, temperature: float, added: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables with the head, and so the logits, divided by `temperature`, and with the `added` arrays."""
    head = jax.tree.map(lambda x: x / temperature, variables["params"]["head"])
    return {**variables, "params": {**variables["params"], "head": head}, **unflatten_dict(added, sep="/")}


def describe(network: Network, run: str | Path | None = None) -> dict[str, Any]:
    """Returns the description that an exported network needs, ready for JSON; with the `read_record` of its `run`."""
    model, names = network.model, ModelConfig.__dataclass_fields__
    return {
        "model": {name: getattr(model, name) for name in names} | {"dtype": jnp.dtype(model.dtype).name},
        "input": dataclasses.asdict(model.input),
        "classes": model.classes,
        "image_shape": network.image_shape,
        "temperature": network.temperature,
        "pixel_scale": model.pixel_scale,
        "version": __version__,
    } | (read_record(run) if run else {})


def read_record(run: str | Path) -> dict[str, Any]:
    """Returns what is recorded of the training of a network, given as in `load_network`: its config and history.

    Of a fine-tuned network it is the dict `finetuned`; {} if an exported network has no record. Only the last part of
    paths is kept.
    """
    path = find_network(run)
    if path.suffix == ".npz" and not path.is_dir():
        about, _ = read_file(path)
        return {name: about[name] for name in ("config", "history", "finetuned") if name in about}  # shortened before
    return {"config": _shorten(run_files.read_config(path)["config"]), "history": run_files.read_history(path)}


def _shorten(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a run without the folders of its author."""
    short = {
        name: Path(x).name for name, x in config.items() if name in ("run_dir", "data", "folder") and isinstance(x, str)
    }
    return config | short | {name: _shorten(x) for name, x in config.items() if isinstance(x, dict)}


def named_arrays(network: Network) -> dict[str, np.ndarray]:
    """Returns the variables, float32, by names such as params/head/bias."""
    named = flatten_dict(network.variables, sep="/")
    return {name: np.array(x, np.float32, order="C") for name, x in named.items()}


def write_network(out: Path, network: Network, about: dict[str, Any]) -> None:
    """Writes a network to an .npz, atomically: `named_arrays`, and `about`, from `describe`, as JSON text."""
    _check_finite(network, out)
    files.write_arrays(out, {"about": np.array(json.dumps(about))} | named_arrays(network))


def _check_finite(network: Network, where: Path) -> None:
    finite = metrics.find_not_finite(network.variables) is None
    check(finite, f"{where}: the network has parameters that are not finite; train again with a lower learning rate")


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in arrays.items()}


def _added_shapes(model: ResNet, added: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the arrays of `calibrate` must have, of the groups that are there."""
    channels, classes = 8 * model.width, len(model.classes)
    shapes: dict[str, tuple[int, ...]] = {}
    if "population/whitening" in added:
        shapes |= {"population/whitening": (channels, channels), "population/centres": (classes, channels)}
        shapes |= {"population/radii": (classes,)}
    if "deflection/kernel" in added:
        shapes |= {"deflection/kernel": (4 * model.width, 2), "deflection/bias": (2,)}
    return shapes


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description and the arrays of an exported network."""
    arrays = load_arrays(path, EXPECTED, "fU")
    text = arrays.pop("about", np.zeros(0))
    check(text.dtype.kind == "U" and text.ndim == 0, f"{path}: has no text 'about'; expected {EXPECTED}")
    return parse_json(text.item(), f"{path}: about"), arrays


def _read_about(values: dict[str, Any], where: str) -> tuple[ResNet, _About]:
    known = {name: values[name] for name in _About._fields if name in values}
    about = from_dict(_About, _About._field_defaults | known, where)
    return make_model(about.model, about.input, about.classes, about.pixel_scale), about


def _load_file(path: Path) -> Network:
    values, arrays = read_file(path)
    model, about = _read_about(values, f"{path} (of version {values.get('version', 'unknown')}): about")
    expected = _shapes(flatten_dict(variable_shapes(model), sep="/")) | _added_shapes(model, arrays)
    fits = _shapes(arrays) == expected and all(x.dtype.kind == "f" for x in arrays.values())
    check(fits, f"{path}: its arrays do not fit its model; export it again")
    with np.errstate(over="ignore"):  # of float64; `load_network` finds the infinity
        variables = {name: jnp.asarray(array.astype(np.float32)) for name, array in arrays.items()}
    return Network(model, unflatten_dict(variables, sep="/"), about.image_shape, about.temperature)
