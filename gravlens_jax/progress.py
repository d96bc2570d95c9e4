"""Progress output, and signals that save before stopping. It imports no JAX."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

SAVE, STOP = 1, 100  # what `recorded_signals` asks for: to save, or STOP + the number of a signal, to save and stop


class Stopped(KeyboardInterrupt):
    """The signal `number` stopped the run after its state was saved; the message says how to continue."""

    def __init__(self, run_dir: Path, step: int, total_steps: int, number: int):
        done = f"stopped after step {step} of {total_steps}, which is saved; continue with --resume"
        super().__init__(f"{run_dir}: {signal.Signals(number).name}: {done}")
        self.number = number


@contextmanager
def recorded_signals() -> Iterator[Callable[[], int]]:
    """Records SIGINT (Ctrl-C), SIGTERM (preemption), SIGHUP (lost terminal) and SIGUSR1 instead of acting on them.

    SIGUSR1 asks for a save, the others for a save and a stop; after one of those, the same one and Ctrl-C act at once.
    A signal that was ignored before (by nohup, for example) stays ignored. Outside the main thread, where Python allows
    no handlers, no signal is recorded. Yields a function that returns the request since its last call: 0 for none,
    SAVE, or (also later) STOP + the number of the signal.
    """
    save, stop = threading.Event(), []
    previous: dict[int, Any] = {}

    def record(number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            save.set()
        else:
            stop.append(STOP + number)
            restore(*({number, signal.SIGINT} & previous.keys()))

    def restore(*numbers: int) -> None:
        for number in numbers:
            signal.signal(number, previous[number] or signal.SIG_DFL)  # None: a handler that was not set from Python

    def request() -> int:
        saving = SAVE if save.is_set() else 0
        save.clear()
        return stop[0] if stop else saving

    main_thread = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if main_thread else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, record)
    try:
        yield request
    finally:
        restore(*previous)


def progress_bar(visible: bool = True) -> Progress:
    """Returns a rich progress bar with a count, a text field and the time left; hidden where there is no terminal.

    It fits into 80 columns if the text has at most 34 characters.
    """
    columns = ("{task.description}", BarColumn(bar_width=8), MofNCompleteColumn(), "{task.fields[text]}")
    hidden = not (visible and sys.stdout.isatty())
    return Progress(*columns, TimeRemainingColumn(compact=True), "left", disable=hidden, speed_estimate_period=120)


def describe_step(metrics: dict[str, float]) -> str:
    """Returns the result of `metrics.training_metrics` as text for the progress bar."""
    rate, loss, accuracy = (metrics[name] for name in ("images_per_second", "train_loss", "train_accuracy"))
    return f"{rate:,.0f} img/s loss {loss:.3f} acc {accuracy:.3f}"


def describe_epoch(name: str, line: dict[str, Any]) -> str:
    """Returns a line of metrics.jsonl, or of the easy images without validation, as text of at most 80 columns."""
    text = f"{name}: train loss {line['train_loss']:.3f} acc {line['train_accuracy']:.3f}"
    if "val_loss" in line:
        text += f", val loss {line['val_loss']:.3f} acc {line['val_accuracy']:.3f}"
        text += f", {line['images_per_second']:,.0f} img/s"
    return text


def show_progress(items: Iterable, name: str, total: int) -> Iterator[Any]:
    """Yields `items`, arrays of images, and shows how many of `total` images are done."""
    start, done = time.perf_counter(), 0
    with progress_bar() as bar:
        task = bar.add_task(name, total=total, text="")
        for item in items:
            yield item
            done += len(item)
            rate = done / (time.perf_counter() - start)
            bar.update(task, completed=done, text=f"images {rate:,.0f}/s")
    print(f"{name}: {done:,} images in {time.perf_counter() - start:.0f} s")
