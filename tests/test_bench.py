"""The benchmarks' own code; tests/test_scripts.py runs scripts/benchmark.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import costs, runs, steps, sweep
from bench import input as reading
from bench.costs import Case
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.model import ResNet, variable_shapes
from gravlens_jax.sharding import data_mesh


@pytest.mark.parametrize("size", [100, 150])
def test_forward_flops_equal_the_compiler_count(size):
    model, images = ResNet(), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    forward = jax.jit(model.apply).trace(variable_shapes(model), images).lower(lowering_platforms=("cuda",))
    # The compiler counts normalization and ReLU too, and leaves out products with the padding.
    assert costs.step_flops(Case(False, 1, size)) == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


@pytest.mark.parametrize(
    "name, kind, others",
    [
        ("H100", "NVIDIA H100 80GB HBM3", ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")),
        ("A100", "NVIDIA A100-SXM4-80GB", ("NVIDIA A100-PCIE-40GB", "NVIDIA GH200 480GB")),
        ("L4", "NVIDIA L4", ("NVIDIA L40S",)),
        ("TPU v5 lite", "TPU v5 lite", ("TPU v5",)),
    ],
)
def test_peaks_are_found_for_exactly_the_listed_devices(name, kind, others):
    assert costs.find_peaks(kind) == costs.PEAKS[name]
    assert not any(map(costs.find_peaks, others))


def test_cpu_peaks_are_those_of_the_fastest_product_and_copy(monkeypatch):
    monkeypatch.setattr(costs, "time_calls", lambda function, warmup, calls: [0.5, 2.0])
    assert costs.peaks("float32") == {"tflops": 4 * 2048**3 / 1e12, "bandwidth": 4 * 2**28 / 1e9}


@pytest.mark.parametrize("train, dtype, devices", [(True, "float32", 2), (False, "bfloat16", 1)])
def test_steps_are_timed_and_training_has_two_all_reduces_for_each_normalization_and_two_more(train, dtype, devices):
    measure, facts = steps.compile_step(Case(train, 4, 8, dtype, devices, depth=8))
    seconds = measure(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_mib"] > 0.01 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]
    assert facts["collectives"] == ({"all-reduce": 2 * 7 + 2} if devices > 1 else {})
    assert not train or 0 < steps.busy_fraction(Case(True, 4, 8, depth=8), 3, 1) < 2


def test_readers_give_batches_of_the_same_images(tmp_path):
    reading.write_files(tmp_path, 8, npy=False)
    readers = [reader for reader in reading.READERS if reader != "DataLoader"]
    batches = [list(reading.open_reader(reader, 0, tmp_path, 4)) for reader in readers]
    jax.tree.map(np.testing.assert_array_equal, *batches[:2])
    jax.tree.map(np.testing.assert_array_equal, *batches[1:])
    assert len(batches[0]) == 2
    row = reading.measure_reader("memory map", 0, tmp_path, 4, 2)
    assert row["images_per_second"] == pytest.approx(4 * row["batches_per_second"]) and row["open_seconds"] > 0


def test_programs_of_a_run_are_compiled_for_devices_and_their_collectives_counted():
    config = Config(batch_size=4, model=ModelConfig(depth=8, width=4), input=InputConfig(crop=24))
    train, simulate = steps.compile_run(config, data_mesh(2), "cpu")
    assert train["gflops"] > 0 and train["compile_seconds"] > 0
    parameters = sum(x.size for x in jax.tree.leaves(variable_shapes(ResNet(depth=8, width=4))["params"])) + 2 * 17
    assert train["collectives"] == {"all-reduce": 2 * 7 + 2} and simulate["collectives"] == {}
    assert 4 * parameters < train["collective_mib"] * 2**20 < 4 * parameters + 2000


def test_accelerator_is_measured_by_steps_simulation_and_runs(monkeypatch, tmp_path, run_here):
    monkeypatch.setattr(sweep, "compile_step", lambda case: (lambda warmup, n: [0.5] * n, {"accessed_bytes": 1.0}))
    monkeypatch.setattr(sweep, "busy_fraction", lambda *_: 1.0)
    monkeypatch.setattr(runs, "time_calls", lambda function, warmup, calls: [0.25])
    line = {"image_steps": 8, "minutes": 0.5, "val_accuracy": 0.96, "images_per_second": 3.0}
    monkeypatch.setattr(runs, "our_run", lambda config: [line])
    out = run_here(tmp_path, "benchmark.py", "gpu", "--batch-sizes", "4", "--recipes", "default")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["images_per_second"] for row in result["rows"]] == [8.0] * 4 + [16.0] + [3.0] * 3
    assert result["logits"] == {"difference": 0.0, "same": 1.0} and set(result["minutes_to"].values()) == {0.5}
    assert "same class 100.0%" in out


@pytest.mark.parametrize("speed_up, efficiency", [(1, [1, 1 / 2]), (2, [1, 1])])
def test_scaling_cases_alternate_and_efficiency_is_1_if_perfect_and_1_over_n_for_shared_cores(
    monkeypatch, tmp_path, speed_up, efficiency
):
    log = []

    def compile_step(case):
        seconds = case.batch_size / (speed_up if case.devices == 2 else 1)
        return lambda warmup, steps: log.append(case) or [seconds] * steps, {}

    monkeypatch.setattr(sweep, "compile_step", compile_step)
    assert sweep.scaling_cases((), 2, 4, 8) == sweep.scaling_cases((2, 1), 2, None, 8)
    rows = sweep.scale(sweep.scaling_cases((), 2, None, 8), warmup=1, steps=3, repeats=2)
    found = [(row["scaling"], row["devices"], row["batch_size"]) for row in rows]
    assert found == [("weak", 1, 2), ("weak", 2, 4), ("strong", 1, 4), ("strong", 2, 4)]
    assert len(log) == 6 and log[:3] == log[3:] == sorted(set(log))
    assert [row["efficiency"] for row in rows] == pytest.approx(2 * efficiency)
    assert [row["best_efficiency"] for row in rows] == [1, 1 / 2, 1, 1 / 2]
    sweep.draw_scaling(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
