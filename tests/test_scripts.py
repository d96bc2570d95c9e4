"""The scripts as a user calls them, one after the other in one folder; most of them in this process."""

import json
import re
import shutil

import numpy as np
import pytest

from bench import simulation
from gravlens_jax.cli import HUGE_PAGES
from helpers import NETWORK, ROOT, SMALL, history, make_folders, run, run_code
from learning_curve import fit_power_law

PNG = b"\x89PNG\r\n\x1a\n"
SCRIPTS = sorted(f.name for f in (ROOT / "scripts").glob("*.py"))
POPULATION = "--train 0 --val 12 --test 0 --prior.shear-max 0.1 --prior.num-pixels 24 --prior.pixel-scale 0.3"
MAIN = "../gravlens_jax/__main__.py"  # the command gravlens
RUN_ALL = """
import os, runpy, sys
_, folder, scripts, *commands = sys.argv
os.chdir(folder)
for command in commands:
    print("=====" + command)
    script, *sys.argv[1:] = command.split()
    try:
        runpy.run_path(os.path.join(scripts, script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, command"""
WITHOUT_JAX = RUN_ALL + '\n    assert not {"jax", "torch"} & sys.modules.keys(), command'


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Command -> output, of --help of all scripts and of packing; all in one process, which prints ASCII."""
    folder = tmp_path_factory.mktemp("images")
    make_folders(folder / "images")
    scripts = *SCRIPTS, MAIN, *(f"benchmark.py {name}" for name in ("device", "train", "infer", "simulate", "compile"))
    commands = ["pack.py images packed", *(f"{script} --help" for script in scripts)]
    options = {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    parts = run_code(WITHOUT_JAX, folder, ROOT / "scripts", *commands, **options).split("=====")[1:]
    return dict(part.split("\n", 1) for part in parts)


def test_help_and_packing_import_no_jax_and_documented_commands_have_only_options_that_exist(printed):
    assert all("usage: " in printed[f"{script} --help"] for script in (*SCRIPTS, MAIN))
    assert "train.npz 6 images, val.npz 6 images, test.npz 6 images" in printed["pack.py images packed"]
    files = [ROOT / "README.md", *(ROOT / "scripts").rglob("*.md"), *(ROOT / "gravlens_jax").rglob("*.md")]
    texts, used = [file.read_text() for file in files] + list(printed.values()), {}
    for script, rest in re.findall(r"(\w+\.py)\b([^`\n#]*)", "\n".join(texts)):
        used.setdefault(script, set()).update(re.findall(r"--[\w-]+(?:\.[\w-]+)*", rest))
    assert len(used["train.py"]) > 5
    for script, options in used.items():
        helps = "\n".join(text for command, text in printed.items() if command.startswith(script))
        known = re.findall(r"^ +(--[\w.-]+)", helps, re.MULTILINE)
        assert options <= {*known}, script


def test_python_code_of_the_readme_runs():
    names = {}
    exec(re.search("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1], names)
    assert names["expected"].shape == (4, 150, 150) and names["outlier"].shape == (4,)
    assert names["probabilities"].argmax(1).tolist() == [2] * 4 and names["kappa"].shape == (4, 11, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with simulated data in data/ and a finished run in runs/a."""
    folder = tmp_path_factory.mktemp("work")
    out = run(folder, "train.py", *SMALL, "--run-dir", "runs/a", "--tensorboard")
    assert "epoch 4/4" in out and "test split: 24 images" in out
    return folder


def test_run_directory_holds_report_history_events_and_checkpoints(folder):
    run_dir, names = folder / "runs/a", {"metrics.json", "predictions.npz"}
    names |= {f"{name}.png" for name in ("history", "roc", "confusion", "examples", "substructure")}
    assert {f.name for f in (run_dir / "report").iterdir()} == names
    values = json.loads((run_dir / "report/metrics.json").read_text())
    keys = {"n", "accuracy", "loss", "auc", "macro_auc", "ece", "confusion", "classes", "checkpoint", "tta"}
    keys |= {"interval_95", "temperature", "ece_uncalibrated", "outliers", "deflection"}
    assert values.keys() == keys and values["n"] == 24 and values["checkpoint"] == "best"
    lines = history(run_dir)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [12, 18, 24, 30]  # 6 steps on easy images first
    events = {tuple(f.name.split(".")[-2:]) for f in (run_dir / "tensorboard").iterdir()}
    assert events == {(f"{step:010}", "epoch") for step in (12, 18, 24, 30)} | {("0000000030", "report")}
    best = min(lines, key=lambda line: line["val_loss"])["step"]
    assert {f.name for f in (run_dir / "checkpoints").iterdir()} == {str(best), "30"}


def test_limits_are_measured_on_simulated_images_with_their_lens_parameters(folder, run_here):
    run_here(folder, "limits.py", "pretrained", next(folder.glob("data/*/val.npz")), "limits")
    values = json.loads((folder / "limits/limits.json").read_text())
    assert {name: sum(b["n"] for b in bins) for name, bins in values["recall"].items()} == {"sphere": 8, "vort": 8}
    assert (folder / "limits/limits.png").read_bytes()[:8] == PNG and 0 < values["no_peak"] < 0.2


