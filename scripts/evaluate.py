"""Evaluates a network on labelled images."""

from pathlib import Path
from typing import Annotated

import tyro

from gravlens_jax import cli
from gravlens_jax.config import Checkpoint
from gravlens_jax.errors import check
from gravlens_jax.folders import ONE_PLANE, load_labelled


def main(
    run: cli.Run,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    checkpoint: Checkpoint = "best",
    out: Path | None = None,
    tta: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    classes: str | None = None,
    planes: cli.PlaneOptions = ONE_PLANE,
) -> None:
    """Evaluates a network on labelled images: metrics.json, predictions.npz and figures.

    examples:
      python scripts/evaluate.py runs/default packed/test.npz
      python scripts/evaluate.py pretrained dataset/val --tta --out report
      python scripts/evaluate.py pretrained Model_I --classes no=no_sub,sphere=cdm,vort=axion

    Args:
        data: .npz, or a folder with one folder of images for each class.
        checkpoint: the epoch of lowest validation loss, or the last one.
        out: folder for the report, by default RUN/report-DATA or, for a file, RUN-report; existing files are replaced.
        tta: average the logits over each image and its three mirror images.
        classes: name in the network = name in DATA, for each class; needed only where they differ, or for an .npz that
            does not name its classes: then in the order of its labels 0, 1, ...
    """
    from gravlens_jax.network import load_network
    from gravlens_jax.report import evaluate_network, table
    from gravlens_jax.run_files import read_history

    out = out or (run / f"report-{data.stem}" if run.is_dir() else Path(f"{run.stem}-report"))
    network = load_network(run, checkpoint)
    known = network.model.classes
    names = cli.parse_classes(classes) if classes else dict(zip(known, known, strict=True))
    expected = f"expected a name in the data for each of the network's {', '.join(known)}, as in {known[0]}=other"
    check(names.keys() == set(known), f"--classes {classes}: {expected}")
    label_names = tuple(names.values()) if classes else ()
    dataset = load_labelled(data, {name: names[name] for name in known}, label_names, planes, network.image_shape)
    values = evaluate_network(
        network, dataset, checkpoint=checkpoint, out=out, tta=tta, history=read_history(run) if run.is_dir() else ()
    )
    print(table(values, out))


if __name__ == "__main__":
    cli.run_function(main)
