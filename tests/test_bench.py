"""The benchmarks' own code; tests/test_scripts.py runs scripts/benchmark.py."""

import json

import jax
import jax.numpy as jnp
import pytest

from bench import costs, runs, steps, sweep
from bench.costs import Case
from gravlens_jax.model import ResNet, variable_shapes


@pytest.mark.parametrize("size", [100, 150])
def test_forward_flops_equal_the_compiler_count(size):
    model, images = ResNet(), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    forward = jax.jit(model.apply).trace(variable_shapes(model), images).lower(lowering_platforms=("cuda",))
    # The compiler counts normalization and ReLU too, and leaves out products with the padding.
    assert costs.step_flops(Case(False, 1, size)) == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


def test_peaks_are_found_for_exactly_the_listed_devices(monkeypatch):
    for name, kind in (("H100", "NVIDIA H100 80GB HBM3"), ("L4", "NVIDIA L4"), ("TPU v5 lite", "TPU v5 lite")):
        assert costs.find_peaks(kind) == costs.PEAKS[name]
    for kind in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40S", "TPU v5"):
        assert not costs.find_peaks(kind)
    monkeypatch.setattr(costs, "time_calls", lambda function, warmup, calls: [0.5, 2.0])  # of a CPU they are measured
    assert costs.peaks("float32") == {"tflops": 4 * 2048**3 / 1e12, "bandwidth": 4 * 2**28 / 1e9}


@pytest.mark.parametrize("train, dtype, devices", [(True, "float32", 2), (False, "bfloat16", 1)])
def test_steps_are_timed_and_training_has_two_all_reduces_for_each_normalization_and_two_more(train, dtype, devices):
    measure, facts = steps.compile_step(Case(train, 4, 8, dtype, devices, depth=8))
    seconds = measure(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_mib"] > 0.01 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]
    assert facts["collectives"] == ({"all-reduce": 2 * 7 + 2} if devices > 1 else {})
    assert not train or 0 < steps.busy_fraction(Case(True, 4, 8, depth=8), 3, 1) < 2


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
