"""The images of a run: files that exist, files that are simulated first, or images simulated during training."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gravlens_jax import npz, preprocess, sharding
from gravlens_jax.config import CLASSES, REQUIRED_SPLITS, SPLITS, Config, InputConfig, SimulationConfig, from_dict
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import locked
from gravlens_jax.lensing import images
from gravlens_jax.lensing.priors import PRIORS, Priors, make_easy
from gravlens_jax.lensing.render import Grid
from gravlens_jax.loader import DeviceData, FileData
from gravlens_jax.progress import show_progress
from gravlens_jax.stream import StreamData

CHECKED_ROWS = 8  # of a file of simulated images that are rendered again


class Splits(NamedTuple):
    """The images of a run; the easy images, if there are any, come before the first epoch."""

    train: FileData | StreamData
    easy: FileData | StreamData | None
    val: npz.Dataset
    test: npz.Dataset
    record: dict[str, str]  # split -> `fingerprint` of its file
    has_deflections: bool  # whether batches of training images have `deflections`: see `train_step`
    pixel_scale: float | None  # arcsec; None for images from elsewhere


def open_splits(config: Config, mesh: Mesh) -> Splits:
    """Returns the images of a run; simulates files first if the config names none and they do not exist.

    InputError if files are missing, damaged or do not belong together, pixels not finite, or images too small or few.
    """
    training, files, has_deflections = (_open_stream if config.stream else _open_files)(config, mesh)
    preprocess.check_images(files["val"].images.shape, config.input)
    for name, data in training.items():
        few = f"{name} holds {data.size} images, fewer than batch_size={config.batch_size}; give more or lower it"
        check(data.size >= config.batch_size, few)
    record = {split: fingerprint(dataset) for split, dataset in files.items()}
    priors = find_priors(files["val"])
    scale = priors.pixel_scale if priors else None
    return Splits(training["train"], training.get("easy"), files["val"], files["test"], record, has_deflections, scale)


def _open_files(config: Config, mesh: Mesh) -> tuple[dict[str, Any], dict[str, npz.Dataset], bool]:
    files = load_splits(_simulate(config) if config.data is None else Path(config.data))
    maps = {split: map_renderer(files[split], config.input) for split in ("train", "easy") if split in files}
    has_deflections = config.uses_deflections and None not in maps.values()
    training: dict[str, Any] = {}
    for split, render in maps.items():
        kind = DeviceData if config.device_data and split == "train" else FileData
        training[split] = kind(files[split], config.batch_size, config.seed, mesh, render if has_deflections else None)
    return training, files, has_deflections


def _open_stream(config: Config, mesh: Mesh) -> tuple[dict[str, Any], dict[str, npz.Dataset], bool]:
    assert config.stream is not None
    s, priors = config.simulation, PRIORS[config.stream]
    held_out = replace(config, simulation=replace(s, preset=config.stream, train=0, easy=0))
    files = load_splits(_simulate(held_out), ("val", "test"))
    grid = map_grid(config.input, priors) if config.uses_deflections else None
    open_stream = partial(StreamData, batch_size=config.batch_size, seed=s.seed, mesh=mesh, grid=grid)
    training = {"train": open_stream(s.train, priors, SPLITS.index("train"))}
    if s.easy:
        training["easy"] = open_stream(s.easy, make_easy(priors), SPLITS.index("easy"))
    return training, files, grid is not None


def map_grid(config: InputConfig, priors: Priors) -> Grid:
    """Returns the cells of the network's last feature map: the deflection is predicted in each."""
    off_centre = (priors.num_pixels - config.crop) % 2 / 2  # of the crop, in pixels
    return Grid(config.cells, config.cell * priors.pixel_scale, off_centre * priors.pixel_scale)


