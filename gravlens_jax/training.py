"""Training from the config to the report: one flat loop over the batches of a run, with validation after each epoch."""

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gravlens_jax import checkpoint
from gravlens_jax import run_dir as files
from gravlens_jax.config import Config
from gravlens_jax.console import Meter, Stopped, recorded_signals
from gravlens_jax.datasets import Splits, open_splits
from gravlens_jax.errors import check
from gravlens_jax.loader import Plan, eval_batches, train_batches
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import learning_rate_schedule, make_optimizer
from gravlens_jax.report import evaluate_network
from gravlens_jax.sharding import agree, check_batch_size, data_mesh, is_main, replicate, replicated, wait_for_all
from gravlens_jax.train_step import (
    TrainState,
    check_alive,
    check_finite,
    end_epoch,
    eval_step,
    init_state,
    mean_metrics,
    train_steps,
)
from gravlens_jax.weights import Network, calibrate, calibrated

AGREE_EVERY = 16  # calls of `train_fn`, after which several processes agree whether to save or stop
OnEpoch = Callable[[dict[str, Any]], None]


def fit(
    config: Config, resume: bool = False, save_minutes: float = 10.0, on_epoch: OnEpoch = lambda line: None
) -> dict[str, Any]:
    """Trains, saves and evaluates a run; returns the metrics of its best checkpoint on the test split.

    Args:
      config: the run. Its directory must be new, or with `resume` hold a run of the same config: only the place of
        the data and, if the learning rate is constant, the number of epochs may have changed.
      resume: continue from the last save.
      save_minutes: time between saves within an epoch; 0 for none. The end of an epoch is always saved.
      on_epoch: called with each line of metrics.jsonl when its epoch is saved, or at the start if it was saved before.

    Raises:
      InputError: an error in the config, the data or the run directory, or another process has locked the run.
      FloatingPointError: the loss or a parameter is not finite; earlier checkpoints are intact.
      Stopped: SIGINT or SIGTERM was received; the state after the current step is saved.
    """
    config = config.resolve()
    run_dir, main = Path(config.run_dir), is_main()
    if resume:
        files.check_resumable(run_dir, config)
    elif main:
        files.check_unused(run_dir)
    check(save_minutes >= 0, f"save_minutes={save_minutes}: expected a number >= 0")
    mesh = data_mesh()
    check_batch_size(config.batch_size, mesh)
    splits = open_splits(config, mesh)
    plan = _make_plan(config, splits)
    info = files.RunInfo(config, splits.val.classes, splits.val.image_shape, splits.record)
    if resume:
        files.check_same_images(run_dir, info)
    model = make_model(config.model, config.input, info.classes)
    with files.locked(run_dir) if main else nullcontext():
        if main:
            (files.update_run if resume else files.create_run)(run_dir, info)
        state, best_step = _train(config, model, splits, plan, mesh, save_minutes, on_epoch)
        final = {"params": state.params, "batch_stats": state.batch_stats}
        variables = {int(state.step): jax.tree.map(np.asarray, final)}
        if best_step not in variables:
            variables[best_step], _ = checkpoint.load_variables(run_dir, model, "best")
        calibrations = {step: calibrate(model, own, splits.val) for step, own in variables.items()}
        if main:
            files.write_calibration(run_dir, calibrations)
        temperature, population = calibrations[best_step]
        best = calibrated(variables[best_step], temperature, population)
        network = Network(model, best, info.image_shape, temperature)
        out = run_dir / "report" if main else None
        return evaluate_network(network, splits.test, out=out, history=files.read_history(run_dir))


