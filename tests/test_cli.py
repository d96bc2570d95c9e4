"""The command gravlens, functions that the scripts share, and TensorBoard's event files."""

import io
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from gravlens_jax import InputError, __version__, cli
from gravlens_jax.cli import CPU_FLAGS, HUGE_PAGES
from gravlens_jax.progress import Stopped
from helpers import ROOT, refuse, run, run_code

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MADVISE = SETTING.exists() and "[madvise]" in SETTING.read_text()
FAST = {"GLIBC_TUNABLES": HUGE_PAGES if MADVISE else None, "XLA_FLAGS": CPU_FLAGS if cli.has_cpu_flags() else None}

LINE = {"epoch": 1, "step": 3, "train_loss": 1.5, "train_accuracy": 0.25, "val_loss": 1.25, "val_accuracy": 0.5}
LINE |= {"learning_rate": 0.125, "images_per_second": 64.0, "wall_seconds": 1.0}
REPORT = {"n": 24, "accuracy": 0.75, "auc": {"no": 0.5, "vort": None}, "macro_auc": None, "checkpoint": "best"}


def test_program_restarts_once_with_the_fast_environment_unless_it_is_set(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not FAST.keys() & cli.fast_environment().keys()
    for name in FAST:
        monkeypatch.delenv(name)
    code = "import os; from gravlens_jax import cli; cli.set_environment(); print(*map(os.environ.get, {}))"
    assert run_code(code.format(list(FAST))) == "{} {}\n".format(*FAST.values())


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
    process = subprocess.run([command, "benchmark", "train", "--json-file", "none/a.jsonl"], **options)
    assert process.returncode == 2 and process.stderr.startswith("error: none/a.jsonl: there is no folder none")


@pytest.fixture
def quiet(monkeypatch):
    """`cli.run` changes no logging, signal handler or output of this process."""
    for name in ("silence_orbax", "_discard_output"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        ([], 0, "\n  train           Trains a network"),
        (["--version"], 0, f"gravlens_jax {__version__}\n"),
        (["trian"], 2, "error: gravlens trian: no such command; expected one of benchmark, evaluate, export"),
        (["learning-curve", "--help"], 0, "usage: gravlens learning-curve [-h]"),
    ],
)
def test_python_m_lists_commands_and_names_them_in_their_usage(arguments, status, text, quiet, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gravlens", *arguments])
    monkeypatch.setattr(sys, "path", paths := [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", None)
    before = [*paths]
    try:
        runpy.run_module("gravlens_jax", run_name="__main__")
    except SystemExit as stop:
        assert (stop.code or 0) == status
    assert text in "".join(capsys.readouterr())
    # Last, so that no script hides a package of its name.
    assert paths == [*before, str(ROOT / "scripts")][: len(paths)] and (len(paths) > len(before)) == ("-curve" in text)


def test_missing_device_or_cluster_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # means nothing without --coordinator
    error = run(tmp_path, "train.py", "--coordinator", "auto", "--data", "nowhere", status=2)
    assert error.startswith("error: --coordinator auto: JAX detects no complete cluster (") and "leave it out" in error
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    other = run(tmp_path, "train.py", "--data", "nowhere", status=2)
    assert other.startswith("error: JAX_PLATFORMS=cuda: this device cannot be used (") and "unset it" in other
    assert error.count("\n") == other.count("\n") == 1


@pytest.mark.parametrize("encoding, expected", [("ascii", b"\\xe9 \\udcff\n"), ("utf-8", b"\xc3\xa9 \\udcff\n")])
def test_text_is_printed_in_any_encoding(encoding, expected, quiet, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    cli.run(lambda: [print("é \udcff", file=stream, flush=True) for stream in streams])
    assert [stream.buffer.getvalue() for stream in streams] == [expected, expected]


@pytest.mark.parametrize("value, expected", [("", "~/.cache"), ("here", "~/.cache"), ("/c", "/c")])
def test_compiled_programs_are_kept_in_the_cache_folder_of_the_xdg_specification(value, expected, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(jax.config, "update", update := Mock())
    cli.use_compile_cache()
    update.assert_called_once_with("jax_compilation_cache_dir", str(Path(expected, "gravlens_jax").expanduser()))


def scalars(run_dir):
    """Returns (tag, step) -> value as TensorBoard shows them: a file's start at step s removes earlier s, s + 1, ..."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((run_dir / "tensorboard").glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # records: length, its CRC, event, its CRC
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == 1:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_shows_each_epoch_and_the_report_once_after_a_resume(tmp_path):
    train = runpy.run_path(str(ROOT / "scripts/train.py"))
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
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("mine")
    refuse("could not be written: ", train["write_epoch"], tmp_path, LINE)


@pytest.fixture(params=[1, 2])
def processes(request, quiet, monkeypatch):
    """The number of processes of a run, to which this one seems to belong."""
    monkeypatch.setattr(cli, "_several_processes", lambda: request.param > 1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return request.param


@pytest.mark.parametrize(
    "error, status, message",
    [
        (InputError("bad"), 2, "error: bad\n"),
        (FloatingPointError("bad"), 1, "error: bad\n"),
        (OSError(28, "No space"), 2, "error: [Errno 28] No space; free disk space, fix the permissions or choose"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped("run", 2, 9, 15), 143, "run: SIGTERM: stopped after step 2 of 9, which is saved; continue with"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), 2, "error: the device has too little memory (RESOURCE_EXHAUSTED"),
    ],
)
def test_errors_print_one_message_and_set_the_status(error, status, message, processes, capsys):
    cli.run(Mock(side_effect=BrokenPipeError()))  # the reader of the output has closed it: no error
    with pytest.raises(SystemExit) as stop:
        cli.run(Mock(side_effect=error))
    text = capsys.readouterr().err
    assert stop.value.code == status and text.startswith(message) and text.count("\n") == 1
    if "memory" in message:
        assert {"--batch-size", "--device-data,", "XLA_PYTHON_CLIENT_PREALLOCATE=false"} <= set(text.split(" "))
        assert "--resume" not in text


def test_signals_outside_of_training(quiet, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGTERM else None)
    handlers: dict = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    cli.run(lambda: None)
    assert handlers.keys() == {signal.SIGHUP, signal.SIGUSR1}  # SIGTERM was ignored
    assert handlers[signal.SIGUSR1](signal.SIGUSR1, None) is None
    with pytest.raises(SystemExit, match="129"):  # temporary files are removed
        handlers[signal.SIGHUP](signal.SIGHUP, None)


def test_unknown_error_keeps_its_traceback_and_a_lost_connection_is_one_message_of_several_processes(processes, capsys):
    for error in (AssertionError, ValueError, RuntimeError):
        with pytest.raises(error, match="ours"):
            cli.run(Mock(side_effect=error("ours")))
    with pytest.raises(SystemExit if processes > 1 else RuntimeError):
        cli.run(Mock(side_effect=RuntimeError("UNAVAILABLE: Connection reset by peer")))
    if processes > 1:
        assert "another process of this run has ended or cannot be reached" in (text := capsys.readouterr().err)
        assert "with --resume (UNAVAILABLE" in text and text.count("\n") == 1
