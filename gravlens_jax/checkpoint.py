"""The networks of a run on disk, by Orbax.

    runs/<name>/checkpoints/<step>/      the last epoch (`final`) and the epoch of lowest validation loss (`best`)
    runs/<name>/partial/<step>/          the last save within an epoch, until the epoch ends

A checkpoint has three items: `variables` (parameters and batch statistics: all that prediction needs), `training`
(optimizer, plateau, step: what continuing needs besides) and `sums` (metrics of an unfinished epoch). Orbax writes each
step under a temporary name and renames it. digests.json, written into it then, tells damaged files before Orbax reads
them. What is to be removed is renamed first, so that a checkpoint is whole or not there.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gravlens_jax.config import InputError, check, parse_json
from gravlens_jax.files import write_atomically, writing
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.run import read_run
from gravlens_jax.steps import TrainState

Which = Literal["best", "final"]
DIGESTS = "digests.json"
REMOVED = "removed"  # folder beside the steps, for those that are being removed


def open_checkpoints(run_dir: Path) -> ocp.CheckpointManager:
    """Returns the manager of a run's checkpoints; use it in a `with` statement."""
    for folder in (run_dir / "checkpoints").glob("[0-9]*"):
        _verify(folder, "metrics/")  # which Orbax reads at once, of all checkpoints
    keep = [LatestN(1), BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1)]
    return _manager(
        run_dir / "checkpoints",
        preservation_policy=AnyPreservationPolicy(keep),
        best_fn=lambda metrics: metrics["val_loss"],
        best_mode="min",
    )


def open_partial(run_dir: Path) -> ocp.CheckpointManager:
    """Returns the manager of what is saved within an epoch; use it in a `with` statement."""
    return _manager(run_dir / "partial", max_to_keep=1)


def sweep(run_dir: Path) -> None:
    """Removes what a killed process has left half written or half removed; only for the process that holds the run."""
    for folder in (run_dir / "checkpoints", run_dir / "partial"):
        _sweep(folder)


def _sweep(folder: Path) -> None:
    for left in (*folder.glob("*.orbax-checkpoint-tmp*"), folder / REMOVED):
        shutil.rmtree(left, ignore_errors=True)


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "training")}
    # Not asynchronous: the files are small, and an error is raised where it happens.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, todelete_subdir=REMOVED, **options)
    with writing(folder):
        return ocp.CheckpointManager(
            folder.resolve(), options=options, item_handlers=handlers | {"sums": ocp.JsonCheckpointHandler()}
        )


def _items(state: TrainState) -> dict[str, Any]:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {"variables": variables, "training": (state.step, state.opt_state, state.plateau)}


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != DIGESTS)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _verify(folder: Path, part: str = "") -> None:
    """Raises InputError if a file, or one of those whose names begin with `part`, is not what it was when saved."""
    path = folder / DIGESTS
    if not path.exists():  # killed right after Orbax had renamed it
        return
    try:
        saved, found = json.loads(path.read_text()), _digests(folder)
        differing = [name for name in saved if name.startswith(part) and found.get(name) != saved[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{DIGESTS}: {error}") from error
    if differing:
        raise _damaged(folder, f"{differing[0]} is {'not what was saved' if differing[0] in found else 'missing'}")


def _damaged(folder: Path, reason: str) -> InputError:
    others = [other.name for other in folder.parent.iterdir() if other.name.isdecimal() and other != folder]
    advice = f"Remove it to go on from step {' or '.join(others)}" if others else "There is no other one beside it"
    return InputError(f"{folder} is damaged, or not of the network that config.json describes: {reason}. {advice}")


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, Any], sums: dict, metrics: Any = None) -> None:
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    folder = Path(manager.directory) / str(step)
    try:
        manager.save(step, args=ocp.args.Composite(**args, sums=ocp.args.JsonSave(sums)), metrics=metrics)
        if jax.process_index() == 0:
            write_atomically(folder / DIGESTS, json.dumps(_digests(folder)))
            _sweep(folder.parent)
    except (OSError, ValueError) as error:  # ValueError: of tensorstore, which writes the arrays
        if jax.process_count() > 1 and isinstance(error, ValueError):  # or of a lost connection
            raise
        _sweep(folder.parent)  # on a full disk, room for others
        code = re.search(r"(?:os_error_code='|\[Errno )(\d+)", str(error))
        with writing(folder):
            raise OSError(os.strerror(int(code[1])) if code else " ".join(str(error).split())[:200]) from error


