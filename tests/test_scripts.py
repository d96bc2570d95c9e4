"""The scripts as a user calls them, one after the other in one folder; most of them in this process."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from commands import ROOT, SMALL, history, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with simulated data in data/ and a finished run in runs/a."""
    folder = tmp_path_factory.mktemp("work")
    out = run(folder, "train.py", *SMALL, "--run-dir", "runs/a", "--tensorboard")
    assert "epoch 4/4" in out and "test split: 24 images" in out
    return folder


def test_device_data_gives_the_same_run(folder):
    run(folder, "train.py", *SMALL, "--run-dir", "runs/device", "--device-data")
    for ours, theirs in zip(history(folder / "runs/device"), history(folder / "runs/a"), strict=True):
        for name in ("step", "train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_run_directory_holds_everything(folder):
    names = {str(f.relative_to(folder / "runs/a")) for f in (folder / "runs/a").rglob("*")}
    assert {"config.json", "metrics.jsonl", "report/metrics.json", "report/predictions.npz"} <= names
    for figure in ("history", "roc", "confusion", "examples", "saliency"):
        assert (folder / f"runs/a/report/{figure}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    values = json.loads((folder / "runs/a/report/metrics.json").read_text())
    keys = {"n", "accuracy", "loss", "auc", "macro_auc", "ece", "confusion", "classes", "checkpoint", "tta"}
    keys |= {"interval_95", "temperature", "ece_uncalibrated"}
    assert values.keys() == keys and values["n"] == 24 and values["checkpoint"] == "best"
    lines = history(folder / "runs/a")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [12, 18, 24, 30]  # 6 steps on easy images first
    events = {tuple(f.name.split(".")[-2:]) for f in (folder / "runs/a/tensorboard").iterdir()}
    assert events == {(f"{step:010}", "epoch") for step in (12, 18, 24, 30)} | {("0000000030", "report")}
    best = min(lines, key=lambda line: line["val_loss"])["step"]
    assert {f.name for f in (folder / "runs/a/checkpoints").iterdir()} == {str(best), "30"}


def test_evaluate_reproduces_the_report(folder, run_here):
    data = next((folder / "data").iterdir()) / "test.npz"
    run_here(folder, "evaluate.py", "runs/a", data, "--out", "again")
    again, report = (json.loads((folder / d / "metrics.json").read_text()) for d in ("again", "runs/a/report"))
    assert again == report
    with np.load(folder / "again/predictions.npz") as predictions:
        assert predictions["logits"].shape == (24, 3) and predictions["logits"].dtype == np.float32
        assert predictions["labels"].dtype == np.int32


def test_predict_reads_a_compressed_file_once(folder, run_here):
    (folder / "compressed").mkdir()
    np.savez_compressed(folder / "compressed/a.npz", images=np.random.default_rng(0).random((2, 150, 150)))
    for path in ("compressed", "compressed", "compressed/a.unpacked.npz"):  # the first time, it is unpacked
        assert len(run_here(folder, "predict.py", "runs/a", path).splitlines()) == 3


def test_predict_prints_csv_for_npy_npz_and_folders(folder, run_here):
    rng = np.random.default_rng(0)
    for name in ("images/x.npy", "images/sub/y.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, rng.random((1, 150, 150)))
    np.savez(folder / "two.npz", images=rng.random((2, 150, 150)))
    rows = list(csv.DictReader(io.StringIO(run_here(folder, "predict.py", "runs/a", "images", "two.npz"))))
    assert [row["file"] for row in rows] == ["images/sub/y.npy", "images/x.npy", "two.npz[0]", "two.npz[1]"]
    for row in rows:
        probabilities = {name: float(row[f"p_{name}"]) for name in ("no", "sphere", "vort")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(probabilities, key=probabilities.get)


def test_simulate_writes_splits_parameters_and_a_figure(folder, run_here):
    arguments = ["--train", "0", "--val", "6", "--test", "3", "--prior.shear-max", "0.1"]
    run_here(folder, "simulate.py", "sim", *arguments, "--parameters", "--figure", "sim.png")
    assert sorted(f.name for f in (folder / "sim").iterdir()) == ["test.npz", "val.npz"]
    assert (folder / "sim.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with np.load(folder / "sim/val.npz", allow_pickle=False) as archive:
        assert archive["parameters/shear"].max() < 0.1


def test_simulation_benchmark_prints_a_table_and_a_json_line(folder, run_here):
    out = run_here(folder, "benchmark.py", "simulate", "--seconds", "0.1", "--repeats", "1", "--no-lenstronomy")
    for row in json.loads(out.splitlines()[-1])["images_per_second"]:
        assert row["code"] == "gravlens_jax" and row["all"] > 0


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("train.py", [*SMALL, "--run-dir", "runs/a"], "runs/a already holds a run; continue it with --resume"),
        ("train.py", ["--run-dir", "runs/none", "--resume"], "runs/none is not a run"),
        ("train.py", ["--run-dir", "runs/a", "--resume", "--epochs", "9"], "--epochs is 9 but the run to resume has 4"),
        ("train.py", ["--model.depth", "21"], "depth=21: expected 6n + 2 layers"),
        ("train.py", ["--colour", "red"], "--colour"),
        ("train.py", ["--data", "nowhere", "--run-dir", "runs/c"], "no such file"),
        ("train.py", ["--data", "nan", "--run-dir", "runs/c"], "nan/val.npz: images[1] has NaN or infinite pixels"),
        ("evaluate.py", ["runs/a", "nan/val.npz", "--out", "runs/c"], "nan/val.npz: images[1] has NaN or infinite"),
        ("finetune.py", ["runs/a", "nan/val.npz", "c.npz"], "nan/val.npz: images[1] has NaN or infinite pixels"),
        ("train.py", [*SMALL, "--batch-size", "100", "--run-dir", "runs/c"], "fewer than batch_size=100"),
        ("train.py", [*SMALL, "--input.crop", "160", "--run-dir", "runs/c"], "the network's input is a crop of 160"),
        ("evaluate.py", ["runs/a", "nowhere.npz"], "no such file"),
        ("evaluate.py", ["runs/none", "nowhere.npz"], "runs/none is not a run"),
        ("evaluate.py", ["runs/a", "runs"], "expected one folder for each of the classes"),
        ("predict.py", ["runs/a"], "no PATH given"),
        ("predict.py", ["runs/a", "nowhere.npy"], "nowhere.npy: no such file or folder"),
        ("predict.py", ["runs/a", "runs/a/config.json"], "expected a .npy or .npz file or a folder"),
        ("predict.py", ["runs/a", "small.npy"], "16 x 16 pixels, but the network was trained on 150 x 150"),
        ("predict.py", ["runs/a", "nan.npy"], "NaN or infinite pixels"),
        ("simulate.py", ["sim2", "--train", "-3"], "train=-3: a number of images cannot be negative"),
        ("simulate.py", ["sim2", "--train", "0", "--val", "0", "--test", "0"], "0 images asked for: nothing to do"),
        ("simulate.py", ["sim2", "--prior.shear-min", "0.5"], "shear_min=0.5 is larger than shear_max=0.3"),
        ("pack.py", ["nowhere", "out"], "has neither train/ nor val/"),
        ("pack.py", ["nowhere", "out", "--classes", "a,a"], "expected at least two different names"),
        ("import_torch.py", ["nowhere.npz", "runs/d"], "nowhere.npz: no such file"),
        ("export.py", ["runs/a", "a.pth"], "expected a name that ends in .npz, .safetensors, .stablehlo"),
        ("finetune.py", ["runs/a", "nowhere.npz", "new.npz"], "nowhere.npz: no such file"),
        ("finetune.py", ["runs/a", "runs", "new.npz", "--classes", "x,y"], "expected one folder for each of the"),
        ("finetune.py", ["runs/a", "runs", "new"], "new: expected a name that ends in .npz, .safetensors, .stablehlo"),
        ("learning_curve.py", [], "no RUN given"),
        ("learning_curve.py", ["pretrained", "--figure", "none/a.png"], "there is no folder none"),
        ("simulate.py", ["sim2", "--figure", "none/a.png"], "there is no folder none"),
        ("benchmark.py", ["scale", "--figure", "none/a.png"], "there is no folder none"),
        ("pack.py", ["two.npz", "runs"], "runs exists; give the name of a new file"),
        ("benchmark.py", ["simulate", "--repeats", "0"], "repeats=0: expected positive numbers"),
    ],
)
def test_user_errors_print_one_message_and_exit_with_status_2(folder, script, arguments, message, run_here):
    np.save(folder / "small.npy", np.zeros((16, 16)))
    np.save(folder / "nan.npy", np.full((150, 150), np.nan))
    (folder / "nan").mkdir(exist_ok=True)
    for split, value in (("train", 0), ("val", np.nan), ("test", 0)):
        images = np.zeros((3, 150, 150), np.float32)
        images[1, 70, 70] = value
        np.savez(folder / f"nan/{split}.npz", images=images, labels=np.arange(3))
    assert message in " ".join(run_here(folder, script, *arguments, status=2).split())
    assert not [name for name in ("runs/c", "runs/d", "c.npz") if (folder / name).exists()]


@pytest.mark.parametrize("script", sorted(f.name for f in (ROOT / "scripts").glob("*.py")))
def test_help_is_printed(tmp_path, script, run_here):
    assert "usage" in run_here(tmp_path, script, "--help")


def test_exported_network_predicts_as_its_run(folder, run_here):
    data = next((folder / "data").iterdir()) / "test.npz"
    run_here(folder, "export.py", "runs/a", "a.npz")
    assert run_here(folder, "predict.py", "a.npz", data) == run_here(folder, "predict.py", "runs/a", data)
    run_here(folder, "evaluate.py", "a.npz", data)
    assert (folder / "a-report/metrics.json").read_text() == (folder / "runs/a/report/metrics.json").read_text()


def test_finetuning_learns_other_classes(folder, run_here):
    rng = np.random.default_rng(0)
    for number in range(24):
        for name, place in (("flat", np.s_[68:82, 50:100]), ("tall", np.s_[50:100, 68:82])):
            image = rng.random((150, 150)) * 0.2
            image[place] += 0.5
            (folder / "bars" / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / "bars" / name / f"{number}.npy", image)
    out = run_here(folder, "finetune.py", "runs/a", "bars", "bars.npz", "--epochs", "6", "--batch-size", "8")
    assert "epoch 6/6" in out and "bars.npz: classes flat, tall" in out
    rows = list(csv.DictReader(io.StringIO(run_here(folder, "predict.py", "bars.npz", "bars"))))
    assert rows[0].keys() == {"file", "class", "p_flat", "p_tall"}
    assert np.mean([row["class"] == Path(row["file"]).parent.name for row in rows]) > 0.9
    run_here(folder, "evaluate.py", "bars.npz", "bars")
    assert json.loads((folder / "bars-report/metrics.json").read_text())["accuracy"] > 0.9


def test_learning_curves_are_drawn(folder, run_here):
    run_here(folder, "learning_curve.py", "runs/a", "pretrained", "--figure", "curve.png")
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pretrained_network_is_selected_by_its_name(folder, run_here):
    data = next((folder / "data").iterdir()) / "test.npz"
    assert len(run_here(folder, "predict.py", "pretrained", data).splitlines()) == 1 + 24


def test_inference_benchmark_prints_a_table_and_a_json_line(folder, run_here):
    options = ["--image-size", "8", "--batch-size", "4", "6", "--steps", "2", "--warmup", "1", "--repeats", "1"]
    table, line = run_here(folder, "benchmark.py", "infer", *options).rsplit("\n", 2)[:2]
    result = json.loads(line)
    assert [row["batch_size"] for row in result["rows"]] == [4, 6] and "of peak" in table
    assert all(row["images_per_second"] > 0 for row in result["rows"]) and result["versions"]["jax"]
    assert "expected one positive number" in run_here(folder, "benchmark.py", "train", "--batch-size", "0", status=2)


def test_scaling_benchmark_splits_a_cpu_and_draws(folder):
    options = ["--devices", "2", "--image-size", "8", "--batch-per-device", "2", "--steps", "2", "--repeats", "1"]
    out = run(folder, "benchmark.py", "scale", *options, "--figure", "scale.png")
    result = json.loads(out.splitlines()[-1])
    assert [(row["scaling"], row["devices"], row["batch_size"]) for row in result["rows"]] == [
        ("weak", 2, 4),
        ("strong", 2, 4),
    ]
    assert result["device_kind"] == "cpu" and result["matmul_precision"] and "share the cores" in out
    assert (folder / "scale.png").stat().st_size > 0
