"""All that is worth knowing of a device, in order of importance, within a budget of time."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.costs import Case, Device, Dtype, Source, peak_of, quartiles
from bench.harness import Row, time_calls
from bench.steps import compile_program
from bench.sweep import RATE_COLUMNS, measure_step
from gravlens_jax import load_pretrained, predict_logits
from gravlens_jax.config import CLASSES, PRESETS, SPLITS, STREAM, Config, ModelConfig
from gravlens_jax.inference import logits
from gravlens_jax.lensing.images import labels_of, simulate_images
from gravlens_jax.lensing.priors import PRIORS
from gravlens_jax.npz import open_npz, read_rows, write_npz
from gravlens_jax.sharding import data_mesh
from gravlens_jax.stream import StreamData
from gravlens_jax.training import fit

SECONDS = 4.0  # of a measurement, at most
TARGET = 0.95  # validation accuracy
SOURCES: dict[Source, dict[str, Any]] = {  # of training images, and the options that ask for them
    "device": {"device_data": True},
    "files": {},
    "simulate": {"data": f"{STREAM}ct1"},
}
COLUMNS = (
    "measured                {measured}batch{batch_size}dtype   {dtype}a call{steps_per_call}"
    f"{RATE_COLUMNS}  99 % s{{p99_seconds:.3g}}minutes{{minutes:.2f}}  busy{{busy_fraction:.1%}}"
    "accuracy{val_accuracy:.4f}note {note}"
)
Measurement = tuple[Row, Callable[[], Iterable[Row]]]  # what is known before, and a function that measures the rest


@contextmanager
def time_limit(minutes: float) -> Iterator[None]:
    """Ends its block after some minutes as Ctrl-C does, but without an error: when the current XLA program is done."""
    over = []

    def end(*_: Any) -> None:
        over.append(True)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except KeyboardInterrupt:
        if not over:
            raise KeyboardInterrupt from None  # whatever was stopped, there is nothing to resume
        print(f"the budget of {minutes:g} minutes is used up; --budget-minutes allows more")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def measure_device(options: Device) -> Iterator[Row]:
    """Yields the figures of `measurements`; of one that fails, because of too little memory for example, its error.

    An epoch of a run also has busy_fraction, the fraction of its time that its steps need by themselves, if these were
    measured: its images per second over theirs.
    """
    recipe = PRESETS[options.preset]
    alone: dict[int, float] = {}  # batch size -> images per second of training steps
    for known, measure in measurements(options):
        try:
            for figures in measure():
                row = known | figures | {"note": figures.get("note", "")}
                n, rate = row.get("batch_size", 0), row.get("images_per_second", 0.0)
                if row.get("train") and recipe.model == ModelConfig():
                    alone.setdefault(n, rate)
                elif "epochs" in row and n in alone and rate:
                    row["busy_fraction"] = rate / alone[n]
                yield row
        except Exception as error:  # the next ones may work
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield known | {"error": text, "note": text}


def measurements(options: Device) -> list[Measurement]:
    """Returns all measurements of a device, the most important ones first."""
    a, recipe = options, PRESETS[options.preset]
    size, (first, *sizes) = recipe.input.crop // recipe.input.pool, a.batch_sizes

    def step(n: int, dtype: Dtype, train: bool, steps_per_call: int = 1, profile: Path | None = None) -> Measurement:
        peaks = (a.peak_tflops if dtype == a.dtypes[0] else None, a.peak_gb)
        case = Case(train, n, size, dtype, steps_per_call=steps_per_call)
        known = {"measured": "training step" if train else "inference"} | case._asdict()
        return known, lambda: [measure_step(case, peak_of(dtype, 1, *peaks), 5, 30, 1, SECONDS, profile=profile)]

    float32 = {"dtype": "float32"}
    essential = [
        step(first, a.dtypes[0], True, profile=a.profile),
        step(first, a.dtypes[0], True, a.steps_per_call),
        ({"measured": "one image, host to host", "batch_size": 1} | float32, latency),
        *(step(n, a.dtypes[0], True) for n in sizes),
        *(step(n, a.dtypes[0], False) for n in a.batch_sizes),
    ]
    trained = [
        ({"measured": f"run, images: {name}", "batch_size": recipe.batch_size}, partial(run, recipe, name))
        for name in a.runs
    ]
    rest = [step(n, dtype, train) for dtype in a.dtypes[1:] for train in (True, False) for n in a.batch_sizes]
    simulated = [({"measured": "simulation", "batch_size": n} | float32, partial(simulate, n)) for n in a.batch_sizes]
    stored = [({"measured": "images from a file", "batch_size": n}, partial(read_images, n)) for n in a.batch_sizes]
    compared = {"measured": "logits, as on the CPU?"} | float32, compare_logits
    return [*essential, *trained, *rest, *simulated, *stored, compared]


def latency() -> Iterator[Row]:
    """Yields the figures of inference of one image of 150 x 150 pixels: from numpy to numpy, checks not included."""
    network = load_pretrained()
    variables = jax.device_put({name: network.variables[name] for name in ("params", "batch_stats")})
    image = np.random.default_rng(0).poisson(100, (1, 150, 150)).astype(np.float32)
    infer, facts = compile_program(jax.jit(partial(logits, network.model)).lower(variables, image))
    seconds = time_calls(lambda: np.asarray(infer(variables, image)), 50, 1000, SECONDS)
    yield facts | quartiles(seconds, 1) | {"p99_seconds": float(np.quantile(seconds, 0.99))}


def simulate(n: int) -> Iterator[Row]:
    """Yields the figures of rendering a batch of `n` images of the population, with noise, on the device."""
    source = StreamData(n, PRIORS["ct1"], SPLITS.index("train"), n, 0, data_mesh(1), None)
    render, facts = compile_program(source.render.lower(*3 * [np.int32(0)]))
    yield facts | quartiles(time_calls(partial(render, *3 * [np.int32(0)]), 1, 20, SECONDS), n)


def read_images(n: int) -> Iterator[Row]:
    """Yields the figures of reading `n` random images of 150 x 150 pixels from a packed file in the page cache."""
    images, rng = 4 * max(n, 1024), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, pixels = Path(folder) / "images.npz", rng.integers(100, size=(images, 150, 150), dtype=np.uint16)
        write_npz(path, [pixels], pixels.shape, pixels.dtype, labels_of(images), CLASSES, {})
        dataset = open_npz(path)
        yield quartiles(time_calls(lambda: read_rows(dataset.images, rng.choice(images, n)), 3, 100, SECONDS), n)


def run(recipe: Config, source: Source) -> Iterator[Row]:
    """Simulates the images of a run and trains, in a temporary folder; yields a row for each complete epoch.

    Rows have epochs, of the whole run; image_steps; minutes, since the start; val_accuracy; and images_per_second. The
    first that reaches TARGET says so.
    """
    start, rows = time.perf_counter(), list[Row]()

    def add(line: Row) -> None:
        first = line["val_accuracy"] >= TARGET > max((row["val_accuracy"] for row in rows), default=0)
        row = {"image_steps": line["step"] * recipe.batch_size, "minutes": (time.perf_counter() - start) / 60}
        row |= {name: line[name] for name in ("val_accuracy", "images_per_second")}
        rows.append({"epochs": recipe.epochs} | row | {"note": f"{TARGET:.0%} reached" * first})

    with tempfile.TemporaryDirectory() as folder:
        simulation = replace(recipe.simulation, folder=f"{folder}/data")
        config = replace(recipe, simulation=simulation, run_dir=f"{folder}/run", **SOURCES[source])
        try:
            with redirect_stdout(sys.stderr):  # which is not the place of the table
                fit(config, on_epoch=add)
        finally:  # also of a run that was stopped or has failed
            yield from rows


def compare_logits() -> Iterator[Row]:
    """Yields how the pretrained network's logits of 300 images differ between the default device and the CPU.

    Returns:
      difference, the largest; and same, the fraction of equal classes.
    """
    network = load_pretrained()
    images = np.concatenate(list(simulate_images(300, 0, SPLITS.index("test"), PRIORS["ct1"])))
    here = predict_logits(network.model, network.variables, images)
    with jax.default_device(jax.devices("cpu")[0]):
        there = predict_logits(network.model, network.variables, images)
    same, difference = float(np.mean(here.argmax(1) == there.argmax(1))), float(np.abs(here - there).max())
    yield {"difference": difference, "same": same, "note": f"within {difference:.1e}, same class {same:.1%}"}
