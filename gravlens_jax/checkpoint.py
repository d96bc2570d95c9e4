"""A run on disk: its config, and its checkpoints by Orbax. The only module that imports orbax.

    runs/<name>/config.json              what the run is; written before the first step
    runs/<name>/checkpoints/<step>/      the last epoch (`final`) and the epoch of lowest validation loss (`best`)

A checkpoint has two items: `variables` (parameters and batch statistics: all that prediction needs) and `training`
(optimizer, plateau, step: what continuing needs besides). Orbax writes each step under a temporary name and renames it.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gravlens_jax.config import Config, InputError, check, from_dict, parse_json, to_json
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.steps import TrainState

Which = Literal["best", "final"]


class RunInfo(NamedTuple):
    """What config.json holds."""

    config: Config
    classes: tuple[str, ...]
    image_shape: tuple[int, int]  # height and width of the images it was trained on


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def check_unused(run_dir: Path) -> None:
    """Raises InputError if the directory holds a run already."""
    check(
        not (run_dir / "config.json").exists(),
        f"{run_dir} already holds a run; continue it with --resume, or give the new run another --run-dir",
    )


def create_run(run_dir: Path, info: RunInfo) -> None:
    """Makes the run directory and its config.json; a directory that holds a run is refused."""
    check_unused(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    values = {
        "config": json.loads(to_json(info.config)),
        "classes": list(info.classes),
        "image_shape": list(info.image_shape),
    }
    write_atomically(run_dir / "config.json", json.dumps(values, indent=2) + "\n")


def read_run(run_dir: Path) -> RunInfo:
    """Reads config.json of a run directory."""
    path = Path(run_dir) / "config.json"
    check(path.is_file(), f"{run_dir} is not a run (no config.json); expected a directory made by scripts/train.py")
    return from_dict(RunInfo, parse_json(path.read_bytes(), str(path)), str(path))


def open_checkpoints(run_dir: Path) -> ocp.CheckpointManager:
    """Returns the manager of a run's checkpoints; use it in a `with` statement."""
    keep = [LatestN(1), BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=lambda metrics: metrics["val_loss"],
        best_mode="min",
        enable_async_checkpointing=False,  # the files are small, and an error is raised where it happens
    )
    return _manager(run_dir, options)


def _manager(run_dir: Path, options: ocp.CheckpointManagerOptions | None = None) -> ocp.CheckpointManager:
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "training")}
    folder = Path(run_dir).resolve() / "checkpoints"  # Orbax wants an absolute path
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _items(state: TrainState) -> dict[str, Any]:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {"variables": variables, "training": (state.step, state.opt_state, state.plateau)}


def save_state(manager: ocp.CheckpointManager, state: TrainState, val_loss: float) -> None:
    """Saves the state after an epoch; `val_loss` (finite) decides whether it stays as `best`."""
    items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
    manager.save(int(state.step), args=ocp.args.Composite(**items), metrics={"val_loss": float(val_loss)})


def restore_state(manager: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
    """Returns the last saved state with the shapes and shardings of `like`, or None if nothing was saved."""
    if manager.latest_step() is None:
        return None
    items = _restore(manager, manager.latest_step(), _items(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    step, opt_state, plateau = items["training"]
    return TrainState(step, items["variables"]["params"], items["variables"]["batch_stats"], opt_state, plateau)


def _restore(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    args = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
    try:
        # Compared here, since Orbax casts another dtype silently and tells of another shape in a page of text.
        stored = manager.item_metadata(step)["variables"]
        found, expected = (
            {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree)}
            for tree in (dict(stored), abstract["variables"])
        )
        differing = sorted(dict(found.items() ^ expected.items()))
        if differing:
            name = differing[0]
            raise ValueError(f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}")
        return manager.restore(step, args=ocp.args.Composite(**args))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{manager.directory / str(step)} is damaged, or not of the network that config.json describes: {reason}"
        ) from error


def save_variables(run_dir: Path, variables: Any) -> None:
    """Saves a network that was trained elsewhere as the only checkpoint, step 0, of a run."""
    with _manager(run_dir) as manager:
        manager.save(0, args=ocp.args.Composite(variables=ocp.args.StandardSave(variables)))


def load_run(run_dir: str | Path, checkpoint: Which = "best") -> tuple[ResNet, Any]:
    """Returns the network of a run and its variables, ready for `predict`.

    Args:
      run_dir: a directory made by scripts/train.py or scripts/import_torch.py.
      checkpoint: "best" (lowest validation loss) or "final" (last epoch).

    Returns:
      model, variables = {"params", "batch_stats"}. `model.classes` names the columns of what `predict` returns.

    Raises:
      InputError: not a run, no checkpoint yet, or one of another network.
    """
    check(checkpoint in ("best", "final"), f"checkpoint={checkpoint!r}: expected best or final")
    info = read_run(Path(run_dir))
    model = make_model(info.config.model, info.config.input, info.classes)
    size = model.input.crop // model.input.pool
    abstract = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    with open_checkpoints(Path(run_dir)) as manager:
        step = manager.best_step() if checkpoint == "best" else None
        step = manager.latest_step() if step is None else step
        check(step is not None, f"{run_dir} has no checkpoint yet; one is written at the end of each epoch")
        return model, _restore(manager, step, {"variables": abstract})["variables"]
