import pytest

from bench import scaling
from bench.scaling import Case, draw_scaling, powers_of_two, scaling_cases, scaling_rows, scaling_table, time_cases
from gravlens_jax.errors import InputError

SCALING = scaling_cases((4, 1, 2), batch_per_device=8)


def test_weak_scaling_fixes_the_batch_per_device_and_strong_scaling_the_whole_batch():
    assert SCALING["weak"] == [Case(1, 8), Case(2, 16), Case(4, 32)]
    assert SCALING["strong"] == [Case(1, 32), Case(2, 32), Case(4, 32)]
    assert scaling_cases((2,), 8, 6)["strong"] == [Case(2, 6)]


def test_powers_of_two_end_at_the_last_that_fits():
    assert [powers_of_two(n) for n in (1, 2, 7, 8)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


def test_efficiency_is_1_for_perfect_scaling():
    seconds = {case: [case.batch_size / case.devices] for some in SCALING.values() for case in some}
    assert [row["efficiency"] for row in scaling_rows(SCALING, seconds, 50)] == pytest.approx([1.0] * 6)


def test_efficiency_of_shared_cores_is_1_over_n(tmp_path):
    seconds = {case: [case.batch_size] * 3 for some in SCALING.values() for case in some}
    rows = scaling_rows(SCALING, seconds, 50)
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 1 / 2, 1 / 4] * 2)
    assert [row["images_per_second"] for row in rows] == pytest.approx([1] * 6)
    draw_scaling(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_scaling_table_has_a_line_for_each_case_and_the_expected_efficiency():
    rows = scaling_rows({"weak": [Case(2, 4), Case(4, 8)]}, {Case(2, 4): [0.1, 0.2], Case(4, 8): [0.1]}, 50)
    lines = scaling_table(rows).splitlines()
    assert lines[1].split()[:6] == ["weak", "2", "4", "2", "150.00", "125.00-175.00"]
    assert lines[2].split()[-1] == "1.500" and lines[3] == "efficiency is relative to 2 devices"
    assert "share the cores" in lines[4]


def test_cases_are_compiled_once_and_alternate(monkeypatch):
    log = []

    def compile_step(train, batch_size, size, dtype, devices):
        log.append(("compile", devices))
        return lambda warmup, steps: log.append(("run", devices)) or [float(devices)] * steps, {}

    monkeypatch.setattr(scaling, "compile_step", compile_step)
    seconds = time_cases(scaling_cases((1, 2), 2), 8, "float32", warmup=1, steps=3, repeats=2)
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
def test_impossible_cases_are_refused(case, steps, message):
    with pytest.raises(InputError, match=message):
        time_cases({"strong": [case]}, 8, "float32", 0, steps, 1)


@pytest.mark.parametrize("devices, batch, name", [((), 8, "devices="), ((0,), 8, "devices="), ((1,), 0, "batch_per")])
def test_cases_without_devices_or_images_are_refused(devices, batch, name):
    with pytest.raises(InputError, match=name):
        scaling_cases(devices, batch)
