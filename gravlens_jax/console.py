"""What a run shows on the terminal, and how signals stop it without loss."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gravlens_jax.loader import Plan
from gravlens_jax.sharding import is_main
from gravlens_jax.train_step import Sums, TrainState, check_finite, mean_metrics


class Stopped(KeyboardInterrupt):
    """A signal stopped the run after its state was saved; the message says how to continue.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextmanager
def recorded_signals() -> Iterator[Callable[[], int]]:
    """Records SIGINT (Ctrl-C) and SIGTERM (preemption) instead of acting on them; a second signal acts at once.

    Outside the main thread, where Python allows no handlers, no signal is recorded.

    Yields:
      A function that returns the number of the recorded signal, 0 for none.
    """
    received = [0]
    previous: dict[int, Any] = {}

    def record(number: int, _: Any) -> None:
        received[0] = number
        signal.signal(number, previous[number] or signal.SIG_DFL)  # None: a handler that was not set from Python

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, record)
    try:
        yield lambda: received[0]
    finally:
        for own, handler in previous.items():
            signal.signal(own, handler or signal.SIG_DFL)


def progress_bar() -> Progress:
    """Returns a rich progress bar with a count, a text field and the time left; hidden where there is no terminal.

    It fits into 80 columns if the text has at most 34 characters.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        disable=not (sys.stdout.isatty() and is_main()),
        speed_estimate_period=120,
    )


class Meter:
    """The progress of a run: speed, loss and accuracy of the current epoch, on a progress bar and as printed lines.

    Sums are read one call late, so that the devices never wait for the host. Use it in a `with` statement.
    """

    def __init__(self, plan: Plan):
        self._plan, self._bar = plan, progress_bar()

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, text: str, state: TrainState) -> None:
        """Prints the run and the devices, and starts to count at `state`; `text` says which epochs are done."""
        step, total, steps = int(state.step), self._plan.total_steps, self._plan.steps_per_epoch
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        _print(f"{text} (step {step} of {total}), {steps} steps per epoch on {devices}")
        self._task = self._bar.add_task("", total=total, completed=step, text="")
        self._start_epoch(int(state.sums["count"]))

    def _start_epoch(self, count: int) -> None:
        self._first_count, self._started = count, time.perf_counter()
        self._pending: tuple[int, Sums] | None = None
        self._line: dict[str, Any] = {}

    def update(self, step: int, sums: Sums) -> None:
        """Takes the sums after `step`; shows those before, FloatingPointError if their loss is not finite."""
        self.read()
        self._pending = step, sums

    def read(self) -> dict[str, Any]:
        """Returns the metrics of the epoch up to the last update: a line of metrics.jsonl without validation."""
        if self._pending is not None:
            step, sums = self._pending
            self._pending = None
            check_finite(float(sums["loss"]), "training loss", step)
            loss, accuracy = mean_metrics(sums)
            rate = (int(sums["count"]) - self._first_count) / self.seconds()
            epoch = self._plan.epoch_after(step - 1) + 1
            self._line = {"epoch": epoch, "step": step, "train_loss": loss, "train_accuracy": accuracy}
            self._line["images_per_second"] = rate
            name = f"epoch {epoch}/{self._plan.epochs}" if epoch else "easy images"
            text = f"{rate:,.0f} images/s loss {loss:.3f} acc {accuracy:.3f}"
            self._bar.update(self._task, completed=step, description=name, text=text)
        return self._line

    def seconds(self) -> float:
        """Returns the time since the epoch started or was resumed."""
        return time.perf_counter() - self._started

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Prints the epoch in at most 80 columns and starts the next one."""
        text = f"train loss {line['train_loss']:.3f} acc {line['train_accuracy']:.3f}"
        if "val_loss" in line:
            text = f"epoch {line['epoch']}/{self._plan.epochs}: {text}, val loss {line['val_loss']:.3f} acc "
            text += f"{line['val_accuracy']:.3f}, {line['images_per_second']:,.0f} images/s"
        else:
            text = f"easy images: {text}"
        _print(text)
        self._start_epoch(0)


def _print(text: str) -> None:
    if is_main():
        print(text, flush=True)


def track(items: Iterable, name: str, total: int) -> Iterator[Any]:
    """Yields `items` (arrays of images, or one file each) and shows how many of `total` images are done."""
    start, done = time.perf_counter(), 0
    with progress_bar() as bar:
        task = bar.add_task(name, total=total, text="")
        for item in items:
            yield item
            done += len(item) if hasattr(item, "shape") else 1
            rate = done / (time.perf_counter() - start)
            bar.update(task, completed=done, text=f"images {rate:,.0f}/s")
    print(f"{name}: {done:,} images in {time.perf_counter() - start:.0f} s")
