"""Evaluates a network on labelled images."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gravlens_jax import cli
from gravlens_jax.errors import check
from gravlens_jax.folders import load_labelled
from gravlens_jax.report import evaluate_network, table
from gravlens_jax.run_dir import read_history
from gravlens_jax.weights import load_network


def main(
    run: cli.Source,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    checkpoint: Literal["best", "final"] = "best",
    out: Path | None = None,
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    classes: str | None = None,
) -> None:
    """Evaluates a network on labelled images: metrics.json, predictions.npz and figures.

    examples:
      python scripts/evaluate.py runs/default packed/test.npz
      python scripts/evaluate.py pretrained dataset/val --tta --out real
      python scripts/evaluate.py pretrained theirs --classes no=no_sub,sphere=cdm,vort=axion

    Args:
        data: .npz made by pack.py or simulate.py, or a folder with one folder of images for each class.
        checkpoint: the epoch of lowest validation loss, or the last one.
        out: folder for the report, by default RUN/report or, for a file, RUN-report; existing files are replaced.
        tta: average the logits over each image and its three mirror images.
        classes: name in the network = name in DATA, for each class; needed only where they differ.
    """
    out = out or (run / "report" if run.is_dir() else Path(f"{run.stem}-report"))
    network = load_network(run, checkpoint)
    own = network.model.classes
    names = cli.parse_classes(classes) if classes else dict(zip(own, own, strict=True))
    expected = f"--classes {classes}: expected a name in the data for each of the network's {', '.join(own)}, as in"
    check(names.keys() == set(own), f"{expected} {own[0]}=theirs")
    dataset = load_labelled(data, {name: names[name] for name in own})
    values = evaluate_network(
        network, dataset, checkpoint=checkpoint, out=out, tta=tta, history=read_history(run) if run.is_dir() else ()
    )
    print(table(values, out))


if __name__ == "__main__":
    cli.run_function(main)
