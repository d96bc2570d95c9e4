import os
import signal
import threading

import jax.numpy as jnp
import pytest

from gravlens_jax.console import Meter, recorded_signals
from gravlens_jax.loader import Plan
from gravlens_jax.train_step import TrainState, zero_sums


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_recorded_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with recorded_signals() as received:
        assert received() == 0
        os.kill(os.getpid(), number)
        assert received() == number
    assert signal.getsignal(number) is before


def test_second_ctrl_c_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background programs may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), recorded_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_not_recorded_outside_the_main_thread():
    results = []

    def work():
        with recorded_signals() as received:
            results.append(received())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [0]


def make_sums(loss, count):
    return zero_sums() | {"loss": jnp.float32(loss), "correct": jnp.int32(count // 2), "count": jnp.int32(count)}


def test_meter_reports_the_epoch_so_far():
    state = TrainState(jnp.int32(2), {}, {}, {}, {}, {}, make_sums(4.0, 4))
    with Meter(Plan(1, 3, 2)) as meter:
        meter.start("resumed", state)
        meter.update(3, make_sums(6.0, 8))
        line = meter.read()
    assert (line["epoch"], line["step"], line["train_loss"], line["train_accuracy"]) == (1, 3, 0.75, 0.5)
    assert line["images_per_second"] > 0


def test_meter_raises_at_the_step_whose_loss_is_not_finite():
    state = TrainState(jnp.int32(0), {}, {}, {}, {}, {}, zero_sums())
    with Meter(Plan(0, 3, 2)) as meter:
        meter.start("", state)
        meter.update(1, make_sums(jnp.nan, 4))
        with pytest.raises(FloatingPointError, match="training loss is nan at step 1; saved checkpoints are intact"):
            meter.update(2, make_sums(1.0, 8))
