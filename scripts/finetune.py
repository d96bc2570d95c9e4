"""Teaches a trained network other classes."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from gravlens_jax import cli
from gravlens_jax.evaluate import load_labelled
from gravlens_jax.finetune import finetune
from gravlens_jax.folders import list_classes
from gravlens_jax.npz import open_npz
from gravlens_jax.weights import check_output, describe, load_network, write_network


def main(
    run: cli.Source,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    classes: str | None = None,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
) -> None:
    """Trains a network further, with a new head, on images of your own classes; RUN itself stays as it is.

    example:
      python scripts/finetune.py pretrained my_images mine.npz --classes cdm,axion

    Args:
        data: .npz made by pack.py, or a folder with one folder of .npy images for each class.
        out: .npz to write, which evaluate.py and predict.py accept in place of a run (or another of export.py's files).
        classes: names, separated by commas, in the order that the network shall have; those of DATA if not given.
        epochs: passes over the images.
        learning_rate: peak; half of train.py's.
        batch_size: images per step.
        seed: of the new head, the order and the flips.
    """
    check_output(out)
    names = list_classes(data) if data.is_dir() else open_npz(data).classes
    dataset = load_labelled(data, cli.split_names(classes) if classes else names)
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    network = finetune(load_network(run), dataset, **options)
    write_network(out, network, describe(network) | {"finetuned": {"run": str(run), "data": str(data), **options}})
    print(f"{out}: classes {', '.join(network.model.classes)}")


if __name__ == "__main__":
    cli.run_function(main)
