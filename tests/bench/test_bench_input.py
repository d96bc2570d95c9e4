import numpy as np
import pytest

from bench import input as reading


@pytest.mark.parametrize("reader", ["memory map", "np.load", "compressed"])
def test_readers_give_batches(reader, tmp_path):
    reading.write_files(tmp_path, 8, npy=False)
    values = reading.measure_reader(reader, tmp_path, 4, 2)
    assert values["batches_per_second"] > 0 and values["open_seconds"] > 0
    with np.load(tmp_path / "compressed.npz") as a, np.load(tmp_path / "packed.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])


def test_only_the_fastest_data_loader_is_shown():
    values = {"open_seconds": 0.001, "open_mib": 1.0, "read_mib": 2.0}
    rates = {("memory map", 0): 5.0, ("DataLoader", 0): 1.0, ("DataLoader", 1): 3.0, ("DataLoader", 2): 2.0}
    best = reading.best_loader({case: values | {"batches_per_second": rate} for case, rate in rates.items()})
    assert list(best) == [("memory map", 0), ("DataLoader", 1)]
    lines = reading.readers_table(best, 10).splitlines()
    assert lines[1].split() == ["memory", "map", "1.0", "1", "5.0", "50", "0.00", "2"]
    assert lines[2].startswith("DataLoader, 1 workers")
