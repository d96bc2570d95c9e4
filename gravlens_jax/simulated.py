"""Images that this package simulates to train with: as files, or as a stream; and the deflections that they show."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gravlens_jax.config import CLASSES, FILES, Config, SimulationConfig, from_dict
from gravlens_jax.errors import InputError, check
from gravlens_jax.lensing.images import (
    labels_of,
    render_batch,
    render_deflections,
    simulate_images,
    simulate_parameters,
)
from gravlens_jax.lensing.priors import PRESETS, Priors, make_easy
from gravlens_jax.npz import Dataset, open_npz, write_npz
from gravlens_jax.run_dir import locked
from gravlens_jax.sharding import local_rows, shard_batch
from gravlens_jax.train_step import Batch


@dataclass(frozen=True)
class StreamSource:
    """Simulated images, each used once: epoch 0, 1, ... are the images 0, 1, 2, ... of `lensing.simulate_images`.

    On CPUs all cores simulate ahead; each accelerator renders its own share of a batch, with noise.
    """

    size: int  # images of an epoch
    priors: Priors
    split: int  # see `simulate_images`
    batch_size: int  # over all devices
    seed: int  # of the images
    mesh: Mesh
    grid: tuple[int, float] | None  # cells and width of the maps of deflections, see `render_deflections`

    def batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, Batch]]:
        """See `Source`."""
        steps = self.size // self.batch_size
        first, stop = ((epoch * steps + step) * self.batch_size for step in (skip, steps))
        simulate = self._on_host if jax.default_backend() == "cpu" else self._on_devices
        for batch in simulate(first, stop):
            yield 1, batch

    def _on_host(self, first: int, stop: int) -> Iterator[Batch]:
        own = local_rows(np.arange(self.batch_size)[None])[0]  # each process simulates all and keeps its share
        ready = np.empty((0, self.priors.num_pixels, self.priors.num_pixels), np.uint16)
        chunks = simulate_images(stop - first, self.seed, self.split, self.priors, start=first)
        for start in range(first, stop, self.batch_size):
            while len(ready) < self.batch_size:
                ready = np.concatenate([ready, next(chunks)])
            batch = {"images": ready[own], "labels": labels_of(self.batch_size, start)[own]}
            ready = ready[self.batch_size :]
            if self.grid:
                batch["deflections"] = np.asarray(self._deflections(start, self.seed, self.split, self.batch_size))[own]
            yield shard_batch(batch, self.mesh)

    def _on_devices(self, first: int, stop: int) -> Iterator[Batch]:
        for start in range(first, stop, self.batch_size):
            yield self.render(start, self.seed, self.split)

    def _deflections(self, first, seed, split, n: int) -> jax.Array:
        assert self.grid is not None
        return render_deflections(first, seed, split, n=n, priors=self.priors, grid=self.grid)

    @cached_property
    def render(self):
        """The jitted (first, seed, split) -> batch, of which each device renders its share."""
        share = self.batch_size // self.mesh.size

        def render_share(first, seed, split):
            own = first + share * jax.lax.axis_index("data")
            batch = render_batch(own, seed, split, priors=self.priors, batch_size=share)
            if self.grid:
                batch["deflections"] = self._deflections(own, seed, split, share)
            return batch

        # check_vma=False: jax.random.poisson has loops that the check of shard_map does not support.
        whole, shares = PartitionSpec(), PartitionSpec("data")
        return jax.jit(jax.shard_map(render_share, mesh=self.mesh, in_specs=whole, out_specs=shares, check_vma=False))


def deflection_grid(config: Config, priors: Priors) -> tuple[int, float] | None:
    """Returns the number of cells and their width (arcsec) of the network's last feature map, to train it with the
    deflections there; None for no such training."""
    if not config.deflection_weight or config.augment.max_rotation or config.augment.max_shift:
        return None
    return config.input.cells, config.input.cell * priors.pixel_scale


def add_deflections(dataset: Dataset, split: str, config: Config) -> Dataset:
    """Returns the images of a split with the deflections by their substructure, if this project simulated them."""
    found = _simulated(dataset, split)
    grid = deflection_grid(config, found[1]) if found else None
    if not found or not grid:
        return dataset
    seed, priors = found
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
