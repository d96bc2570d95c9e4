import pytest

from gravlens_jax import measure_scaling
from gravlens_jax.config import InputError
from gravlens_jax.measure_scaling import (
    Case,
    powers_of_two,
    scaling_cases,
    scaling_curves,
    scaling_rows,
    scaling_table,
    time_cases,
)

SCALING = scaling_cases((4, 1, 2), batch_per_device=8)


def test_weak_scaling_fixes_the_batch_per_device_and_strong_scaling_the_whole_batch():
    assert SCALING["weak"] == [Case(1, 8), Case(2, 16), Case(4, 32)]
    assert SCALING["strong"] == [Case(1, 32), Case(2, 32), Case(4, 32)]
    assert scaling_cases((2,), 8, 6)["strong"] == [Case(2, 6)]


@pytest.mark.parametrize("n, expected", [(1, (1,)), (2, (1, 2)), (7, (1, 2, 4)), (8, (1, 2, 4, 8))])
def test_powers_of_two_end_at_the_last_that_fits(n, expected):
    assert powers_of_two(n) == expected


def test_efficiency_is_one_where_devices_help_fully_and_1_over_n_where_they_do_not():
    perfect = {case: [case.batch_size / case.devices] for some in SCALING.values() for case in some}
    assert [row["efficiency"] for row in scaling_rows(SCALING, perfect, 50)] == pytest.approx([1.0] * 6)
    shared = {case: [case.batch_size] * 3 for some in SCALING.values() for case in some}
    rows = scaling_rows(SCALING, shared, 50)
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 1 / 2, 1 / 4] * 2)
    assert [row["images_per_second"] for row in rows] == pytest.approx([1] * 6)
    assert scaling_curves(rows)["weak"][0].tolist() == [1, 2, 4]


def test_the_table_has_a_line_for_each_case_and_says_what_to_expect():
    rows = scaling_rows({"weak": [Case(2, 4), Case(4, 8)]}, {Case(2, 4): [0.1, 0.2], Case(4, 8): [0.1]}, 50)
    lines = scaling_table(rows).splitlines()
    assert lines[1].split()[:6] == ["weak", "2", "4", "2", "150.00", "125.00-175.00"]
    assert lines[2].split()[-1] == "1.500" and lines[3] == "efficiency is relative to 2 devices"
    assert "share the cores" in lines[4]


def test_cases_are_compiled_once_and_take_turns(monkeypatch):
    log = []

    def compile_step(train, batch_size, size, dtype, devices):
        log.append(("compile", devices))
        return lambda warmup, steps: log.append(("run", devices)) or [float(devices)] * steps, {}

    monkeypatch.setattr(measure_scaling, "compile_step", compile_step)
    cases = scaling_cases((1, 2), 2)
    seconds = time_cases(cases, 8, "float32", warmup=1, steps=3, repeats=2)
    assert seconds == {Case(1, 2): [1.0] * 6, Case(1, 4): [1.0] * 6, Case(2, 4): [2.0] * 6}
    assert log == [("compile", 1), ("compile", 1), ("compile", 2)] + 2 * [("run", 1), ("run", 1), ("run", 2)]


@pytest.mark.parametrize(
    "case, steps, message",
    [
        (Case(2, 3), 1, "batch_size=3 is not divisible by 2 devices"),
        (Case(3, 3), 1, "3 devices asked for, 2 found"),
        (Case(1, 1), 0, "steps=0: expected at least 1"),
    ],
)
def test_cases_that_cannot_be_timed_are_refused_before_any_is_compiled(case, steps, message):
    with pytest.raises(InputError, match=message):
        time_cases({"strong": [case]}, 8, "float32", 0, steps, 1)


@pytest.mark.parametrize(
    "devices, batch, message", [((), 8, "devices="), ((0,), 8, "devices="), ((1,), 0, "batch_per")]
)
def test_cases_without_devices_or_images_are_refused(devices, batch, message):
    with pytest.raises(InputError, match=message):
        scaling_cases(devices, batch)
