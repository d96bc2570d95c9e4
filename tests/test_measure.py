import numpy as np
import pytest

from gravlens_jax import measure, measure_input, measure_simulation


def test_a_compiled_step_is_timed():
    run, facts = measure.compile_step(True, 4, 8, "float32", 1)
    seconds = run(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_bytes"] > 1e6 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]


def test_two_devices_are_used():
    run, _ = measure.compile_step(False, 4, 8, "bfloat16", 2)
    assert len(run(0, 1)) == 1


def test_a_cpu_s_peaks_are_measured():
    values = measure.peaks("float32")
    assert 0 < values["tflops"] < 100 and 0 < values["bandwidth"] < 10_000


def test_the_loop_s_busy_fraction():
    assert 0 < measure.busy_fraction(4, 8, "float32", 3, 1) < 2


def test_figures_of_a_step():
    figures = measure.step_figures([0.1, 0.2, 0.3], [0.4], batch_size=10, flops=10**9, accessed_bytes=4e9)
    assert figures["images_per_second"] == pytest.approx(50) and figures["ratio"] == pytest.approx(2)
    assert figures["tflops"] == pytest.approx(0.05) and figures["accessed_gb_per_second"] == pytest.approx(20)
    assert figures["step_seconds_quartiles"] == pytest.approx([0.15, 0.25])


@pytest.mark.parametrize("reader", measure_input.READERS[:3])
def test_readers_give_batches(reader, tmp_path):
    measure_input.write_files(tmp_path, 8, npy=False)
    values = measure_input.measure_reader(reader, tmp_path, 4, 2)
    assert values["batches_per_second"] > 0 and values["open_seconds"] > 0
    with np.load(tmp_path / "compressed.npz") as a, np.load(tmp_path / "packed.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])


def test_of_the_data_loaders_only_the_fastest_is_shown():
    values = {"open_seconds": 0.001, "open_mib": 1.0, "read_mib": 2.0}
    rates = {("memory map", 0): 5.0, ("DataLoader", 0): 1.0, ("DataLoader", 1): 3.0, ("DataLoader", 2): 2.0}
    best = measure_input.best_loader({case: values | {"batches_per_second": rate} for case, rate in rates.items()})
    assert list(best) == [("memory map", 0), ("DataLoader", 1)]
    lines = measure_input.readers_table(best, 10).splitlines()
    assert lines[1].split() == ["memory", "map", "1.0", "1", "5.0", "50", "0.00", "2"]
    assert lines[2].startswith("DataLoader, 1 workers")


def test_medians_of_repeated_measurements():
    runs = {"a": [{"x": 1.0, "y": 5.0}, {"x": 9.0, "y": 7.0}, {"x": 2.0, "y": 6.0}]}
    assert measure.medians(runs) == {"a": {"x": 2.0, "y": 6.0}}


def test_the_simulator_s_table_names_codes_and_cores():
    rates = {"no": 1.0, "sphere": 2.0, "vort": 3.0, "all": 1.6}
    lines = measure_simulation.rates_table({("a", 1): rates, ("b", 2): rates}).splitlines()
    assert lines[1].split() == ["a,", "1", "core", "1.0", "2.0", "3.0", "1.6"] and lines[2].startswith("b, 2 cores")
