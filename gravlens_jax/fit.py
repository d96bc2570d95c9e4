"""Training from the config to the report: data -> steps -> checkpoints -> report, in that order."""

import json
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gravlens_jax import checkpoint, data, mesh, run
from gravlens_jax.config import Config, check
from gravlens_jax.epoch import Sums, check_finite, make_train_epoch, means, no_sums, place, sum_metrics
from gravlens_jax.evaluate import calibrate_run, evaluate_run
from gravlens_jax.files import write_atomically, writing
from gravlens_jax.model import make_model
from gravlens_jax.npz import Dataset
from gravlens_jax.optim import learning_rate_schedule, make_optimizer
from gravlens_jax.progress import progress_bar
from gravlens_jax.signals import Stopped, noted_signals
from gravlens_jax.splits import Splits, open_splits
from gravlens_jax.steps import TrainState, end_epoch, eval_step, init_state
from gravlens_jax.stream import Stream

AGREE_EVERY = 16  # steps, after which several processes ask each other whether to save or stop


OnEpoch = Callable[[dict[str, Any]], None]


def fit(
    config: Config, resume: bool = False, save_minutes: float = 10.0, on_epoch: OnEpoch = lambda line: None
) -> dict[str, Any]:
    """Trains, saves and evaluates a run; returns the metrics of its best checkpoint on the test split.

    Args:
      config: the run. Its directory must be new, or with `resume` hold a run of exactly this config.
      resume: go on where the run was last saved.
      save_minutes: time between saves within an epoch; 0 for none. An epoch's end is always saved.
      on_epoch: takes what metrics.jsonl says of an epoch, when it is saved; at first, of those that are saved already.

    Raises:
      InputError: a mistake in the config, the data or the run directory; another process is at work on it.
      FloatingPointError: the loss is not finite; earlier checkpoints stay.
      Stopped: SIGINT or SIGTERM came; the step has been finished and saved.
    """
    run_dir, main = Path(config.run_dir), mesh.is_main()
    if resume:
        _check_same(run.read_run(run_dir).config, config)
    elif main:
        run.check_unused(run_dir)
    check(save_minutes >= 0, f"save_minutes={save_minutes}: expected a number >= 0")
    devices = mesh.data_mesh()
    mesh.check_batch_size(config.batch_size, devices)
    splits = open_splits(config)
    train = splits.train
    with run.locked(run_dir) if main else nullcontext():
        if main and not resume:
            run.create_run(run_dir, run.RunInfo(config, train.classes, train.image_shape))
        _train(config, run_dir, splits, devices, save_minutes, on_epoch)
        calibrate_run(run_dir, splits.val)
        mesh.wait_for_all("the run is calibrated")
        return evaluate_run(run_dir, splits.test, "best", run_dir / "report" if main else None)