def _make_plan(config: Config, splits: Splits) -> Plan:
    """Returns the steps of the run; InputError if more of them are done already."""
    easy = splits.easy.size if splits.easy else 0
    plan = Plan(easy // config.batch_size, splits.train.size // config.batch_size, config.epochs)
    step = files.saved_step(Path(config.run_dir)) or 0
    least = -(-(step - plan.easy_steps) // plan.steps_per_epoch)
    check(least <= config.epochs, f"--epochs is {config.epochs} but step {step} is done; give at least {least}")
    return plan


def _train(
    config: Config, model: ResNet, splits: Splits, plan: Plan, mesh: Mesh, save_minutes: float, on_epoch: OnEpoch
) -> tuple[TrainState, int]:
    """Trains from the last save to the end of the run; returns the final state and the step of the best checkpoint."""
    run_dir, batch_size = Path(config.run_dir), config.batch_size
    tx = make_optimizer(config.optim, plan.total_steps)
    step_fn = partial(train_steps, model=model, tx=tx, config=config)
    jit = partial(jax.jit, out_shardings=replicated(mesh))
    train_fn, eval_fn = jit(step_fn, donate_argnums=0), jit(partial(eval_step, model=model))
    end_epoch_fn = jit(partial(end_epoch, config=config.optim))
    init = partial(init_state, model=model, tx=tx, config=config.optim, auxiliary=splits.has_deflections)
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None  # 1 s, not 4 to 12
    init_fn = jax.jit(init, compiler_options=quick)
    state = replicate(init_fn(config.seed), mesh)
    if is_main():
        checkpoint.remove_leftovers(run_dir)
    wait_for_all("the run directory exists")
    agree_every = 1 if jax.process_count() == 1 else AGREE_EVERY

    with checkpoint.open_checkpoints(run_dir) as manager, recorded_signals() as received, Meter(plan) as meter:
        state = checkpoint.restore_latest(manager, state)
        history = _resume_history(run_dir, plan, int(state.step), on_epoch)
        learns = " with the auxiliary loss" if splits.has_deflections else ""
        meter.start(f"{run_dir}: {len(history)} of {config.epochs} epochs done{learns}", state)
        last_save = time.monotonic()
        for calls, (step, batch) in enumerate(train_batches(splits.train, splits.easy, plan, int(state.step))):
            state, sums = train_fn(state, batch)
            meter.update(step, sums)
            ends_epoch, request = plan.ends_epoch(step), 0
            if ends_epoch or calls % agree_every == 0:
                late = save_minutes > 0 and time.monotonic() - last_save > 60 * save_minutes
                request = agree(received() or int(late))  # the number of a signal, or 1 to save
            if not ends_epoch and not request:
                continue
            check_alive(state)
            line, val_loss = meter.read(), None
            if ends_epoch and step > plan.easy_steps:
                line |= _validate(eval_fn, state, splits.val, batch_size, mesh)
                val_loss = line["val_loss"]
                line["learning_rate"] = _mean_learning_rate(config, plan, step) * float(state.plateau.scale)
                line["wall_seconds"] = meter.seconds()
                history.append(line)
                if is_main():  # before the checkpoint: if it is never saved, resuming removes the line
                    files.write_history(run_dir, history)
            if ends_epoch:
                state = end_epoch_fn(state, val_loss)
            checkpoint.save(manager, state, val_loss)
            last_save = time.monotonic()
            if ends_epoch:
                meter.end_epoch(line)
            if val_loss is not None and is_main():
                on_epoch(line)
            if request > 1 and step < plan.total_steps:
                message = f"stopped after step {step} of {plan.total_steps}, which is saved; continue with --resume"
                raise Stopped(f"{run_dir}: {signal.Signals(request).name}: {message}", request)
        best_step = manager.best_step()
    assert best_step is not None  # every epoch ends with a save
    return state, best_step


def _resume_history(run_dir: Path, plan: Plan, step: int, on_epoch: OnEpoch) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl that belong to saved epochs, and removes the others."""
    history = files.read_history(run_dir, max(0, plan.epoch_after(step)))
    if is_main():
        files.write_history(run_dir, history)
        for line in history:
            on_epoch(line)
    return history


def _validate(eval_fn: Callable, state: TrainState, dataset: Dataset, batch_size: int, mesh: Mesh) -> dict[str, float]:
    """Returns val_loss and val_accuracy; FloatingPointError if the loss is not finite."""
    totals = dict.fromkeys(("loss", "correct", "count"), 0.0)
    for batch in eval_batches(dataset, batch_size, mesh):
        for name, value in eval_fn(state, batch).items():
            totals[name] += float(value)
    loss, accuracy = mean_metrics(totals)
    check_finite(loss, "validation loss", int(state.step))
    return {"val_loss": loss, "val_accuracy": accuracy}


def _mean_learning_rate(config: Config, plan: Plan, step: int) -> float:
    """Returns the mean over the epoch that ends with `step`, before the plateau reduction."""
    schedule = learning_rate_schedule(config.optim, plan.total_steps)
    return float(jax.vmap(schedule)(jnp.arange(step - plan.steps_per_epoch, step)).mean())
