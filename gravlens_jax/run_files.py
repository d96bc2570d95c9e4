"""The files in the directory of a run, all written atomically; `checkpoint` saves the networks.

runs/<name>/config.json              the configuration; written before the first step
runs/<name>/metrics.jsonl            one line per epoch
runs/<name>/checkpoints/             see `checkpoint`
runs/<name>/calibration.npz          of a finished run: <step>/temperature, and <step>/<array> of `network.calibrate`
runs/<name>/report/                  figures, metrics and predictions on the test split
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from gravlens_jax.config import Config, from_dict
from gravlens_jax.errors import InputError, check, parse_json
from gravlens_jax.files import write_arrays, write_atomically
from gravlens_jax.metrics import find_not_finite
from gravlens_jax.npz import load_arrays

MAY_DIFFER = ("run_dir", "device_data", "data", "simulation.folder", "epochs")  # between a run and its continuation


class RunInfo(NamedTuple):
    """What config.json holds."""

    config: Config
    classes: tuple[str, ...]
    image_shape: tuple[int, int]  # height and width of the training images
    data: dict = {}  # noqa: RUF012 - never changed; see `datasets.Splits.record`
    pixel_scale: float | None = None  # arcsec, if known


def saved_step(run_dir: Path) -> int | None:
    """Returns the step of the latest checkpoint; None if there is none."""
    return max((int(f.name) for f in (run_dir / "checkpoints").glob("[0-9]*") if f.name.isdecimal()), default=None)


def check_unused(run_dir: Path) -> None:
    """Raises InputError if the directory already holds a run with a checkpoint; one without has nothing to lose."""
    advice = "continue it with --resume, or give the new run another --run-dir"
    check(saved_step(run_dir) is None, f"{run_dir} already holds a run; {advice}")


def create_run(run_dir: Path, info: RunInfo) -> None:
    """Creates the run directory and its config.json; InputError if `check_unused` finds a run there."""
    check_unused(run_dir)
    _write_config(run_dir, info)


def update_run(run_dir: Path, info: RunInfo) -> None:
    """Writes config.json of a run that is resumed, if the path of its data or the number of epochs has changed."""
    saved = read_run(run_dir)
    info = info._replace(config=replace(info.config, run_dir=saved.config.run_dir))
    if info != saved:
        _write_config(run_dir, info)


def _write_config(run_dir: Path, info: RunInfo) -> None:
    values = info._asdict() | {"config": asdict(info.config)}
    write_atomically(run_dir / "config.json", json.dumps(values, indent=2) + "\n")


def read_config(run_dir: Path) -> dict[str, Any]:
    """Returns the JSON object in config.json of a run directory, perhaps of another version."""
    path = run_dir / "config.json"
    check(path.is_file(), f"{run_dir} is not a run (no config.json); expected a directory made by scripts/train.py")
    values = parse_json(path.read_bytes(), str(path))
    check(isinstance(values.get("config"), dict), f"{path}: has no object 'config'; the file is damaged")
    return values


def read_run(run_dir: Path) -> RunInfo:
    """Reads config.json of a run directory, of which every field must be known."""
    return from_dict(RunInfo, read_config(run_dir), f"{run_dir}/config.json")


def check_resumable(run_dir: Path, config: Config) -> None:
    """Raises InputError unless the directory holds a run of the same config, but for MAY_DIFFER."""
    before = read_run(run_dir).config.resolve()
    saved, given = (flatten_dict(asdict(c), sep=".") for c in (before, config.resolve()))
    for name, value in saved.items():
        same = before.stream == config.stream if name == "data" else value == given[name] or name in MAY_DIFFER
        message = f"--{name.replace('_', '-')} is {given[name]} but the run to resume has {value}"
        check(same, f"{message}; leave the option out, or start a new run with another --run-dir")
    reason = f"the run to resume has {before.epochs}, and its cosine schedule ends with them: every step would change"
    advice = f"Start a new run with --epochs {config.epochs}; one with --optim.decay constant can be continued"
    possible = config.epochs == before.epochs or before.optim.decay == "constant"
    check(possible, f"--epochs is {config.epochs} but {reason}. {advice}")
    if config.data is not None and not config.stream:
        file = Path(config.data) / "train.npz"
        check(file.is_file(), f"{file}: no such file; if the images of the run were moved, give their folder as --data")


def check_same_images(run_dir: Path, info: RunInfo) -> None:
    """Raises InputError if the images are not those that the run in the directory began with."""
    before, folder = read_run(run_dir), info.config.data or info.config.simulation.folder
    message = f"{folder} has {info.classes} in images of {info.image_shape} pixels, not"
    check(before[1:3] == info[1:3], f"{message} {before.classes} in {before.image_shape} as the run to resume")
    for split in (before.data | info.data) if before.data else ():
        saved, found = (data.get(split, "no file") for data in (before.data, info.data))
        message = f"{folder}: {split}.npz does not hold the images that the run began with ({found}; expected {saved})"
        check(saved == found, f"{message}; give the folder of those as --data")


def read_history(run_dir: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, or those up to `step`; [] if there is no such file, InputError if damaged."""
    path, history = run_dir / "metrics.jsonl", []
    try:
        for text in path.read_bytes().splitlines() if path.exists() else []:
            line = json.loads(text)
            if step is not None and line["step"] > step:  # of an epoch that was not saved; more may follow, cut
                break
            history.append(line)
    except (ValueError, TypeError, KeyError) as error:  # also bad UTF-8
        raise InputError(f"{path} has a damaged line ({error!r}); remove the file or that line") from error
    return history


def write_history(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces metrics.jsonl by `lines`."""
    write_atomically(run_dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def write_calibration(run_dir: Path, calibrations: dict[int, tuple[float, dict[str, np.ndarray]]]) -> None:
    """Writes calibration.npz: temperature and arrays for the checkpoint of each step."""
    arrays: dict[str, np.ndarray] = {}
    for step, (temperature, added) in calibrations.items():
        arrays |= {f"{step}/{name}": array for name, array in added.items()}
        arrays[f"{step}/temperature"] = np.array(temperature)
    write_arrays(run_dir / "calibration.npz", arrays)


def read_calibration(run_dir: Path, step: int) -> tuple[float, dict[str, np.ndarray]]:
    """Returns temperature and arrays for the checkpoint of `step`; 1.0 and {} if none were fitted."""
    path = run_dir / "calibration.npz"
    arrays = load_arrays(path, "the calibration of a run", "f") if path.exists() else {}
    added = {name.partition("/")[2]: x for name, x in arrays.items() if name.startswith(f"{step}/")}
    temperature = added.pop("temperature", np.array(0.0 if added else 1.0))
    valid = temperature.shape == () and 0 < float(temperature) < 1e3 and find_not_finite(added) is None
    check(valid, f"{path} is damaged: expected a temperature and finite arrays; make it again by train.py --resume")
    return float(temperature), added
