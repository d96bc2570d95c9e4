import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from gravlens_jax.progress import SAVE, STOP, recorded_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_asks_for_a_stop_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with recorded_signals() as received:
        assert received() == 0
        signal.raise_signal(number)
        assert received() == received() == STOP + number
    assert signal.getsignal(number) is before


def test_sigusr1_asks_for_a_save_any_number_of_times():
    with recorded_signals() as received:
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert (received(), received()) == (SAVE, 0)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert received() == STOP + signal.SIGTERM


def test_ignored_signal_stays_ignored_and_ctrl_c_after_another_signal_acts_at_once():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with pytest.raises(KeyboardInterrupt), recorded_signals() as received:
        signal.raise_signal(signal.SIGHUP)
        assert received() == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_signals_are_not_recorded_outside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(recorded_signals().__enter__).result()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