def _train(
    config: Config,
    run_dir: Path,
    splits: Splits,
    devices: Mesh,
    save_minutes: float,
    on_epoch: OnEpoch,
) -> None:
    """Trains from the last save on, to the end."""
    train, val, _, easy = splits
    easy_steps = easy.size // config.batch_size if easy else 0
    steps_per_epoch = train.size // config.batch_size
    total_steps = easy_steps + config.epochs * steps_per_epoch
    model = make_model(config.model, config.input, train.classes)
    tx = make_optimizer(config.optim, total_steps)
    schedule = learning_rate_schedule(config.optim, total_steps)
    train_epoch = make_train_epoch(config, model, tx, devices)
    everywhere = mesh.replicated(devices)
    init_fn = jax.jit(partial(init_state, model=model, tx=tx, config=config.optim))
    eval_fn = jax.jit(partial(eval_step, model=model), out_shardings=everywhere)
    end_epoch_fn = jax.jit(partial(end_epoch, config=config.optim), out_shardings=everywhere)
    history, main = run_dir / "metrics.jsonl", mesh.is_main()
    say = partial(print, flush=True) if main else lambda *_: None
    if main:
        checkpoint.sweep(run_dir)
    mesh.wait_for_all("the run directory is made")

    with (
        checkpoint.open_checkpoints(run_dir) as manager,
        checkpoint.open_partial(run_dir) as partial_manager,
        noted_signals() as signal_number,
        progress_bar() as bar,
    ):
        state = mesh.replicate(init_fn(config.seed), devices)
        state, sums = _last_save(manager, partial_manager, state)
        step = int(state.step)
        epochs_done = max(0, step - easy_steps) // steps_per_epoch
        if main:
            for line in _keep_lines(history, epochs_done):
                on_epoch(line)
        say(
            f"{run_dir}: {epochs_done} of {config.epochs} epochs done (step {step} of {total_steps})\n"
            f"{train.size:,} {'fresh' if config.stream else 'training'} images and {steps_per_epoch} steps an epoch, "
            f"{devices.size} x {jax.devices()[0].device_kind}"
        )
        task = bar.add_task("", total=total_steps, completed=step, text="")
        last_save, told, calls = time.monotonic(), 0, 0

        def due() -> bool:
            nonlocal told, calls
            calls += 1
            if jax.process_count() > 1 and calls % AGREE_EVERY:
                return False
            late = save_minutes and time.monotonic() - last_save > 60 * save_minutes
            told = mesh.agree(signal_number() or int(late))
            return told > 0

        def save(state: TrainState, sums: Sums) -> None:
            nonlocal last_save
            checkpoint.save_partial(partial_manager, state, sums)
            last_save = time.monotonic()
            stop_if_told(int(state.step))

        def stop_if_told(step: int) -> None:
            if told > 1:
                name = signal.Signals(told).name
                message = f"{name}: stopped after step {step} of {total_steps}, which is saved; continue with --resume"
                raise Stopped(f"{run_dir}: {message}", told)

        def pass_over(name: str, dataset: Dataset | Stream, state: TrainState, sums: Sums, epoch: int, first_step: int):
            """An epoch of steps, or what is left of it."""
            start, seen = time.perf_counter(), sums["count"]

            def show(step: int, sums: Sums) -> None:
                rate, loss, accuracy = (sums["count"] - seen) / (time.perf_counter() - start), *means(sums)
                text = f"{rate:,.0f} images/s loss {loss:.3f} acc {accuracy:.3f}"
                bar.update(task, completed=step, description=name, text=text)

            state, sums = train_epoch(state, dataset, epoch, first_step, sums, show, due, save)
            return state, sums, (sums["count"] - seen) / (time.perf_counter() - start)

        if easy and step < easy_steps:
            state, sums, _ = pass_over("easy images", place(easy, config, devices), state, sums, 0, 0)
            loss, accuracy = means(sums)
            say(f"easy images: train loss {loss:.3f} acc {accuracy:.3f}")
            sums = no_sums()
        train_data = place(train, config, devices)
        for epoch in range(epochs_done, config.epochs):
            start = time.perf_counter()
            first_step = easy_steps + epoch * steps_per_epoch
            step = first_step + steps_per_epoch
            learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(first_step, step))) * float(state.plateau.scale)
            name = f"epoch {epoch + 1}/{config.epochs}"
            state, sums, images_per_second = pass_over(name, train_data, state, sums, epoch, first_step)
            val_batches = data.eval_batches(val, mesh.local_rows(data.eval_rows(val.size, config.batch_size)))
            val_sums = sum_metrics(eval_fn, state, data.prefetch(val_batches), devices)
            (train_loss, train_accuracy), (val_loss, val_accuracy) = means(sums), means(val_sums)
            check_finite(val_loss, "validation loss", step)
            state = end_epoch_fn(state, val_loss)
            line = {
                "epoch": epoch + 1,
                "step": step,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "learning_rate": float(learning_rates.mean()),  # over the epoch
                "images_per_second": images_per_second,
                "wall_seconds": time.perf_counter() - start,  # since the epoch began or was resumed
            }
            # The line first: if the run is killed in between, resuming drops it and repeats the epoch.
            if main:
                with writing(history), open(history, "a") as file:
                    file.write(json.dumps(line) + "\n")
            checkpoint.save_state(manager, state, val_loss)
            checkpoint.drop_partial(partial_manager)
            last_save, sums = time.monotonic(), no_sums()
            if main:
                on_epoch(line)
            say(_epoch_text(line, config.epochs))
            told = mesh.agree(signal_number())
            if step < total_steps:
                stop_if_told(step)


def _last_save(manager, partial_manager, state: TrainState) -> tuple[TrainState, Sums]:
    """Returns the latest of what is saved at and within epochs; `state` itself if nothing is."""
    latest, within = manager.latest_step() or 0, partial_manager.latest_step() or 0
    if within > latest:
        return checkpoint.restore_state(partial_manager, within, state)
    checkpoint.drop_partial(partial_manager)
    return (checkpoint.restore_state(manager, latest, state)[0] if latest else state), no_sums()


def _epoch_text(line: dict[str, Any], epochs: int) -> str:
    """What is printed of a line of metrics.jsonl: 80 columns hold it."""
    train, val = (f"loss {line[f'{split}_loss']:.3f} acc {line[f'{split}_accuracy']:.3f}" for split in ("train", "val"))
    return f"epoch {line['epoch']}/{epochs}: train {train}, val {val}, {line['images_per_second']:,.0f} images/s"


def _check_same(saved: Config, given: Config) -> None:
    old, new = (dict(_flat(asdict(config))) for config in (saved, given))
    for name in old:
        option = "--" + name.replace("_", "-")
        check(
            old[name] == new[name] or name in ("run_dir", "device_data"),  # which change nothing about the outcome
            f"{option} is {new[name]} but the run to resume has {old[name]}; leave the option out, or start a new run "
            f"with another --run-dir",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def _keep_lines(history: Path, epochs: int) -> list[dict[str, Any]]:
    """Keeps, and returns, the first `epochs` lines of metrics.jsonl, which belong to saved epochs."""
    lines = run.read_history(history, epochs)
    if history.exists():
        with writing(history):
            write_atomically(history, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
