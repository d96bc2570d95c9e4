"""Packs folders of .npy images into memory-mappable .npz files."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES
from gravlens_jax.console import track
from gravlens_jax.errors import check
from gravlens_jax.folders import list_folder, load_image
from gravlens_jax.npz import unpack_npz, write_npz


def split_indices(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices in two, stratified by label: sorted int arrays, the second with `fraction` of each class."""
    rng = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        parts.append(members[: round(fraction * len(members))])
    second = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), second), second


def pack(
    source: Path,
    out: Path,
    dtype: str = "float32",
    classes: tuple[str, ...] = CLASSES,
    test_fraction: float = 0.5,
    seed: int = 0,
) -> dict[str, int]:
    """Packs `source/{train,val}/<class>/*.npy` into `out/{train,val,test}.npz`; returns the number of images of each.

    val is split into val and test, stratified, by `seed`; the files of each split are recorded in its `info`.

    Args:
      source: the public layout; either of train and val may be missing.
      out: folder of the .npz files; existing ones are refused.
      dtype: "float32" or "float16", of the stored images.
      classes: folder names, in the order of the labels.
      test_fraction: of val that becomes test, in [0, 1).
      seed: of the split.
    """
    source, out = Path(source), Path(out)
    check(dtype in ("float16", "float32"), f"dtype={dtype!r}: expected float16 or float32")
    check(0 <= test_fraction < 1, f"test_fraction={test_fraction}: expected a number in [0, 1)")
    folders = [name for name in ("train", "val") if (source / name).is_dir()]
    check(bool(folders), f"{source}: has neither train/ nor val/; expected {source}/train/{classes[0]}/1.npy and so on")
    todo = {}
    for name in folders:
        files, labels = list_folder(source / name, classes)
        if name == "train" or test_fraction == 0:
            todo[name] = files, labels
        else:
            val, test = split_indices(labels, test_fraction, seed)
            todo |= {s: ([files[i] for i in part], labels[part]) for s, part in (("val", val), ("test", test))}
    for name in todo:
        check(not (out / f"{name}.npz").exists(), f"{out / name}.npz exists; remove it or choose another folder")
    shape = load_image(next(iter(todo.values()))[0][0]).shape
    for name, (files, labels) in todo.items():
        check(len(files) > 0, f"{name}: no images are left for it with test_fraction={test_fraction}")

        def chunks(files=files, name=name):
            for file in track(files, name, len(files)):
                with np.errstate(over="ignore"):
                    image = load_image(file, shape).astype(dtype)
                check(bool(np.isfinite(image).all()), f"{file}: pixels overflow {dtype}; use --dtype float32")
                yield image[None]

        info = {
            "source": source.name,
            "files": [f"{file.parent.parent.name}/{file.parent.name}/{file.name}" for file in files],
            "split": None if name == "train" else {"seed": seed, "test_fraction": test_fraction},
        }
        write_npz(out / f"{name}.npz", chunks(), (len(files), *shape), np.dtype(dtype), labels, classes, info)
    return {name: len(files) for name, (files, _) in todo.items()}


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    dtype: Literal["float32", "float16"] = "float32",
    classes: str | None = None,
    test_fraction: float = 0.5,
    seed: int = 0,
) -> None:
    """Packs SOURCE/{train,val}/<class>/*.npy into OUT/train.npz, OUT/val.npz and OUT/test.npz.

    SOURCE may also be an .npz from elsewhere with `images` and `labels`: it is copied to the file OUT, uncompressed and
    with class names.

    examples:
      python scripts/pack.py dataset packed
      python scripts/pack.py theirs.npz packed/train.npz --classes no,vort,sphere

    Args:
        source: folder that holds train/ and val/ (the public data set's is called dataset), or an .npz.
        out: folder to write to, or a file if SOURCE is an .npz.
        dtype: of the stored images.
        classes: folder names (or, for an .npz without class names, those of labels 0, 1, ...), separated by commas;
            by default no,sphere,vort.
        test_fraction: part of each class of val that becomes the test split.
        seed: of that split.
    """
    names = cli.split_names(classes) if classes else None
    if source.suffix == ".npz":
        print(unpack_npz(source, out, names))
    else:
        counts = pack(source, out, dtype, names or CLASSES, test_fraction, seed)
        print(f"{out}: " + ", ".join(f"{split}.npz {n:,} images" for split, n in counts.items()))


if __name__ == "__main__":
    cli.run_function(main)
