"""Stopping a run without loss: SIGINT (Ctrl-C) and SIGTERM (pre-emption) are noted, and obeyed when all is saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """A run was told to stop by a signal, and has saved what it had; says how to continue.

    Attributes:
      number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the signal that came, 0 for none; a second one acts at once.

    Outside the main thread, where Python allows no handlers, no signal is noted.
    """
    came = 0

    def note(number, _):
        nonlocal came
        came = number
        signal.signal(number, before[number] or signal.SIG_DFL)  # None: a handler that Python does not know

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
