"""Training from the config to the report: one flat loop over the batches of a run, with validation after each epoch."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gravlens_jax import checkpoint, run_files, sharding
from gravlens_jax.config import Config
from gravlens_jax.datasets import Splits, open_splits
from gravlens_jax.errors import check
from gravlens_jax.files import locked
from gravlens_jax.loader import Plan, eval_batches, train_batches
from gravlens_jax.metrics import check_finite, check_state, mean_metrics, training_metrics
from gravlens_jax.model import ResNet, make_model
from gravlens_jax.network import calibrate_run, load_network
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import learning_rate_schedule, make_optimizer
from gravlens_jax.progress import SAVE, STOP, Stopped, describe_epoch, describe_step, progress_bar, recorded_signals
from gravlens_jax.report import evaluate_network
from gravlens_jax.train_step import TrainState, end_epoch, eval_step, init_state, train_steps

AGREE_EVERY = 16  # calls of the training step, after which several processes agree whether to save or stop
OnEpoch = Callable[[dict[str, Any]], None]


def fit(
    config: Config, resume: bool = False, save_minutes: float = 10.0, on_epoch: OnEpoch = lambda line: None
) -> dict[str, Any]:
    """Trains, saves and evaluates a run; returns the metrics of its best checkpoint on the test split.

    The directory must be new or, with `resume`, hold a run of the same config, which continues from its last save: only
    the path of the data and, if the learning rate is constant, the number of epochs may have changed.
    `save_minutes` is the time between saves within an epoch, 0 for none; the end of an epoch is always saved.
    `on_epoch` is called with each line of metrics.jsonl when its epoch is saved, or at the start if it was before.

    Raises:
      InputError: an error in the config, the data or the run directory, or another process has locked the run.
      FloatingPointError: the loss or a parameter is not finite; earlier checkpoints are intact.
      Stopped: SIGINT, SIGTERM or SIGHUP was received; the state after the current step is saved.
    """
    config = config.resolve()
    run_dir, main = Path(config.run_dir), sharding.is_main()
    check(save_minutes >= 0, f"save_minutes={save_minutes}: expected a number >= 0")
    if resume:
        run_files.check_resumable(run_dir, config)
    elif main:
        run_files.check_unused(run_dir)
    mesh = sharding.data_mesh()
    sharding.check_batch_size(config.batch_size, mesh)
    splits = open_splits(config, mesh)
    plan = _make_plan(config, splits)
    info = run_files.RunInfo(config, splits.val.classes, splits.val.image_shape, splits.record, splits.pixel_scale)
    if resume:
        run_files.check_same_images(run_dir, info)
    model = make_model(config.model, config.input, info.classes, info.pixel_scale)
    started = _compile(config, model, plan, mesh, splits.has_deflections)
    with locked(run_dir) if main else nullcontext():
        if main:
            (run_files.update_run if resume else run_files.create_run)(run_dir, info)
        _train(config, *started, splits, plan, mesh, save_minutes, on_epoch)
        calibrate_run(run_dir, model, splits.val, write=main)
        sharding.wait_for_all("the calibration is written")
        out, history = run_dir / "report" if main else None, run_files.read_history(run_dir)
        return evaluate_network(load_network(run_dir), splits.test, out=out, history=history)


def _make_plan(config: Config, splits: Splits) -> Plan:
    """Returns the steps of the run; InputError if more of them are done already."""
    easy = splits.easy.size if splits.easy else 0
    plan = Plan(easy // config.batch_size, splits.train.size // config.batch_size, config.epochs)
    step = run_files.saved_step(Path(config.run_dir)) or 0
    least = -(-(step - plan.easy_steps) // plan.steps_per_epoch)
    check(least <= config.epochs, f"--epochs is {config.epochs} but step {step} is done; give at least {least}")
    return plan


def _compile(
    config: Config, model: ResNet, plan: Plan, mesh: Mesh, auxiliary: bool
) -> tuple[TrainState, tuple[Callable, ...]]:
    """Returns the initial state, and the jitted steps and `end_epoch`."""
    tx = make_optimizer(config.optim, plan.total_steps)
    jit = partial(jax.jit, out_shardings=sharding.replicated(mesh))
    train_fn = jit(partial(train_steps, model=model, tx=tx, config=config), donate_argnums=0)
    init = partial(init_state, model=model, tx=tx, config=config.optim, auxiliary=auxiliary)
    # On a CPU this compiles in 1 s instead of 4 to 12.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = jax.jit(init, compiler_options=options)(config.seed)
    functions = train_fn, jit(partial(eval_step, model=model)), jit(partial(end_epoch, config=config.optim))
    return sharding.replicate(state, mesh), functions


def _train(
    config: Config,
    state: TrainState,
    functions: tuple[Callable, ...],
    splits: Splits,
    plan: Plan,
    mesh: Mesh,
    save_minutes: float,
    on_epoch: OnEpoch,
) -> None:
    """Trains from the last save to the end of the run."""
    run_dir, main = Path(config.run_dir), sharding.is_main()
    schedule = learning_rate_schedule(config.optim, plan.total_steps)
    train_fn, eval_fn, end_epoch_fn = functions
    if main:
        checkpoint.remove_leftovers(run_dir)
    sharding.wait_for_all("the run directory exists")
    with checkpoint.open_checkpoints(run_dir) as manager, recorded_signals() as received, progress_bar(main) as bar:
        state = checkpoint.restore_latest(manager, state)
        first, count, previous = int(state.step), int(state.sums["count"]), None
        history = _resume_history(config, plan, first, splits.has_deflections, on_epoch)
        task = bar.add_task("", total=plan.total_steps, completed=first, text="")
        last_save = started = time.perf_counter()
        for calls, (step, batch) in enumerate(train_batches(splits.train, splits.easy, plan, first)):
            state, sums = train_fn(state, batch)
            if previous is not None:  # read one call late, so that the devices never wait for the host
                text = describe_step(training_metrics(*previous, started, count))
                bar.update(task, completed=previous[0], description=plan.name_epoch(step), text=text)
            previous, ends_epoch, request = (step, sums), plan.ends_epoch(step), 0
            if jax.process_count() == 1 or calls % AGREE_EVERY == 0:
                late = save_minutes > 0 and time.perf_counter() - last_save > 60 * save_minutes
                request = sharding.max_over_processes(received() or SAVE * late)
            if not ends_epoch and not request:
                continue
            check_state(state)
            line = {"epoch": plan.epoch_after(step - 1) + 1, "step": step} | training_metrics(*previous, started, count)
            validated = ends_epoch and step > plan.easy_steps
            if validated:
                line |= _validate(eval_fn, state, splits.val, config.batch_size, mesh)
                rates = jax.vmap(schedule)(jnp.arange(step - plan.steps_per_epoch, step))
                line["learning_rate"] = float(rates.mean()) * float(state.plateau.scale)
                line["wall_seconds"] = time.perf_counter() - started
                history.append(line)
                if main:  # before the checkpoint: if it is never saved, resuming removes the line
                    run_files.write_history(run_dir, history)
            if ends_epoch:
                state = end_epoch_fn(state, line.get("val_loss"))
            checkpoint.save(manager, state, line.get("val_loss"))
            last_save = time.perf_counter()
            if ends_epoch:
                if main:
                    print(describe_epoch(plan.name_epoch(step), line), flush=True)
                started, count, previous = last_save, 0, None
                request = max(request, sharding.max_over_processes(received()))  # a signal during the validation
            if validated and main:
                on_epoch(line)
            if request >= STOP:
                raise Stopped(run_dir, step, plan.total_steps, request - STOP)


def _resume_history(config: Config, plan: Plan, step: int, auxiliary: bool, on_epoch: OnEpoch) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl that belong to saved epochs, and removes the others; prints the start."""
    run_dir = Path(config.run_dir)
    history = run_files.read_history(run_dir, step)
    if sharding.is_main():
        run_files.write_history(run_dir, history)
        for line in history:
            on_epoch(line)
        done = f"{len(history)} of {config.epochs} epochs done{' with the auxiliary loss' * auxiliary}"
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        steps = f"(step {step} of {plan.total_steps}), {plan.steps_per_epoch} steps per epoch on {devices}"
        print(f"{run_dir}: {done} {steps}", flush=True)
    return history


def _validate(evaluate: Callable, state: TrainState, dataset: Dataset, batch_size: int, mesh: Mesh) -> dict[str, float]:
    """Returns val_loss and val_accuracy; FloatingPointError if the loss is not finite."""
    totals = dict.fromkeys(("loss", "correct", "count"), 0.0)
    for batch in eval_batches(dataset, batch_size, mesh):
        for name, value in evaluate(state, batch).items():
            totals[name] += float(value)
    loss, accuracy = mean_metrics(totals)
    check_finite(loss, "validation loss", int(state.step))
    return {"val_loss": loss, "val_accuracy": accuracy}
