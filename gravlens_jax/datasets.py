"""The images of a run: files that exist, files that are simulated first, or images that are simulated when needed."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from gravlens_jax.config import CLASSES, FILES, SPLITS, Config, SimulationConfig, from_dict
from gravlens_jax.console import track
from gravlens_jax.errors import InputError, check
from gravlens_jax.lensing.images import labels_of, render_deflections, simulate_images, simulate_parameters
from gravlens_jax.lensing.priors import PRESETS, Priors, make_easy
from gravlens_jax.loader import DeviceSource, FileSource, Source, StreamSource
from gravlens_jax.npz import Dataset, open_npz, write_npz
from gravlens_jax.pixels import check_pixels, read_rows
from gravlens_jax.preprocess import check_images
from gravlens_jax.run_dir import locked
from gravlens_jax.sharding import is_main, wait_for_all


class Splits(NamedTuple):
    """The images of a run; the easy images, if there are any, come before the first epoch."""

    train: Source
    easy: Source | None
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
    if config.stream is not None:
        splits = _open_stream(config, mesh)
    else:
        files = load_splits(_simulate(config) if config.data is None else Path(config.data))
        make = DeviceSource if config.device_data else FileSource
        own = {split: _add_deflections(files[split], split, config) for split in ("train", "easy") if split in files}
        has_deflections = all(dataset.deflections is not None for dataset in own.values())
        if not has_deflections:
            own = {split: dataset._replace(deflections=None) for split, dataset in own.items()}
        easy = FileSource(own["easy"], config.batch_size, config.seed, mesh) if "easy" in files else None
        train = make(own["train"], config.batch_size, config.seed, mesh)
        splits = Splits(train, easy, files["val"], files["test"], _record(files), has_deflections)
    check_images(splits.val.images.shape, config.input)
    for name, source in (("train", splits.train), ("easy", splits.easy)):
        check(
            source is None or source.size >= config.batch_size,
            f"{name} holds {source.size if source else 0} images, fewer than batch_size={config.batch_size}; give more "
            f"or lower it",
        )
    return splits


def _open_stream(config: Config, mesh: Mesh) -> Splits:
    assert config.stream is not None
    s, priors = config.simulation, PRESETS[config.stream]
    held_out = replace(config, simulation=replace(s, preset=config.stream, train=0, easy=0))
    files = load_splits(_simulate(held_out), ("val", "test"))

    def stream(split: str, population: Priors) -> StreamSource:
        grid = deflection_grid(config, population)
        return StreamSource(getattr(s, split), population, FILES.index(split), config.batch_size, s.seed, mesh, grid)

    easy = stream("easy", make_easy(priors)) if s.easy else None
    train = stream("train", priors)
    return Splits(train, easy, files["val"], files["test"], _record(files), train.grid is not None)


def deflection_grid(config: Config, priors: Priors) -> tuple[int, float] | None:
    """Returns the number of cells and their width (arcsec) of the network's last feature map, to train it with the
    deflections there; None for no such training."""
    if not config.deflection_weight or config.augment.max_rotation or config.augment.max_shift:
        return None
    return config.input.cells, config.input.cell * priors.pixel_scale


def _add_deflections(dataset: Dataset, split: str, config: Config) -> Dataset:
    """Returns the images of a split with the deflections by their substructure, if this project simulated them."""
    found = _simulated(dataset, split)
    if found is None:
        return dataset
    seed, priors = found
    grid = deflection_grid(config, priors)
    if grid is None:
        return dataset
    maps = render_deflections(0, seed, FILES.index(split), n=dataset.size, priors=priors, grid=grid)
    return dataset._replace(deflections=np.asarray(maps))


def _simulated(dataset: Dataset, split: str) -> tuple[int, Priors] | None:
    """Returns the seed and the population of images that this version can simulate again; None for other images."""
    source = dataset.info.get("simulated")
    if not isinstance(source, dict) or source.get("split") != split:
        return None
    seed = source.get("seed")
    if type(seed) is not int or not 0 <= seed < 2**31 or not np.array_equal(dataset.labels, labels_of(dataset.size)):
        return None
    try:
        return seed, from_dict(Priors, source.get("priors"))
    except InputError:  # of another version
        return None


def load_splits(folder: Path, splits: tuple[str, ...] = FILES) -> dict[str, Dataset]:
    """Opens <split>.npz of each split; easy.npz is optional. Checks all pixels, and that the files belong together."""
    paths = {split: Path(folder) / f"{split}.npz" for split in splits}
    datasets = {split: open_npz(path) for split, path in paths.items() if split in SPLITS or path.exists()}
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
    """Returns a text that tells images apart: their number, size, dtype, classes, and a digest of labels and pixels.

    The digest is of all labels and of up to 64 images, evenly spaced, so that it takes no time.
    """
    n, (height, width), digest = dataset.size, dataset.image_shape, hashlib.sha256(dataset.labels.tobytes())
    for row in np.linspace(0, n - 1, min(n, 64)).astype(int):
        digest.update(read_rows(dataset.images, np.array([row])).tobytes())
    classes = ", ".join(dataset.classes)
    return f"{n} x {height} x {width} {dataset.images.dtype.str}, classes {classes}, sha256 {digest.hexdigest()}"


def _record(files: dict[str, Dataset]) -> dict[str, str]:
    return {split: fingerprint(dataset) for split, dataset in files.items()}


def _simulate(config: Config) -> Path:
    """Simulates the files of the config that do not exist yet; returns their folder."""
    s = config.simulation
    for split in SPLITS[1:] if config.stream else SPLITS:
        check(getattr(s, split) > 0, f"--simulation.{split} is 0; training needs images of every split")
    folder = Path(s.folder) / f"{s.preset}-{s.easy}-{s.train}-{s.val}-{s.test}-seed{s.seed}"
    if is_main():
        simulate_dataset(folder, s, track)
    wait_for_all("the images are simulated")
    return folder


def simulate_dataset(
    out: Path,
    config: SimulationConfig,
    progress: Callable = lambda items, *_: items,
    priors: Priors | None = None,
    parameters: bool = False,
) -> Path:
    """Simulates `out/{train,val,test,easy}.npz`, except those that exist already; returns `out`.

    If another process simulates into the same folder, waits until it is done and uses its files.

    Args:
      out: folder; a file in it that came from the same arguments is kept, any other is an error.
      config: preset, numbers of images and seed.
      progress: wraps the loop over chunks of images: (chunks, split, number of images) -> chunks.
      priors: the population, if it is not the preset itself; `easy` has the same with heavier substructure.
      parameters: whether to store the parameters of each lens too, as arrays "parameters/<name>".
    """
    priors = PRESETS[config.preset] if priors is None else priors
    if _missing_files(out, config, priors, parameters):  # a complete folder may be read-only
        with locked(Path(out), wait=True):
            for split, (n, population, info) in _missing_files(out, config, priors, parameters).items():
                index, size = FILES.index(split), priors.num_pixels
                arrays = simulate_parameters(n, config.seed, index, population) if parameters else {}
                arrays = {f"parameters/{name}": array for name, array in arrays.items()}
                chunks = progress(simulate_images(n, config.seed, index, population), split, n)
                path, shape = Path(out) / f"{split}.npz", (n, size, size)
                write_npz(path, chunks, shape, np.dtype(np.uint16), labels_of(n), CLASSES, info, arrays)
    return Path(out)


def _missing_files(
    out: Path, config: SimulationConfig, priors: Priors, parameters: bool
) -> dict[str, tuple[int, Priors, dict]]:
    """Returns split -> (number of images, population, info) of the files that `simulate_dataset` has to make."""
    source = {"preset": config.preset, "seed": config.seed, "parameters": parameters}
    missing: dict[str, tuple[int, Priors, dict]] = {}
    for split in FILES:
        path, n = Path(out) / f"{split}.npz", getattr(config, split)
        population = make_easy(priors) if split == "easy" and n else priors
        info = {"simulated": source | {"split": split, "priors": asdict(population)}}
        if not path.exists():
            missing |= {split: (n, population, info)} if n else {}
            continue
        found = open_npz(path)
        same = found.size == n and found.info == info
        check(same, f"{path} holds {found.size} other images, or another version's; remove it or choose another folder")
    return missing
