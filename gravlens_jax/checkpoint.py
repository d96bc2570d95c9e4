"""The checkpoints of a run, saved by Orbax: the latest state, and the epoch of lowest validation loss (`best`).

Each has the items `variables` (all that prediction needs) and `training` (the rest of the state).
Orbax writes a checkpoint under a temporary name and renames it. It does not notice a changed byte in the file that
holds the arrays, so the SHA-256 of every file is kept in digests.json and checked before Orbax reads them. A checkpoint
to be deleted is renamed first, so that it is either complete or absent.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gravlens_jax.config import Checkpoint
from gravlens_jax.errors import InputError, check
from gravlens_jax.files import catch_write_errors, verify_digests, write_digests
from gravlens_jax.model import ResNet, variable_shapes
from gravlens_jax.train_step import TrainState

REMOVED = "removed"  # folder beside the steps, for those that are being removed
VAL_LOSS = itemgetter("val_loss")  # of the metrics of a checkpoint


def open_checkpoints(run_dir: Path) -> ocp.CheckpointManager:
    """Returns the manager of a run's checkpoints; use it in a `with` statement."""
    folder = run_dir / "checkpoints"
    for step in folder.glob("[0-9]*"):
        with _catch_damage(step):
            verify_digests(step, "metrics/")  # Orbax reads these of all checkpoints at once
    best = BestN(get_metric_fn=VAL_LOSS, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
        best_fn=VAL_LOSS,
        best_mode="min",
        enable_async_checkpointing=False,  # the files are small, and an error is raised where it happens
        todelete_subdir=REMOVED,
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "training")}
    with catch_write_errors(folder):
        return ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes what a killed process left half written or half removed; only for the process that locked the run."""
    folder = run_dir / "checkpoints"
    for left in (*folder.glob("*.orbax-checkpoint-tmp*"), folder / REMOVED):
        shutil.rmtree(left, ignore_errors=True)


def save(manager: ocp.CheckpointManager, state: TrainState, val_loss: float | None = None) -> None:
    """Saves the state, a candidate for `best` if it has a (finite) `val_loss`; InputError if the disk is full."""
    _save(manager, int(state.step), _items(state), None if val_loss is None else {"val_loss": float(val_loss)})


def save_variables(run_dir: Path, variables: Any) -> None:
    """Saves a network that was trained elsewhere as the only checkpoint, step 0, of a run."""
    with open_checkpoints(run_dir) as manager:
        _save(manager, 0, {"variables": variables}, None)


def restore_latest(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """Returns the latest saved state, with the shapes and shardings of `like`; `like` itself if none was saved."""
    if (step := manager.latest_step()) is None:
        return like
    items = _restore(manager, step, _items(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    return TrainState(**items["variables"], **items["training"])


def load_variables(run_dir: Path, model: ResNet, which: Checkpoint = "best") -> tuple[Any, int]:
    """Returns the variables of a run's network on one device, {"params", "batch_stats"}, and their step.

    They are of the "best" (lowest validation loss) or the "final" (latest) checkpoint; InputError if there is none yet,
    or if it is damaged or of another network than `model`.
    """
    check(which in ("best", "final"), f"checkpoint={which!r}: expected best or final")
    try:
        return _load_variables(run_dir, model, which)
    except InputError:  # perhaps training has replaced the checkpoint while it was read
        return _load_variables(run_dir, model, which)


def _load_variables(run_dir: Path, model: ResNet, which: Checkpoint) -> tuple[Any, int]:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), variable_shapes(model))
    with open_checkpoints(run_dir) as manager:
        step = manager.best_step() if which == "best" else None
        step = manager.latest_step() if step is None else step
        check(step is not None, f"{run_dir} has no checkpoint yet; one is written at the end of each epoch")
        return _restore(manager, step, {"variables": abstract})["variables"], step


def _items(state: TrainState) -> dict[str, Any]:
    training = state._asdict()
    return {"variables": {name: training.pop(name) for name in ("params", "batch_stats")}, "training": training}


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, Any], metrics: Any) -> None:
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    folder = Path(manager.directory) / str(step)
    try:
        manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
        if jax.process_index() == 0:
            write_digests(folder)
            remove_leftovers(folder.parents[1])
    except (OSError, ValueError) as error:  # ValueError: of tensorstore, which writes the arrays
        if jax.process_count() > 1 and isinstance(error, ValueError):  # or of a lost connection
            raise
        remove_leftovers(folder.parents[1])  # on a full disk, makes room for others
        code = re.search(r"(?:os_error_code='|\[Errno )(\d+)", f"{error.__cause__} {error}")
        with catch_write_errors(folder):
            raise OSError(os.strerror(int(code[1])) if code else " ".join(str(error).split())[:200]) from error


def _restore(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    folder = Path(manager.directory) / str(step)
    with _catch_damage(folder):
        verify_digests(folder)
        found, expected = (_describe(tree) for tree in (dict(manager.item_metadata(step)), abstract))
    # Compared here, since Orbax casts another dtype silently and reports another shape in a page of text.
    for name in sorted(expected.keys() | {name for name in found if name.partition("/")[0] in abstract}):
        differs = f"{folder}: {name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        advice = "it is not of the network and optimizer in config.json, or of another version; start a new run"
        check(found.get(name) == expected.get(name), f"{differs}: {advice}")
    with _catch_damage(folder):
        args = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        return dict(manager.restore(step, args=ocp.args.Composite(**args)))


def _describe(tree: Any) -> dict[str, tuple]:
    """Returns path -> (shape, dtype) of the arrays in a tree; names of fields, keys and positions look alike."""
    arrays = ((path, x) for path, x in jax.tree.leaves_with_path(tree) if hasattr(x, "dtype"))
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for path, x in arrays}


@contextmanager
def _catch_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        others = [other.name for other in folder.parent.iterdir() if other.name.isdecimal() and other != folder]
        advice = f"Remove it to continue from step {' or '.join(others)}" if others else "There is no other one"
        raise InputError(f"{folder} is damaged: {' '.join(str(error).split())[:300]}. {advice}") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}; fix the permissions or the disk, and try again") from error
