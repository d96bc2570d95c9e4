"""Fine-tunes a trained network on images of other classes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gravlens_jax import cli
from gravlens_jax.config import Config, OptimConfig
from gravlens_jax.errors import check
from gravlens_jax.files import check_folder
from gravlens_jax.folders import ONE_PLANE, digest, list_classes, load_labelled, show_notices
from gravlens_jax.metrics import check_state, mean_metrics
from gravlens_jax.npz import Dataset, check_pixels

if TYPE_CHECKING:
    from gravlens_jax.network import Network


def finetune(
    network: "Network",
    dataset: Dataset,
    *,
    crop: int | None = None,
    pool: int | None = None,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> "Network":
    """Returns a network for the classes of a data set, trained from the parameters of `network` and a new head.

    Args:
      network: from `load_network`; it is not changed.
      dataset: labelled images that suit the network's input: the same pixel scale, for example.
      crop, pool: of the new network's input, see `InputConfig`; by default the old one's.
      epochs: passes over the images.
      learning_rate: peak; see `OptimConfig`.
      batch_size: images per step; all of them, if there are fewer.
      seed: of the head, the order and the flips.
      show: is called with a line of text after each epoch.

    Raises:
      InputError: images smaller than the crop, NaN or infinite pixels, fewer than two classes, or a bad option.
      FloatingPointError: a parameter is not finite, or the network no longer learns (no gradient).
    """
    from gravlens_jax.datasets import find_priors
    from gravlens_jax.loader import FileData
    from gravlens_jax.network import Network, calibrate, calibrated
    from gravlens_jax.preprocess import check_images
    from gravlens_jax.sharding import data_mesh

    given: dict[str, Any] = {name: x for name, x in (("crop", crop), ("pool", pool)) if x is not None}
    priors = find_priors(dataset)
    scale = priors.pixel_scale if priors else None
    new_input = replace(network.model.input, **given)
    model = network.model.clone(classes=dataset.classes, input=new_input, pixel_scale=scale)
    check(epochs >= 1 and batch_size >= 1, f"epochs={epochs}, batch_size={batch_size}: both must be at least 1")
    check(len(dataset.classes) > 1, f"only one class, {', '.join(dataset.classes)}; at least two are needed")
    check_images((dataset.size, *dataset.image_shape), model.input)
    check_pixels(dataset.images)
    batch_size = min(batch_size, dataset.size)
    steps, mesh = dataset.size // batch_size, data_mesh(1)
    config = OptimConfig(learning_rate=learning_rate, warmup_steps=min(steps, epochs * steps // 5))
    state, step_fn, zero_fn = _compile(network, model, config, epochs * steps, seed, mesh)
    data = FileData(dataset, batch_size, seed, mesh)
    for epoch in range(epochs):
        state = state._replace(sums=zero_fn())
        for _, batch in data.batches(epoch):
            state, _ = step_fn(state, batch)
        check_state(state)
        loss, accuracy = mean_metrics(state.sums)
        show(f"epoch {epoch + 1}/{epochs}: train loss {loss:.3f} acc {accuracy:.3f}")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # Not the temperature: the network was trained on these images. Of others, 1.2 % had an outlier score above 1.
    _, added = calibrate(model, variables, dataset)
    return Network(model, calibrated(variables, 1.0, added), dataset.image_shape)


def _compile(network: "Network", model: Any, config: OptimConfig, steps: int, seed: int, mesh: Any) -> tuple:
    """Returns the state before the first step, with the network's parameters, and the jitted step and `zero_sums`."""
    import jax
    import jax.numpy as jnp

    from gravlens_jax.optim import make_optimizer
    from gravlens_jax.sharding import replicated
    from gravlens_jax.train_step import init_state, train_step, zero_sums

    tx, jit = make_optimizer(config, steps), partial(jax.jit, out_shardings=replicated(mesh))
    state = jit(partial(init_state, model=model, tx=tx, config=config))(seed)
    # The running statistics forget those of the old images, also in few steps.
    model = model.clone(momentum=max(0, min(0.97, 1 - 5 / steps)))
    step = partial(train_step, model=model, tx=tx, config=Config(seed=seed))
    # Copies, because the first step donates the state.
    old = jax.device_put(jax.tree.map(jnp.copy, network.variables), replicated(mesh))
    state = state._replace(params={**old["params"], "head": state.params["head"]}, batch_stats=old["batch_stats"])
    return state, jit(step, donate_argnums=0), jit(zero_sums)


def main(
    run: cli.Run,
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    classes: str | None = None,
    crop: Annotated[int | None, tyro.conf.arg(name="input.crop")] = None,
    pool: Annotated[int | None, tyro.conf.arg(name="input.pool")] = None,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    planes: cli.PlaneOptions = ONE_PLANE,
) -> None:
    """Trains a network further, with a new head, on images of your own classes; RUN itself is not changed.

    examples:
      python scripts/finetune.py pretrained my_images mine.npz --classes cdm,axion
      python scripts/finetune.py pretrained small_images mine.npz --input.crop 64 --input.pool 1

    Args:
        data: .npz, or a folder with one folder of images for each class. All are used for training: keep others for
            evaluate.py. Probabilities are not calibrated.
        out: .npz to write, which evaluate.py, predict.py and export.py accept in place of a run.
        classes: names, separated by commas, in the order of the network's outputs; by default those of DATA. Give
            name=name in DATA where they are to differ.
        crop: central pixels kept, height and width; by default as in RUN.
        pool: side of the pixel blocks that are averaged; by default as in RUN.
        epochs: passes over the images.
        learning_rate: peak; half of train.py's.
        batch_size: images per step.
        seed: of the new head, the order and the flips.
    """
    cli.set_environment()
    from gravlens_jax.network import describe, load_network, write_network

    check(out.suffix == ".npz", f"{out}: expected a name that ends in .npz; export.py writes other formats")
    check_folder(out)
    cli.use_compile_cache()
    network = load_network(run)
    found = list_classes(data)
    names = cli.parse_classes(classes) if classes else dict(zip(found, found, strict=True))
    chosen = tuple(names.values())
    right = set(chosen) <= set(found) if data.is_dir() else not found or sorted(chosen) == sorted(found)
    check(right, f"--classes {classes}: {data} has the classes {', '.join(found)}; expected these names")
    dataset = load_labelled(data, names, chosen, planes)
    show_notices(
        {"train": ([digest(dataset.images[row]) for row in range(dataset.size)], dataset.labels)}, dataset.classes
    )
    options: dict[str, Any] = {"crop": crop, "pool": pool, "epochs": epochs, "learning_rate": learning_rate}
    options |= {"batch_size": batch_size, "seed": seed}
    network = finetune(network, dataset, **options)
    write_network(out, network, describe(network) | {"finetuned": {"run": run.name, "data": data.name, **options}})
    print(f"{out}: classes {', '.join(network.model.classes)}")


if __name__ == "__main__":
    cli.run_function(main)
