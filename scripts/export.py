"""Writes a trained network to one small file."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.weights import export_run


def main(
    run: cli.Source,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    checkpoint: Literal["best", "final"] = "best",
) -> None:
    """Writes a trained network to one file.

    examples:
      python scripts/export.py runs/default mine.npz
      python scripts/export.py pretrained predict.stablehlo

    Args:
        out: .npz, which evaluate.py and predict.py accept in place of a run; .safetensors, the same arrays for other
            programs; or .stablehlo, the whole prediction, which runs by jax.export.deserialize without this package.
        checkpoint: the epoch of lowest validation loss, or the last one.
    """
    about = export_run(run, out, checkpoint)
    print(f"{out}: {out.stat().st_size / 2**20:.2f} MiB, classes {', '.join(about['classes'])}")


if __name__ == "__main__":
    cli.run_function(main)
