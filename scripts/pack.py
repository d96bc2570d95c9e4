"""Packs folders of .npy images into memory-mappable .npz files."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.config import CLASSES
from gravlens_jax.folders import pack
from gravlens_jax.npz import unpack_npz
from gravlens_jax.progress import track


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    dtype: Literal["float32", "float16"] = "float32",
    classes: str | None = None,
    test_fraction: float = 0.5,
    seed: int = 0,
) -> None:
    """Packs SOURCE/{train,val}/<class>/*.npy into OUT/train.npz, OUT/val.npz and OUT/test.npz.

    SOURCE may also be one .npz, made elsewhere, of `images` and `labels`: it is copied to the file OUT, uncompressed
    and with its class names.

    examples:
      python scripts/pack.py dataset packed
      python scripts/pack.py theirs.npz packed/train.npz --classes no,vort,sphere

    Args:
        source: folder that holds train/ and val/ (the public data set's is called dataset), or an .npz.
        out: folder to write to, or a file if SOURCE is an .npz.
        dtype: of the stored images.
        classes: folder names (or, for an .npz that does not say, the names of labels 0, 1, ...), separated by commas;
            no,sphere,vort if not given.
        test_fraction: part of each class of val that becomes the test split.
        seed: of that split.
    """
    names = cli.split_names(classes) if classes else None
    if source.suffix == ".npz":
        print(unpack_npz(source, out, names))
    else:
        counts = pack(source, out, dtype, names or CLASSES, test_fraction, seed, track)
        print(f"{out}: " + ", ".join(f"{split}.npz {n:,} images" for split, n in counts.items()))


if __name__ == "__main__":
    cli.run_function(main)
