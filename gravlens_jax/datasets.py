"""The images of a run: files that exist, files that are simulated first, or images simulated during training."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from gravlens_jax.config import CLASSES, REQUIRED_SPLITS, SPLITS, Config, SimulationConfig, from_dict
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import locked
from gravlens_jax.lensing.images import (
    SIMULATOR_VERSION,
    deflection_maps,
    labels_of,
    render_images,
    simulate_images,
    simulate_parameters,
    without_nan,
)
from gravlens_jax.lensing.priors import PRIORS, Priors, make_easy
from gravlens_jax.loader import DeviceData, FileData
from gravlens_jax.npz import PARAMETERS, Dataset, check_pixels, open_npz, read_rows, write_npz
from gravlens_jax.preprocess import check_images
from gravlens_jax.progress import show_progress
from gravlens_jax.sharding import is_main, wait_for_all
from gravlens_jax.stream import StreamData

TrainingData = FileData | StreamData
CHECKED_ROWS = 8  # of a file of simulated images that are rendered again


class Splits(NamedTuple):
    """The images of a run; the easy images, if there are any, come before the first epoch."""

    train: TrainingData
    easy: TrainingData | None
    val: Dataset
    test: Dataset
    record: dict[str, str]  # split -> `fingerprint` of its file
    has_deflections: bool  # whether batches of training images have `deflections`: see `train_step`


def open_splits(config: Config, mesh: Mesh) -> Splits:
    """Returns the images of a run; simulates files first if the config names none and they do not exist.

    Raises:
      InputError: files are missing, damaged or do not belong together; NaN or infinite pixels; images too small or too
        few for the config.
    """
    splits = _open_stream(config, mesh) if config.stream else _open_files(config, mesh)
    check_images(splits.val.images.shape, config.input)
    for name, data in (("train", splits.train), ("easy", splits.easy)):
        check(
            data is None or data.size >= config.batch_size,
            f"{name} holds {data.size if data else 0} images, fewer than batch_size={config.batch_size}; give more "
            f"or lower it",
        )
    return splits


def _open_files(config: Config, mesh: Mesh) -> Splits:
    files = load_splits(_simulate(config) if config.data is None else Path(config.data))
    training = {split: dataset for split, dataset in files.items() if split in ("train", "easy")}
    maps = {split: _maps_of(dataset, config) for split, dataset in training.items()}
    has_deflections = None not in maps.values()

    def make(split: str, kind: type[FileData]) -> FileData:
        render_maps = maps[split] if has_deflections else None
        return kind(training[split], config.batch_size, config.seed, mesh, render_maps)

    train = make("train", DeviceData if config.device_data else FileData)
    easy = make("easy", FileData) if "easy" in files else None
    return Splits(train, easy, files["val"], files["test"], _record(files), has_deflections)


def _open_stream(config: Config, mesh: Mesh) -> Splits:
    assert config.stream is not None
    s, priors = config.simulation, PRIORS[config.stream]
    held_out = replace(config, simulation=replace(s, preset=config.stream, train=0, easy=0))
    files = load_splits(_simulate(held_out), ("val", "test"))

    def stream(split: str, population: Priors) -> StreamData:
        grid = deflection_grid(config, population)
        return StreamData(getattr(s, split), population, SPLITS.index(split), config.batch_size, s.seed, mesh, grid)

    easy = stream("easy", make_easy(priors)) if s.easy else None
    train = stream("train", priors)
    return Splits(train, easy, files["val"], files["test"], _record(files), train.grid is not None)


def deflection_grid(config: Config, priors: Priors) -> tuple[int, float] | None:
    """Returns the number of cells and their width (arcsec) of the network's last feature map; None for training
    without deflections."""
    if not config.deflection_weight or config.augment.max_rotation or config.augment.max_shift:
        return None
    return config.input.cells, config.input.cell * priors.pixel_scale


def _maps_of(dataset: Dataset, config: Config) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns a function from rows to deflection maps; None for training without, or images from elsewhere."""
    lens_params, source = dataset.lens_params, dataset.info.get("simulated")
    if lens_params is None or not isinstance(source, dict) or source.get("version") != SIMULATOR_VERSION:
        return None
    try:
        priors = from_dict(Priors, source.get("priors"))
    except InputError:  # of another version
        return None
    grid = deflection_grid(config, priors)
    if grid is None:
        return None
    if not shows_its_lenses(dataset, priors):
        print("the images are not those of their lens parameters: training without the auxiliary loss", file=sys.stderr)
        return None

    def render(rows: np.ndarray) -> np.ndarray:
        return deflection_maps({name: values[rows] for name, values in lens_params.items()}, priors, grid)

    return render