@pytest.mark.parametrize(
    "command, message",
    [
        ("train.py --run-dir runs/none --resume", "runs/none is not a run"),
        ("train.py --run-dir runs/a --resume --epochs 1", "--epochs is 1 but step 30 is done; give at least 4"),
        ("train.py --data nowhere --run-dir runs/c", "no such file"),
        (f"train.py {' '.join(SMALL)} --batch-size 100 --run-dir runs/c", "fewer than batch_size=100"),
        (f"train.py {' '.join(SMALL)} --input.crop 160 --run-dir runs/c", "the network's input is a crop of 160 x 160"),
        ("evaluate.py runs/a runs", "expected one folder for each of the classes"),
        ("predict.py runs/a nowhere.npy", "nowhere.npy: no such file or folder"),
        ("predict.py runs/a runs/a/config.json", "expected a file that ends in .npy, .fits, .fit,"),
        ("predict.py runs/a small.npy", "16 x 16 pixels, but the network was trained on 150 x 150"),
        ("simulate.py sim2 --train 0 --val 0 --test 0", "0 images asked for: nothing to do"),
        ("pack.py nowhere out --classes a,a", "expected at least two different names"),
        ("import_torch.py nowhere.npz runs/d", "nowhere.npz: no such file"),
        ("export.py runs/a a.pth", "expected a name that ends in .npz, .safetensors, .stablehlo"),
        ("learning_curve.py pretrained --figure none/a.png", "there is no folder none"),
        ("learning_curve.py pretrained --figure a.pdf", "a.pdf: expected a name that ends in .png"),
        (
            "evaluate.py pretrained data --checkpoint final",
            "pretrained.npz holds one network; leave --checkpoint final",
        ),
        ("benchmark.py simulate --json-file none/a.jsonl", "there is no folder none"),
    ],
)
def test_user_errors_print_one_message_and_exit_with_status_2(folder, command, message, run_here):
    np.save(folder / "small.npy", np.zeros((16, 16)))
    assert message in " ".join(run_here(folder, *command.split(), status=2).split())
    assert not [name for name in ("runs/c", "runs/d", "out", "sim2") if (folder / name).exists()]


def test_run_of_a_newer_version_predicts_and_is_exported_and_evaluated_but_not_resumed(folder, run_here):
    shutil.copytree(folder / "runs/a", folder / "runs/newer")
    path, data = folder / "runs/newer/config.json", next((folder / "data").iterdir()) / "test.npz"
    path.write_text(path.read_text().replace('"config": {', '"more": 1, "config": {"colour": "red",'))
    assert run_here(folder, "predict.py", "runs/newer", data) == run_here(folder, "predict.py", "runs/a", data)
    run_here(folder, "export.py", "runs/newer", "newer.npz")
    run_here(folder, "evaluate.py", "newer.npz", data)
    again, report = (json.loads((folder / d / "metrics.json").read_text()) for d in ("newer-report", "runs/a/report"))
    assert again["confusion"] == report["confusion"] and again["loss"] == pytest.approx(report["loss"], rel=1e-6)
    run_here(folder, "learning_curve.py", "runs/newer", "newer.npz", "pretrained", "--figure", "curve.png")
    assert (folder / "curve.png").read_bytes()[:8] == PNG
    assert "field 'more' is unknown" in run_here(folder, "train.py", "--run-dir", "runs/newer", "--resume", status=2)


def test_64_bit_mode_changes_no_image_and_no_prediction(folder, run_here):
    images = next(folder.glob("data/*/val.npz"))
    expected = run_here(folder, "predict.py", "runs/a", images)
    run_here(folder, "simulate.py", "sim", *POPULATION.split())
    commands = f"train.py --data {images.parent} {' '.join(NETWORK)} --epochs 1 --run-dir runs/x64"
    commands = f"simulate.py x64 {POPULATION}", commands, f"predict.py runs/a {images}"
    out = run_code(RUN_ALL, folder, ROOT / "scripts", *commands, JAX_ENABLE_X64="1", GLIBC_TUNABLES=HUGE_PAGES)
    assert out.endswith(expected)
    assert {f.name for f in (folder / "sim").iterdir()} == {".lock", "val.npz"}
    with np.load(folder / "sim/val.npz") as arrays, np.load(folder / "x64/val.npz") as others:
        assert arrays.files == others.files and arrays["info"] == others["info"]
        assert arrays["parameters/shear"].max() < 0.1
        for name in {*arrays.files} - {"info", "classes"}:  # powers of masses are rounded in another way
            rtol = 1e-5 if name.startswith("parameters") else 0
            np.testing.assert_allclose(arrays[name], others[name], rtol=rtol, strict=True)


def test_power_law_is_fitted_to_errors():
    a, b = fit_power_law([1e5, 1e6, 1e7], [0.1, 0.02, 0.004])
    assert a == pytest.approx(0.02) and b == pytest.approx(np.log10(5))


@pytest.mark.parametrize("command", ["infer --image-size 8 --batch-size 4 --steps 2", "simulate --seconds 0.1"])
def test_benchmarks_print_a_table_and_write_a_json_line_for_each_row(folder, command, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "CODES", {name: x for name, x in simulation.CODES.items() if "," not in name})
    out = run_here(folder, "benchmark.py", *command.split(), "--repeats", "1", "--json-file", tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(row["benchmark"] == command.partition(" ")[0] and "jax" in row["versions"] for row in rows)
    assert sum(line.startswith("|") for line in out.splitlines()) == len(rows) + 2 > 2