def save_state(manager: ocp.CheckpointManager, state: TrainState, val_loss: float) -> None:
    """Saves the state after an epoch; `val_loss` (finite) decides whether it stays as `best`."""
    _save(manager, int(state.step), _items(state), {}, {"val_loss": float(val_loss)})


def save_partial(manager: ocp.CheckpointManager, state: TrainState, sums: dict[str, float]) -> None:
    """Saves the state within an epoch, and the sums of the epoch's metrics so far, in the place of the one before.

    Raises:
      FloatingPointError: a parameter is not finite.
    """
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(state.params)):
        raise FloatingPointError(f"a parameter is not finite at step {int(state.step)}; the checkpoints are intact")
    if int(state.step) not in manager.all_steps():
        _save(manager, int(state.step), _items(state), sums)


def drop_partial(manager: ocp.CheckpointManager) -> None:
    """Removes what was saved within an epoch."""
    for step in manager.all_steps():
        manager.delete(step)
    if jax.process_index() == 0:
        _sweep(Path(manager.directory))


def restore_state(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Returns the state saved at `step`, with the shapes and shardings of `like`, and its sums."""
    items = _restore(manager, step, _items(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    at, opt_state, plateau = items["training"]
    variables = items["variables"]
    return TrainState(at, variables["params"], variables["batch_stats"], opt_state, plateau), items["sums"]


def _restore(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    args = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
    folder = Path(manager.directory) / str(step)
    _verify(folder)
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
        return dict(manager.restore(step, args=ocp.args.Composite(**args, sums=ocp.args.JsonRestore())))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(folder, " ".join(str(error).split())[:300]) from error


def save_variables(run_dir: Path, variables: Any) -> None:
    """Saves a network that was trained elsewhere as the only checkpoint, step 0, of a run."""
    with _manager(run_dir / "checkpoints") as manager:
        _save(manager, 0, {"variables": variables}, {})


def load_checkpoint(run_dir: Path, checkpoint: Which = "best") -> tuple[ResNet, Any, int]:
    """Returns the network of a run, its variables as they were saved, and their step; otherwise as `load_run`."""
    check(checkpoint in ("best", "final"), f"checkpoint={checkpoint!r}: expected best or final")
    info = read_run(run_dir)
    model = make_model(info.config.model, info.config.input, info.classes)
    size = model.input.crop // model.input.pool
    image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    with open_checkpoints(run_dir) as manager:
        step = manager.best_step() if checkpoint == "best" else None
        step = manager.latest_step() if step is None else step
        check(step is not None, f"{run_dir} has no checkpoint yet; one is written at the end of each epoch")
        return model, _restore(manager, step, {"variables": abstract})["variables"], step


def save_temperatures(run_dir: Path, temperatures: dict[int, float]) -> None:
    """Writes the temperature of each step's network, by which `load_run` divides its logits."""
    with writing(run_dir):
        write_atomically(run_dir / "calibration.json", json.dumps(temperatures) + "\n")


def _read_temperature(run_dir: Path, step: int) -> float:
    """Returns the temperature of a step's network: 1 if none was fitted."""
    path = run_dir / "calibration.json"
    if not path.exists():
        return 1.0
    values = parse_json(path.read_bytes(), str(path))
    temperature = values.get(str(step), 1.0) if isinstance(values, dict) else None
    if isinstance(temperature, float) and 0 < temperature < 1e3:
        return temperature
    raise InputError(f"{path} is damaged: expected the temperature of each step; remove it")


def load_run(run_dir: str | Path, checkpoint: Which = "best") -> tuple[ResNet, Any]:
    """Returns the network of a run and its variables, ready for `predict`.

    Its probabilities are calibrated, if the run has been finished: the head is divided by a temperature that was fitted
    on the validation images.

    Args:
      run_dir: a directory made by scripts/train.py or scripts/import_torch.py.
      checkpoint: "best" (lowest validation loss) or "final" (last epoch).

    Returns:
      model, variables = {"params", "batch_stats"}. `model.classes` names the columns of what `predict` returns.

    Raises:
      InputError: not a run, no checkpoint yet, or one of another network.
    """
    return load_calibrated(Path(run_dir), checkpoint)[:2]


def load_calibrated(run_dir: Path, checkpoint: Which = "best") -> tuple[ResNet, Any, float]:
    """Returns what `load_run` does, and the temperature that the head has been divided by."""
    model, variables, step = load_checkpoint(run_dir, checkpoint)
    temperature = _read_temperature(run_dir, step)
    head = jax.tree.map(lambda x: x / temperature, variables["params"]["head"])
    return model, variables | {"params": {**variables["params"], "head": head}}, temperature