def shows_its_lenses(dataset: Dataset, priors: Priors) -> bool:
    """Returns whether a few images are the expected ones of their `lens_params`, up to Poisson noise.

    Mirrored or edited images are not: the chi-square per pixel of CHECKED_ROWS images differs from 1.
    """
    assert dataset.lens_params is not None
    rows = np.unique(np.linspace(0, dataset.size - 1, CHECKED_ROWS).astype(int))
    lenses = without_nan({name: values[rows] for name, values in dataset.lens_params.items()})
    if dataset.image_shape != (priors.num_pixels, priors.num_pixels) or dataset.images.dtype != np.uint16:
        return False
    expected = render_images(lenses, priors)
    bright = expected > 1
    chi_square = (read_rows(dataset.images, rows)[bright] - expected[bright]) ** 2 / expected[bright]
    return bool(abs(chi_square.mean() - 1) < 0.1)  # it scatters by 0.004


def load_splits(folder: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, Dataset]:
    """Opens <split>.npz of each split; easy.npz is optional. Checks all pixels, and that the files belong together."""
    paths = {split: Path(folder) / f"{split}.npz" for split in splits}
    datasets = {split: open_npz(path) for split, path in paths.items() if split in REQUIRED_SPLITS or path.exists()}
    first = splits[0]
    for split, other in datasets.items():
        check(
            other.classes == datasets[first].classes and other.image_shape == datasets[first].image_shape,
            f"{folder}/{split}.npz has classes {other.classes} and images of {other.image_shape} pixels, "
            f"{first}.npz {datasets[first].classes} and {datasets[first].image_shape}; pack them together",
        )
    for dataset in datasets.values():
        check_pixels(dataset.images)
    return datasets


def fingerprint(dataset: Dataset) -> str:
    """Returns a text that identifies images: number, size, dtype, classes, and a digest of their origin.

    Of simulated images the digest is of `info`; of others, of all labels and of up to 64 images, evenly spaced.
    """
    n, (height, width), digest = dataset.size, dataset.image_shape, hashlib.sha256()
    if "simulated" in dataset.info:
        digest.update(json.dumps(dataset.info, sort_keys=True).encode())
    else:
        digest.update(dataset.labels.tobytes())
        for row in np.linspace(0, n - 1, min(n, 64)).astype(int):
            digest.update(read_rows(dataset.images, np.array([row])).tobytes())
    classes = ", ".join(dataset.classes)
    return f"{n} x {height} x {width} {dataset.images.dtype.str}, classes {classes}, sha256 {digest.hexdigest()}"


def _record(files: dict[str, Dataset]) -> dict[str, str]:
    return {split: fingerprint(dataset) for split, dataset in files.items()}


def _simulate(config: Config) -> Path:
    """Simulates the files of the config that do not exist yet; returns their folder."""
    s = config.simulation
    for split in REQUIRED_SPLITS[1:] if config.stream else REQUIRED_SPLITS:
        check(getattr(s, split) > 0, f"--simulation.{split} is 0; training needs images of every split")
    folder = Path(s.folder) / f"{s.preset}-{s.easy}-{s.train}-{s.val}-{s.test}-seed{s.seed}"
    if is_main():
        simulate_dataset(folder, s, show_progress)
    wait_for_all("the images are simulated")
    return folder


def simulate_dataset(
    out: Path,
    config: SimulationConfig,
    progress: Callable = lambda items, *_: items,
    priors: Priors | None = None,
) -> Path:
    """Simulates `out/{train,val,test,easy}.npz`, except those that exist already; returns `out`.

    If another process simulates into the same folder, waits until it is done and uses its files.

    Args:
      out: folder; a file in it that came from the same arguments is kept, any other is an error.
      config: preset, numbers of images and seed.
      progress: wraps the loop over chunks of images: (chunks, split, number of images) -> chunks.
      priors: the population, if it is not the preset itself; `easy` has the same with heavier substructure.
    """
    missing = partial(_missing_files, out, config, PRIORS[config.preset] if priors is None else priors)
    if missing():  # a complete folder may be read-only
        with locked(Path(out), wait=True):
            for split, (n, population, info) in missing().items():
                index, size = SPLITS.index(split), population.num_pixels
                lens_params = simulate_parameters(n, config.seed, index, population)
                arrays = {f"{PARAMETERS}{name}": array for name, array in lens_params.items()}
                chunks = progress(simulate_images(n, config.seed, index, population), split, n)
                path, shape = Path(out) / f"{split}.npz", (n, size, size)
                write_npz(path, chunks, shape, np.dtype(np.uint16), labels_of(n), CLASSES, info, arrays)
    return Path(out)


def _missing_files(out: Path, config: SimulationConfig, priors: Priors) -> dict[str, tuple[int, Priors, dict]]:
    """Returns split -> (number of images, population, info) of the files that `simulate_dataset` has to make."""
    missing: dict[str, tuple[int, Priors, dict]] = {}
    for split in SPLITS:
        path, n = Path(out) / f"{split}.npz", getattr(config, split)
        population = make_easy(priors) if split == "easy" and n else priors
        source = {"version": SIMULATOR_VERSION, "preset": config.preset, "seed": config.seed, "split": split}
        info = {"simulated": source | {"priors": asdict(population)}}
        if not path.exists():
            missing |= {split: (n, population, info)} if n else {}
            continue
        found = open_npz(path)
        same = found.size == n and found.info == info
        check(same, f"{path} holds {found.size} other images, or another version's; remove it or choose another folder")
    return missing
