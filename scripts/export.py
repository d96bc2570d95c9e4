"""Writes a trained network to one small file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gravlens_jax import cli
from gravlens_jax.config import Checkpoint
from gravlens_jax.errors import check, check_installed
from gravlens_jax.files import check_folder, write_atomically

if TYPE_CHECKING:
    from gravlens_jax.network import Network

FORMATS = {".npz": None, ".safetensors": "safetensors", ".stablehlo": "flatbuffers"}  # suffix -> required package


def export_program(network: "Network") -> bytes:
    """Returns `predict` as a serialized StableHLO program for CPU, CUDA and TPU, which needs JAX but not this package.

    `jax.export.deserialize(program).call(images)` takes float32 (n, height, width) for any n, pixels as on disk, and
    returns the probabilities, float32 (n, classes).
    """
    import jax
    import jax.numpy as jnp
    from jax import export

    from gravlens_jax.inference import logits

    model, variables = network
    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *network.image_shape), jnp.float32)

    def predict(images):
        return jax.nn.softmax(logits(model, variables, images))

    return bytes(export.export(jax.jit(predict), platforms=("cpu", "cuda", "tpu"))(images).serialize())


def export_network(run: str | Path, out: Path, checkpoint: Checkpoint = "best") -> dict[str, Any]:
    """Writes a network to a file, atomically, in the format of its suffix; returns the description stored in it.

    Args:
      run, checkpoint: as in `load_network`.
      out: .npz and .safetensors hold the arrays of `named_arrays` and the description, .stablehlo the whole prediction.
        An existing file is replaced.

    Raises:
      InputError: another suffix, a package that is not installed, no such folder; as `load_network`.
    """
    check(out.suffix in FORMATS, f"{out}: expected a name that ends in {', '.join(FORMATS)}")
    if package := FORMATS[out.suffix]:
        check_installed(package, out.suffix, '"gravlens_jax[export]"')
    check_folder(out)
    from gravlens_jax.network import describe, load_network, named_arrays, write_network

    network = load_network(run, checkpoint)
    about = describe(network, run)
    if out.suffix == ".npz":
        write_network(out, network, about)
        return about
    if out.suffix == ".stablehlo":
        data = export_program(network)
    else:
        from safetensors.numpy import save

        data = save(named_arrays(network), {"about": json.dumps(about)})
    write_atomically(out, data)
    return about


def main(
    run: cli.Run,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    checkpoint: Checkpoint = "best",
) -> None:
    """Writes a trained network to one file.

    examples:
      python scripts/export.py runs/default mine.npz
      python scripts/export.py pretrained predict.stablehlo

    Args:
        out: .npz, which evaluate.py and predict.py accept in place of a run; .safetensors, the same arrays for other
            programs; or .stablehlo, the whole prediction, which runs by jax.export.deserialize without this package,
            in the version of JAX that wrote it and those of the next six months.
        checkpoint: the epoch of lowest validation loss, or the last one.
    """
    from jax import __version__

    about = export_network(run, out, checkpoint)
    print(f"{out}: {out.stat().st_size / 2**20:.2f} MiB, classes {', '.join(about['classes'])}")
    if out.suffix == ".stablehlo":
        print(f"It loads in JAX {__version__} and in versions of the next six months; export it again for others.")


if __name__ == "__main__":
    cli.run_function(main)
