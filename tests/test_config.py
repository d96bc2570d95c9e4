import json
import math
from dataclasses import asdict, replace
from itertools import product
from typing import get_args, get_type_hints

import numpy as np
import pytest

from gravlens_jax.config import PRESETS, AugmentConfig, Config, InputConfig, ModelConfig, from_dict
from gravlens_jax.lensing import PRIORS, Priors, simulate_images
from gravlens_jax.lensing.priors import RANGES
from gravlens_jax.preprocess import prepare, to_unit
from gravlens_jax.run_files import RunInfo
from helpers import TINY_INFO, refuse

TINY, BELOW_1 = 1e-9, 1 - 1e-9
BOUNDS = {  # numeric fields: values just outside of their bounds, values just inside
    "learning_rate std": ([0.0], [TINY]),
    "weight_decay deflection_weight max_rotation": ([-TINY], [0.0]),
    "train easy val test warmup_steps plateau_patience": ([-1], [0]),
    "epochs batch_size": ([0], [1]),
    "seed": ([-1, 2**31], [0, 2**31 - 1]),
    "crop": ([0, 2**14 + 2], [2, 2**14]),
    "pool": ([0, 85], [1, 84]),
    "mean": ([], [-1e9, 1e9]),
    "max_shift": ([-TINY, 1.0], [0.0, BELOW_1]),
    "depth": ([2, 1208], [8, 1202]),
    "width": ([0, 2**12 + 1], [1, 2**12]),
    "plateau_factor": ([0.0, 1.0], [TINY, BELOW_1]),
    "psf_pixels": ([-1, 0, 10, 9], [11, 149]),
    "z_lens_max": ([0.8], [0.8 - TINY]),
    "z_source_min": ([0.6], [0.6 + TINY]),
    "subhalo_number": ([31.0], [30.0]),
    "subhalo_slope": ([-1.0], [-1 - TINY, -1 + TINY]),
    "subhalo_padding": ([54], [55]),
}


def bounded_fields():
    """Yields (dataclass, numeric field, values outside, values inside), with the bounds that follow from the type."""
    table = {name: bounds for names, bounds in BOUNDS.items() for name in names.split()}
    for cls in (Config, *(type(part) for part in vars(Config()).values() if hasattr(part, "__post_init__")), Priors):
        for name, hint in get_type_hints(cls).items():
            kinds, (outside, inside) = {hint, *get_args(hint)}, table.get(name, ([], []))
            if cls is Priors and {int, float} & kinds:
                ends = RANGES[name.removesuffix("_min").removesuffix("_max")]
                step = 1 if int in kinds else 1e-6 * ends[1]
                outside = [*outside, ends[0] - step, ends[1] + step]
            if cls is Priors and name.endswith(("_min", "_max")):  # which bound each other
                low = name.endswith("min")
                other = vars(Priors())[name[:-3] + ("max" if low else "min")]
                outside, inside = [*outside, math.nextafter(other, math.inf if low else -math.inf)], [*inside, other]
            if {int, float} & kinds:
                inside = inside or [vars(cls()).get(name)]
                yield cls, name, outside + [math.nan, math.inf, -math.inf] * (float in kinds), inside


@pytest.mark.parametrize("cls, name, outside, inside", [*bounded_fields()])
def test_numbers_outside_of_their_bounds_are_refused(cls, name, outside, inside):
    assert outside or name == "mean", "has no entry in BOUNDS"
    for value in outside:
        refuse(rf"\b{name}=", replace, cls(), **{name: value})
    for value in inside:
        replace(cls(), **{name: value})


def values(config, **change):
    return json.loads(json.dumps(asdict(config))) | change


def test_json_round_trip_is_exact_and_damaged_json_is_refused():
    for preset in PRESETS.values():
        assert from_dict(Config, values(preset)) == preset
    for message, change in {
        "'colour' is unknown": {"colour": 1},
        r"config.epochs: expected .*int.*, got '6'": {"epochs": "6"},
        "config.epochs": {"epochs": True},
        "config.input: field '.*' is missing": {"input": {"crop": 100}},
        r"stretch: expected one of \('linear', .* got 'cube'": {"input": values(InputConfig(), stretch="cube")},
        "crop=75 is not a multiple of pool=2": {"input": values(InputConfig(), crop=75, pool=2)},
        "rotation: expected .*, got 1000": {"augment": values(AugmentConfig(), max_rotation=10**400)},
        r"depth=21: expected 6n \+ 2 layers, .* at most 1202": {"model": values(ModelConfig(), depth=21)},
        "data=simulate:ct2: expected simulate: and one of ct1, model_a": {"data": "simulate:ct2"},
        "leave one out": {"data": "simulate:ct1", "device_data": True},
    }.items():
        refuse(message, from_dict, Config, values(Config(), **change))
    run = TINY_INFO._asdict() | {"config": values(Config()), "image_shape": [16, 16], "classes": ["a", "b"]}
    for name, value in product(("image_shape", "classes"), ("ab", [], [1, 2, "3"], [1, "2"], None)):
        refuse(rf"config\.{name}.*: expected", from_dict, RunInfo, run | {name: value})
    assert from_dict(RunInfo, run).classes == ("a", "b")


def test_prepared_images_have_mean_0_and_deviation_1():
    images = np.concatenate(list(simulate_images(90, 3, 0, PRIORS["ct1"])))
    x = prepare(to_unit(images), InputConfig())
    assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1


def test_paths_of_a_run_are_absolute_but_not_the_name_of_a_stream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = Config(data="packed").resolve()
    expected = [f"{tmp_path}/{name}" for name in ("packed", "data")]
    assert [resolved.data, resolved.simulation.folder] == expected
    assert resolved.resolve() == resolved and resolved.stream is None
    assert Config(data="simulate:ct1").stream == Config(data="simulate:ct1").resolve().stream == "ct1"
