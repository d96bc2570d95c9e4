"""The benchmarks' own code; tests/test_scripts.py runs scripts/benchmark.py."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import accelerator, accuracy, costs, machine, scaling, simulation, steps, topology
from bench import input as reading
from bench.scaling import Case, scaling_cases, scaling_rows, time_cases
from bench.sweep import Steps
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.errors import InputError
from gravlens_jax.model import ResNet, variable_shapes
from gravlens_jax.sharding import data_mesh, shard_batch
from helpers import run


@pytest.mark.parametrize("size", [100, 150])
def test_forward_flops_equal_the_compiler_count(size):
    model, images = ResNet(), jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    forward = jax.jit(model.apply).trace(variable_shapes(model), images).lower(lowering_platforms=("cuda",))
    # The compiler counts normalization and ReLU too, and leaves out products with the padding.
    assert costs.forward_flops(size)[0] == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


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
    monkeypatch.setattr(machine, "time_calls", lambda function, warmup, calls: [0.5, 2.0])
    assert machine.peaks("float32") == {"tflops": 4 * 2048**3 / 1e12, "bandwidth": 4 * 2**28 / 1e9}


@pytest.fixture
def small(monkeypatch):
    """The steps that are timed are those of a small network."""
    monkeypatch.setattr(steps, "ResNet", partial(ResNet, depth=8, width=4))


@pytest.mark.parametrize("train, dtype, devices", [(True, "float32", 1), (False, "bfloat16", 2)])
def test_compiled_steps_are_timed(small, train, dtype, devices):
    run, facts = steps.compile_step(train, 4, 8, dtype, devices)
    seconds = run(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert facts["memory_bytes"] > 1e4 and facts["compile_seconds"] > 0 < facts["transfer_seconds"]


def test_a_training_step_has_two_all_reduces_for_each_normalization_and_two_more(small):  # 40 of ResNet-20
    mesh = data_mesh(2)
    _, step, state = steps.set_up(8, "float32", mesh)
    batch = shard_batch(steps.random_batch(2, 8), mesh)
    assert jax.jit(step).lower(state, batch).compile().as_text().count(" all-reduce(") == 2 * 7 + 2


def test_busy_fraction_of_a_training_epoch(small):
    assert 0 < steps.busy_fraction(4, 8, "float32", 3, 1) < 2


@pytest.mark.parametrize("option", [{"batch_size": (0,)}, {"devices": ()}, {"steps": 0}, {"dtype": ()}])
def test_sweep_options_that_measure_nothing_are_refused(option):
    with pytest.raises(InputError, match=next(iter(option))):
        Steps(**option)


def test_all_readers_give_batches_of_the_same_images(tmp_path):
    reading.write_files(tmp_path, 8, npy=False)
    for reader in ("memory map", "np.load", "compressed"):
        values = reading.measure_reader(reader, tmp_path, 4, 2)
        assert values["batches_per_second"] > 0 and values["open_seconds"] > 0
    with np.load(tmp_path / "compressed.npz") as a, np.load(tmp_path / "packed.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])


def test_tables_show_a_row_for_each_code_and_only_the_fastest_data_loader():
    rates = {("memory map", 0): 5.0, ("DataLoader", 0): 1.0, ("DataLoader", 1): 3.0, ("DataLoader", 2): 2.0}
    values = {"open_seconds": 0.001, "open_mib": 1.0, "read_mib": 2.0}
    best = reading.best_loader({case: values | {"batches_per_second": rate} for case, rate in rates.items()})
    lines = reading.readers_table(best, 10).splitlines()[1:]
    assert lines[0].split() == ["memory", "map", "1.0", "1", "5.0", "50", "0.00", "2"]
    assert len(lines) == 2 and lines[1].startswith("DataLoader, 1 workers")
    lines = simulation.rates_table({"a": {1: 2.0, 2: 3.5}}).splitlines()
    assert lines[0].split() == ["images/s", "1", "core", "2", "cores"] and lines[1].split() == ["a", "2.0", "3.5"]


def test_programs_for_topologies_are_compiled_and_their_collectives_counted():
    config = Config(batch_size=4, model=ModelConfig(depth=8, width=4), input=InputConfig(crop=24))
    rows = {name: topology.compile_for(traced, "cpu") for name, traced in topology.programs(config, data_mesh(2))}
    assert rows["train"]["gflops"] > 0 and rows["train"]["compile_seconds"] > 0
    parameters = sum(x.size for x in jax.tree.leaves(variable_shapes(ResNet(depth=8, width=4))["params"])) + 2 * 17
    found = rows["train"]["collectives"]["all-reduce"]
    assert found["number"] == 2 * 7 + 2 and 4 * parameters < found["bytes"] < 4 * parameters + 2000
    assert rows["simulate"]["collectives"] == {}
    row = {"topology": "v5e:1x2", "chips": 2, "program": "train", "batch_size": 4} | rows["train"]
    assert topology.line(row).split()[:4] == ["v5e:1x2", "2", "train", "4"]


def test_small_tpu_topology_is_compiled_for(tmp_path):
    pytest.importorskip("libtpu")
    out = run(tmp_path, "benchmark.py", "compile", "--topology", "v5e:1x1", "--effort", "O0")
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["program"] for row in rows] == ["train", "simulate"] and all(row["memory_mib"] > 1 for row in rows)


def test_accelerator_is_measured_by_steps_simulation_and_runs(monkeypatch, tmp_path):
    def our_run(config):
        assert config.run_dir.startswith(str(tmp_path))
        return [{"image_steps": 8, "minutes": 0.5, "val_accuracy": 0.9, "images_per_second": 3.0}]

    monkeypatch.setattr(accelerator, "compile_step", lambda *_: (lambda warmup, steps: [0.5] * steps, {}))
    monkeypatch.setattr(accelerator, "time_calls", lambda function, warmup, calls: [0.25])
    monkeypatch.setattr(accelerator, "our_run", our_run)
    lines = []
    result = accelerator.measure_accelerator((4,), ("default",), tmp_path, lines.append)
    assert list(result["images_per_second"].values()) == [8.0] * 4 + [16.0] + [3.0] * 3
    assert len(result["runs"]) == 3 and result["logits"] == {"difference": 0.0, "same": 1.0}
    assert len(lines) == 9


def test_minutes_to_an_accuracy_are_those_of_the_first_epoch_that_reaches_it():
    rows = [
        {"code": code, "minutes": m, "val_accuracy": a} for code, m, a in (("a", 2, 0.8), ("a", 1, 0.9), ("b", 1, 0.7))
    ]
    assert accuracy.minutes_to(rows, 0.8) == {"a": 1} and accuracy.minutes_to(rows, 0.95) == {}


SCALING = scaling_cases((4, 1, 2), batch_per_device=8)


def test_weak_scaling_fixes_the_batch_per_device_and_strong_scaling_the_whole_batch():
    assert SCALING["weak"] == [Case(1, 8), Case(2, 16), Case(4, 32)]
    assert SCALING["strong"] == [Case(1, 32), Case(2, 32), Case(4, 32)]
    assert scaling_cases((2,), 8, 6)["strong"] == [Case(2, 6)]
    assert [scaling.powers_of_two(n) for n in (1, 2, 7, 8)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


def test_efficiency_is_1_for_perfect_scaling_and_1_over_n_for_shared_cores(tmp_path):
    cases = [case for some in SCALING.values() for case in some]
    perfect = scaling_rows(SCALING, {case: [case.batch_size / case.devices] for case in cases}, 50)
    assert [row["efficiency"] for row in perfect] == pytest.approx([1.0] * 6)
    rows = scaling_rows(SCALING, {case: [case.batch_size] * 3 for case in cases}, 50)
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 1 / 2, 1 / 4] * 2)
    assert {(row["images_per_second"], row["tflops"]) for row in rows} == {(1, costs.train_flops(50) / 1e12)}
    scaling.draw_scaling(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_scaling_table_has_a_line_for_each_case_and_the_expected_efficiency():
    rows = scaling_rows({"weak": [Case(2, 4), Case(4, 8)]}, {Case(2, 4): [0.1, 0.2], Case(4, 8): [0.1]}, 50)
    lines = scaling.scaling_table(rows).splitlines()
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
    "devices, batch_size, steps, message",
    [
        ((2,), 3, 1, "batch_size=3 is not divisible by 2 devices"),
        ((3,), 3, 1, "3 devices asked for, 2 found"),
        ((1,), 1, 0, "steps=0: expected at least 1"),
        ((0,), 1, 1, "devices="),
        ((), 1, 1, "devices="),
        ((1,), -1, 1, "batch_size=-1"),
    ],
)
def test_impossible_cases_are_refused(devices, batch_size, steps, message):
    with pytest.raises(InputError, match=message):
        time_cases(scaling_cases(devices, 2, batch_size), 8, "float32", 0, steps, 1)