def map_renderer(
    dataset: npz.Dataset, config: InputConfig, pixel_scale: float | None = None
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns a function from rows of simulated images to their `deflection_map` on `map_grid`.

    None for other images, for those of another `pixel_scale`, if given (arcsec): the cells would differ; and for a
    network with a single cell.
    """
    lens_params, priors = dataset.lens_params, find_priors(dataset)
    if lens_params is None or priors is None or config.cells < 2 or pixel_scale not in (None, priors.pixel_scale):
        return None
    grid = map_grid(config, priors)
    return lambda rows: images.deflection_maps({name: x[rows] for name, x in lens_params.items()}, priors, grid)


def find_priors(dataset: npz.Dataset) -> Priors | None:
    """Returns the population of simulated images; None for other images, or if they do not show their `lens_params`."""
    source = dataset.info.get("simulated")
    if dataset.lens_params is None or not isinstance(source, dict) or source.get("version") != images.SIMULATOR_VERSION:
        return None
    try:
        priors: Priors = from_dict(Priors, source.get("priors"))
    except InputError:  # of another version
        return None
    with suppress(KeyError, TypeError, ValueError):  # parameters that were edited
        if shows_its_lenses(dataset, priors):
            return priors
    _notice(str(getattr(dataset.images, "path", "images in memory")))
    return None


@cache
def _notice(where: str) -> None:  # once for each file
    notice = "the images are not those of their lens parameters: no deflection maps of their substructure"
    print(f"{where}: {notice}", file=sys.stderr)


def shows_its_lenses(dataset: npz.Dataset, priors: Priors) -> bool:
    """Returns whether a few images are the expected ones of their `lens_params`, up to Poisson noise.

    Mirrored or edited images are not: the chi-square per pixel of CHECKED_ROWS images differs from 1.
    """
    if dataset.image_shape != (priors.num_pixels, priors.num_pixels) or dataset.images.dtype != np.uint16:
        return False
    assert dataset.lens_params is not None
    rows = np.unique(np.linspace(0, dataset.size - 1, CHECKED_ROWS).astype(int))
    lenses = images.without_nan({name: values[rows] for name, values in dataset.lens_params.items()})
    expected = images.render_images(lenses, priors)
    bright = expected > 1
    chi_square = (npz.read_rows(dataset.images, rows)[bright] - expected[bright]) ** 2 / expected[bright]
    return bool(abs(chi_square.mean() - 1) < 0.1)  # it scatters by 0.004


def load_splits(folder: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, npz.Dataset]:
    """Opens <split>.npz of each split; easy.npz is optional. Checks all pixels, and that the files belong together."""
    paths = {split: folder / f"{split}.npz" for split in splits}
    datasets = {split: npz.open_npz(path) for split, path in paths.items() if split in REQUIRED_SPLITS or path.exists()}
    first = datasets[splits[0]]
    for split, other in datasets.items():
        has = f"{paths[split]} has classes {other.classes} and images of {other.image_shape} pixels"
        expected = f"{splits[0]}.npz {first.classes} and {first.image_shape}; pack them together"
        check((other.classes, other.image_shape) == (first.classes, first.image_shape), f"{has}, {expected}")
    for dataset in datasets.values():
        npz.check_pixels(dataset.images)
    return datasets


def fingerprint(dataset: npz.Dataset) -> str:
    """Returns a text that identifies images: number, size, dtype, classes, and a digest of their origin.

    Of simulated images the digest is of `info`; of others, of all labels and of up to 64 images, evenly spaced.
    """
    n, (height, width), digest = dataset.size, dataset.image_shape, hashlib.sha256()
    if "simulated" in dataset.info:
        digest.update(json.dumps(dataset.info, sort_keys=True).encode())
    else:
        digest.update(dataset.labels.tobytes())
        digest.update(npz.read_rows(dataset.images, np.linspace(0, n - 1, min(n, 64)).astype(int)).tobytes())
    classes = ", ".join(dataset.classes)
    return f"{n} x {height} x {width} {dataset.images.dtype.str}, classes {classes}, sha256 {digest.hexdigest()}"


def _simulate(config: Config) -> Path:
    """Simulates the files of the config that do not exist yet; returns their folder."""
    s = config.simulation
    for split in REQUIRED_SPLITS[1:] if config.stream else REQUIRED_SPLITS:
        check(getattr(s, split) > 0, f"--simulation.{split} is 0; training needs images of every split")
    folder = Path(s.folder) / f"{s.preset}-{s.easy}-{s.train}-{s.val}-{s.test}-seed{s.seed}"
    if sharding.is_main():
        simulate_dataset(folder, s)
    sharding.wait_for_all("the images are simulated")
    return folder


def simulate_dataset(out: Path, config: SimulationConfig, priors: Priors | None = None) -> Path:
    """Simulates `out/{train,val,test,easy}.npz` into the folder `out`, and returns it.

    Files that came from the same arguments are kept, others are an InputError. If another process simulates into the
    same folder, waits until it is done and uses its files. `priors` are the population if it is not the preset itself
    (`easy` has heavier substructure).
    """
    missing = partial(_missing_files, out, config, PRIORS[config.preset] if priors is None else priors)
    if missing():  # a complete folder may be read-only
        with locked(out, wait=True):
            for split, (n, population, info) in missing().items():
                index, size = SPLITS.index(split), population.num_pixels
                lens_params = images.simulate_parameters(n, config.seed, index, population)
                arrays = {f"{npz.PARAMETERS}{name}": array for name, array in lens_params.items()}
                chunks = show_progress(images.simulate_images(n, config.seed, index, population), split, n)
                path, shape = out / f"{split}.npz", (n, size, size)
                npz.write_npz(path, chunks, shape, np.dtype(np.uint16), images.labels_of(n), CLASSES, info, arrays)
    return out


def _missing_files(out: Path, config: SimulationConfig, priors: Priors) -> dict[str, tuple[int, Priors, dict]]:
    """Returns split -> (number of images, population, info) of the files that `simulate_dataset` has to make."""
    missing: dict[str, tuple[int, Priors, dict]] = {}
    for split in SPLITS:
        path, n = out / f"{split}.npz", getattr(config, split)
        population = make_easy(priors) if split == "easy" and n else priors
        source = {"version": images.SIMULATOR_VERSION, "preset": config.preset, "seed": config.seed, "split": split}
        info = {"simulated": source | {"priors": asdict(population)}}
        if path.exists():
            found = npz.open_npz(path)
            same = found.size == n and found.info == info and found.lens_params is not None
            other = f"{path} holds {found.size} other images, or another version's; remove it or choose another folder"
            check(same, other)
        elif n:
            missing[split] = n, population, info
    return missing
