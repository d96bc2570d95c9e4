"""The benchmarks' own code; tests/test_scripts.py runs scripts/benchmark.py."""

import json
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import gravlens_jax
from bench import costs, device, facts, harness, steps, sweep
from bench.costs import Case, Steps
from conftest import ROOT
from gravlens_jax.config import Config, InputConfig, ModelConfig
from gravlens_jax.model import ResNet, variable_shapes
from gravlens_jax.sharding import data_mesh
from helpers import refuse, run


def read_lines(path):
    """Returns the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_forward_flops_equal_the_compiler_count():
    model, images = ResNet(), jax.ShapeDtypeStruct((2, 100, 100, 1), jnp.float32)
    forward = jax.jit(model.apply).trace(variable_shapes(model), images).lower(lowering_platforms=("cuda",))
    # The compiler counts normalization and ReLU too, and leaves out products with the padding.
    assert costs.step_flops(Case(False, 1, 100)) == pytest.approx(forward.cost_analysis()["flops"] / 2, rel=0.05)


@pytest.mark.parametrize(
    "kind, float32, bfloat16, bandwidth",
    [
        ("NVIDIA H200", (494.7, "TF32"), (989.4, "bfloat16"), 4800),
        ("NVIDIA GH200 480GB", (494.7, "TF32"), (989.4, "bfloat16"), 4000),
        ("Tesla V100-SXM2-16GB", (15.7, "float32"), (125, "float16"), 900),
        ("AMD Instinct MI300X", (163.4, "float32"), (1307.4, "bfloat16"), 5300),
        ("TPU v5", (459, "bfloat16"), (459, "bfloat16"), 2765),
        ("TPU v5 lite", (197, "bfloat16"), (197, "bfloat16"), 819),
    ],
)
def test_peaks_of_devices_by_the_names_that_jax_reports(kind, float32, bfloat16, bandwidth):
    assert costs.find_peak(kind, "float32") == (float32[0], bandwidth, float32[1])
    assert costs.find_peak(kind, "bfloat16") == (bfloat16[0], bandwidth, bfloat16[1])
    assert costs.find_peak(f"{kind} NVL", "float32") is None  # of another variant


def test_peak_of_several_accelerators_is_their_sum_and_unknown_ones_need_both_numbers(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")])
    assert costs.peak_of("float32", 4) == (4 * 494.7, 4 * 4800, "TF32")
    assert costs.peak_of("float32", tflops=100.0) == (100, 4800, "TF32")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H300")])
    assert costs.peak_of("float32", 2, 100.0, 50.0) == (200, 100, "given")
    assert costs.peak_of("float32", 1, 100.0) is costs.peak_of("float32") is None


@pytest.mark.parametrize("tflops, gb, bound", [(5, 50, "compute"), (5, 700, "memory"), (1, 100, "latency")])
def test_bound_follows_from_the_intensity_and_the_fractions_of_both_peaks(tflops, gb, bound):
    row = costs.roofline(tflops, gb, costs.Peak(10, 1000, "TF32"))
    assert row["bound"] == f"{bound} bound" and row["ridge"] == 10 and row["intensity"] == 1000 * tflops / gb
    assert (row["intensity"] > row["ridge"]) == (tflops / 10 > row["bandwidth_fraction"])


def test_rows_are_in_the_table_and_in_the_file_when_a_later_one_fails(tmp_path, capsys):
    def rows():
        yield {"code": "a", "seconds": [0.25, 2]}
        yield {"code": "b"}
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            harness.report("some", rows(), "code {code}   s{seconds[0]:.2f}", tmp_path / "a.jsonl")
    assert [row["code"] for row in read_lines(tmp_path / "a.jsonl")] == ["a", "b", "a", "b"]
    table = "| code  |    s |", "|-------|-----:|", "| a     | 0.25 |", "| b     |    - |"
    assert capsys.readouterr().out.startswith("\n".join(table))


def test_lines_hold_all_that_measurements_depend_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_SOMETHING", f"{Path.home()}/cache:/home/somebody/else")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "some", f"{Path.home()}/a b"])
    harness.report("some", [{"code": "a", "seconds": 0.5}], "code {code}", tmp_path / "a.jsonl")
    (line,) = read_lines(tmp_path / "a.jsonl")
    assert (line["schema"], line["benchmark"], line["seconds"]) == (1, "some", 0.5)
    assert line["command"] == "benchmark.py some '~/a b'" and line["environment"]["JAX_SOMETHING"] == "~/cache:~/else"
    assert {"jax", "jaxlib", "flax", "optax", "python"} <= line["versions"].keys()
    assert line["gravlens_jax"] == gravlens_jax.__version__ and line["device_count"] == 2 and line["cpu"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", line["commit"]) if (ROOT / ".git").exists() else True
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line[name]) for name in ("time", "started"))
    assert "2 x cpu" in capsys.readouterr().out


def test_driver_and_libraries_of_an_accelerator_are_facts(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    monkeypatch.setattr(facts, "DRIVERS", (str(tmp_path / "none"), str(tmp_path / "version")))
    packages = {"nvidia-cudnn-cu12": "9.8.0", "jax_cuda12_plugin": "0.12.0", "libtpu": "0.0.20", "scipy": "1.14"}
    found = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in packages.items()]
    monkeypatch.setattr(facts, "distributions", lambda: found)
    assert facts.versions().keys() == {"python", "nvidia-cudnn-cu12", "jax-cuda12-plugin", "libtpu"}
    line = facts.describe(facts.machine_facts())
    assert "driver 570.86.15" in line and "nvidia-cudnn-cu12 9.8.0" in line and "libtpu 0.0.20" in line


@pytest.mark.parametrize("case", [Case(True, 4, 8, devices=2, depth=8), Case(True, 4, 8, steps_per_call=3, depth=8)])
def test_steps_are_timed_and_training_has_two_all_reduces_for_each_normalization_and_two_more(case):
    measure, found = steps.compile_step(case)
    seconds = measure(1, 5)
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[0] > 0
    assert len(measure(1, 5, most_seconds=0)) == 0 and len(measure(0, 5, most_seconds=1e-9)) == 1
    assert found["memory_mib"] > 0.01 and found["compile_seconds"] > 0
    assert found["collectives"] == ({"all-reduce": 2 * 7 + 2} if case.devices > 1 else {})


def test_sweep_options_that_measure_nothing_are_refused():
    for option in ({"batch_size": (0,)}, {"image_size": ()}, {"steps": 0}, {"dtype": ()}, {"devices": (0,)}):
        refuse(next(iter(option)), Steps, **option)


def test_programs_of_a_run_are_compiled_for_devices_and_their_collectives_counted():
    config = Config(batch_size=4, model=ModelConfig(depth=8, width=4), input=InputConfig(crop=24))
    train, _, logits, maps = steps.compile_run(config, data_mesh(2), "cpu")
    assert train["gflops"] > maps["gflops"] > logits["gflops"] > 0 and train["compile_seconds"] > 0
    parameters = sum(x.size for x in jax.tree.leaves(variable_shapes(ResNet(depth=8, width=4))["params"])) + 2 * 17
    assert train["collectives"] == {"all-reduce": 2 * 7 + 2} and maps["collectives"] == {}
    assert 4 * parameters < train["collective_mib"] * 2**20 < 4 * parameters + 2000


def test_small_tpu_topology_is_compiled_for(tmp_path):
    pytest.importorskip("libtpu")
    run(tmp_path, "benchmark.py", "compile", "--topology", "v5e:1x1", "--effort", "O0")
    rows = read_lines(tmp_path / "benchmark.jsonl")
    assert [row["program"] for row in rows] == ["train", "simulate", "logits", "map"]
    assert all(row["temporary_mib"] > 1 and row["topology"] == "v5e:1x1" for row in rows)


def test_device_is_measured_in_order_of_importance_and_errors_are_rows(monkeypatch, tmp_path, run_here):
    def compile_step(case):
        if case.batch_size == 8 and case.train:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")
        return lambda *_, **__: [0.5], {"accessed_bytes": 1e9, "compile_seconds": 1.0}

    def fit(config, on_epoch):
        for epoch, accuracy in enumerate((0.7, 0.96, 0.9, 0.97)):
            on_epoch({"step": 2 * epoch, "val_accuracy": accuracy, "images_per_second": 3.0})
        raise OSError("full disk")  # after its epochs

    monkeypatch.setattr(sweep, "compile_step", compile_step)
    monkeypatch.setattr(device, "fit", fit)
    monkeypatch.setattr(device, "SECONDS", 0.1)
    monkeypatch.setattr(costs, "cpu_peak", lambda: costs.Peak(1.0, 4.0, "float32"))
    arguments = ["--batch-sizes", "32", "8", "--runs", "files", "--profile", "trace"]
    out = run_here(tmp_path, "benchmark.py", "device", *arguments)
    rows = read_lines(tmp_path / "benchmark.jsonl")
    steps_, latency = rows[:2], rows[2]
    assert [row["steps_per_call"] for row in steps_] == [1, 64] and steps_[0]["gb_per_second"] == 2
    assert steps_[0]["images_per_second"] == 64 and steps_[0]["bound"] == "memory bound" and "bound" not in steps_[1]
    assert steps_[0]["peak"]["arithmetic"] == "float32" and list(tmp_path.glob("trace/**/*.xplane.pb"))
    assert latency["batch_size"] == 1 and latency["p99_seconds"] >= latency["step_seconds"] > 0
    assert rows[3]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory" and rows[3]["batch_size"] == 8
    *epochs, failed = [row for row in rows if row["measured"] == "run, images: files"]
    assert failed["error"] == "OSError: full disk"
    assert [row["note"] for row in epochs] == ["", "95% reached", "", ""] and "95% reached" in out
    assert epochs[0]["busy_fraction"] == 3 / 64 and epochs[1]["image_steps"] == 64
    assert rows[-1]["measured"] == "logits, as on the CPU?" and (rows[-1]["difference"], rows[-1]["same"]) == (0, 1)
    assert sum("error" in row for row in rows) == 3 and sum(row["measured"] == "simulation" for row in rows) == 2
    stored = [row["images_per_second"] for row in rows if row["measured"] == "images from a file"]
    assert len(stored) == 2 and min(stored) > 0


def test_device_ends_with_what_is_measured_when_the_budget_is_used_up(monkeypatch, tmp_path, run_here):
    def measurements(options):
        return [({"measured": "a"}, lambda: [{}]), ({"measured": "b"}, lambda: [time.sleep(30)])]

    monkeypatch.setattr(device, "measurements", measurements)
    out = run_here(tmp_path, "benchmark.py", "device", "--budget-minutes", "0.02")
    assert [row["measured"] for row in read_lines(tmp_path / "benchmark.jsonl")] == ["a"]
    assert "the budget of 0.02 minutes is used up" in out and "1 lines added" in out
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))  # Ctrl-C
    assert run_here(tmp_path, "benchmark.py", "device", status=130) == "interrupted\n"


def test_steps_are_measured_over_several_devices(monkeypatch):
    monkeypatch.setattr(sweep, "compile_step", lambda case: (lambda *_, **__: [case.devices], {"accessed_bytes": 0}))
    rows = list(sweep.sweep(True, Steps((4, 8), (8,), devices=(1, 2), peak_tflops=1.0, peak_gb=1.0)))
    found = [(row["batch_size"], row["devices"], row["images_per_second"]) for row in rows]
    assert found == [(4, 1, 4), (4, 2, 2), (8, 1, 8), (8, 2, 4)]
