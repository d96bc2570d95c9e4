"""The command gravlens, functions that the scripts share, and TensorBoard's event files."""

import io
import os
import platform
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from commands import ROOT, run
from gravlens_jax import cli
from gravlens_jax.cli import CPU_FLAGS, HUGE_PAGES
from gravlens_jax.console import Stopped
from gravlens_jax.errors import InputError

LINE = {"epoch": 1, "step": 3, "train_loss": 1.5, "train_accuracy": 0.25, "val_loss": 1.25, "val_accuracy": 0.5}
LINE |= {"learning_rate": 0.125, "images_per_second": 64.0, "wall_seconds": 1.0}
REPORT = {"n": 24, "accuracy": 0.75, "auc": {"no": 0.5, "vort": None}, "macro_auc": None, "checkpoint": "best"}


def environment_after_restart(name, value):
    """Returns the environment variable `name` of a program that called `set_environment`; None: it was not set."""
    code = f"import os; from gravlens_jax import cli; cli.set_environment(); print(os.environ.get({name!r}))"
    environment = os.environ | {name: value}
    if value is None:
        del environment[name]
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def test_a_program_restarts_once_with_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("needs a Linux that provides huge pages on request")
    assert environment_after_restart("GLIBC_TUNABLES", None) == HUGE_PAGES
    assert environment_after_restart("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


def test_flags_of_xla_are_set_where_they_were_measured_and_can_be_turned_off():
    known = version("jaxlib").startswith("0.12.0") and platform.system() + platform.machine() == "Linuxx86_64"
    assert environment_after_restart("XLA_FLAGS", None) == (CPU_FLAGS if known else "None")
    assert environment_after_restart("XLA_FLAGS", "") == ""


@pytest.mark.parametrize("layout", ["clone", "wheel"])
def test_pip_installs_a_command_that_runs_the_scripts(layout, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, name = project["project"]["scripts"]["gravlens"].split(":")
    command, setup = tmp_path / "gravlens", project["tool"]["setuptools"]
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    command.chmod(0o755)
    for package in setup["packages"] if layout == "wheel" else ():
        for file in (ROOT / setup["package-dir"].get(package, package.replace(".", "/"))).glob("*.py"):
            (tmp_path / package.replace(".", "/")).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / package.replace(".", "/"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path if layout == "wheel" else ROOT)}
    environment.pop("GLIBC_TUNABLES", None)  # so that it restarts
    options = {"env": environment, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.run([command, "benchmark", "scale", "--figure", "none/a.png"], **options)
    assert process.returncode == 2 and process.stderr.startswith("error: none/a.png: there is no folder none")


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        (["--help"], 0, "\n  learning_curve  Draws the learning curves of runs beside"),
        ([], 0, "\n  train           Trains a network"),
        (["--version"], 0, "gravlens_jax "),
        (["trian"], 2, "error: gravlens trian: no such command; expected one of benchmark, evaluate, export"),
        (["learning-curve", "--help"], 0, "usage: gravlens learning-curve [-h]"),
    ],
)
def test_gravlens_lists_its_commands_and_names_them_in_their_usage(arguments, status, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gravlens", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", None)
    monkeypatch.setattr(cli, "silence_orbax", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    try:
        cli.main()
    except SystemExit as stop:
        assert (stop.code or 0) == status
    assert text in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "JAX_PLATFORMS=cuda: this device cannot be used ("),
        ({"JAX_PLATFORMS": "nothing"}, "JAX_PLATFORMS=nothing: this device cannot be used (Unable to initialize"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: JAX detects no complete cluster (coordinator"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: JAX detects no complete cluster ("),
        ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS=abc: expected a number of processes; unset SLURM_ST"),
        ({"JAX_COORDINATOR": "auto"}, "--coordinator auto: JAX detects no complete cluster ("),
    ],
)
def test_a_missing_device_or_cluster_is_one_error(environment, message, tmp_path, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    auto = ["--coordinator", environment.pop("JAX_COORDINATOR")] if "JAX_COORDINATOR" in environment else []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    error = run(tmp_path, "train.py", *auto, "--data", "nowhere", status=2)
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert "unset" in error or "leave it out" in error


def test_an_assertion_of_ours_is_no_missing_device():
    with pytest.raises(AssertionError, match="ours"):
        cli.run(Mock(side_effect=AssertionError("ours")))


@pytest.mark.parametrize(
    "script, arguments, text",
    [
        *((f.name, ["--help"], b"usage: ") for f in sorted((ROOT / "scripts").glob("*.py"))),
        ("predict.py", ["pretrained", "é.npy"], b"\\xe9.npy,"),
    ],
)
def test_text_is_printed_in_any_encoding(script, arguments, text, tmp_path, run_here, monkeypatch):
    np.save(tmp_path / arguments[-1], np.zeros((150, 150)))
    monkeypatch.setattr(sys, "stdout", stream := io.TextIOWrapper(io.BytesIO(), "ascii"))
    run_here(tmp_path, script, *arguments)
    stream.flush()
    assert text in stream.buffer.getvalue() and "\udcff".encode("ascii", str(stream.errors)) == b"\xff"


@pytest.mark.parametrize("value, expected", [(None, "~/.cache"), ("", "~/.cache"), ("here", "~/.cache"), ("/c", "/c")])
def test_compiled_programs_are_kept_in_the_cache_folder_of_the_xdg_specification(value, expected, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(jax.config, "update", update := Mock())
    cli.use_compile_cache()
    update.assert_called_once_with("jax_compilation_cache_dir", str(Path(expected, "gravlens_jax").expanduser()))


@pytest.fixture(scope="module")
def train():
    return runpy.run_path(str(ROOT / "scripts/train.py"))


def scalars(run_dir):
    """Returns (tag, step) -> value as TensorBoard shows them: a file's start at step s removes earlier s, s + 1, ..."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # records: length, its CRC, event, its CRC
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            if event.session_log.status == 1:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_tensorboard_shows_each_epoch_and_the_report_once_after_a_resume(train, tmp_path):
    for number, loss in enumerate((2.0, 1.5)):
        train["write_epoch"](tmp_path, LINE | {"train_loss": loss})
        train["write_epoch"](tmp_path, LINE | {"step": 6})
        train["write_report"](tmp_path, 6, REPORT)
        for file in (tmp_path / "tensorboard").glob("*.tfevents.1*"):  # the first ones as if written years earlier
            file.rename(file.with_name(file.name.replace("tfevents.1", f"tfevents.{number}")))
    expected = {"loss/train": 1.5, "loss/val": 1.25, "accuracy/train": 0.25, "accuracy/val": 0.5}
    expected |= {"learning_rate": 0.125, "images_per_second": 64.0}
    report = {("test/accuracy", 6): 0.75, ("test/auc/no", 6): 0.5}
    assert scalars(tmp_path) == {(tag, step): x for step in (3, 6) for tag, x in expected.items()} | report


def test_a_tensorboard_folder_that_cannot_be_written_is_one_error(train, tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match="could not be written: "):
        train["write_epoch"](tmp_path, LINE)


def test_training_does_not_start_without_tensorboardx(tmp_path, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    error = run_here(tmp_path, "train.py", "--preset", "smoke", "--tensorboard", "--run-dir", "run", status=2)
    assert error == 'error: --tensorboard needs tensorboardX; run: pip install "gravlens_jax[tensorboard]"\n'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, status, message",
    [
        (InputError("bad"), 2, "error: bad\n"),
        (FloatingPointError("bad"), 1, "error: bad\n"),
        (OSError(28, "No space"), 2, "error: [Errno 28] No space; free disk space, fix the permissions or choose"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped("saved", 15), 143, "saved\n"),
    ],
)
def test_errors_print_one_paragraph_and_set_the_status(error, status, message, monkeypatch, capsys):
    for name in ("silence_orbax", "_discard_output"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    cli.run(Mock(side_effect=BrokenPipeError()))  # the reader of the output has closed it: no error
    with pytest.raises(SystemExit) as stop:
        cli.run(Mock(side_effect=error))
    assert stop.value.code == status and capsys.readouterr().err.startswith(message)
