import pytest

from bench import machine, steps
from bench.sweep import Steps
from gravlens_jax.errors import InputError


def test_compiled_training_step_is_timed():
    run, facts = steps.compile_step(True, 4, 8, "float32", 1)
    seconds = run(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_bytes"] > 1e6 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]


def test_compiled_forward_pass_runs_on_two_devices():
    run, _ = steps.compile_step(False, 4, 8, "bfloat16", 2)
    assert len(run(0, 1)) == 1


def test_busy_fraction_of_a_training_epoch():
    assert 0 < steps.busy_fraction(4, 8, "float32", 3, 1) < 2


def test_step_figures():
    figures = steps.step_figures([0.1, 0.2, 0.3], batch_size=10, flops=10**9)
    assert figures["images_per_second"] == pytest.approx(50) and figures["tflops"] == pytest.approx(0.05)
    assert figures["step_seconds_quartiles"] == pytest.approx([0.15, 0.25])


def test_cpu_peaks_are_measured():
    values = machine.peaks("float32")
    assert 0 < values["tflops"] < 100 and 0 < values["bandwidth"] < 10_000


def test_medians_of_repeated_measurements():
    runs = {"a": [{"x": 1.0, "y": 5.0}, {"x": 9.0, "y": 7.0}, {"x": 2.0, "y": 6.0}]}
    assert machine.medians(runs) == {"a": {"x": 2.0, "y": 6.0}}


@pytest.mark.parametrize("option", [{"batch_size": (0,)}, {"devices": ()}, {"steps": 0}, {"dtype": ()}])
def test_sweep_options_that_measure_nothing_are_refused(option):
    with pytest.raises(InputError, match=next(iter(option))):
        Steps(**option)
