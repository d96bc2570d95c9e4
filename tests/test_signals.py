import os
import signal
import threading

import pytest

from gravlens_jax.signals import noted_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with noted_signals() as came:
        assert came() == 0
        os.kill(os.getpid(), number)
        assert came() == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), noted_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_note_nothing():
    results = []

    def work():
        with noted_signals() as came:
            results.append(came())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [0]
