import json
import math
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pytest

from gravlens_jax.config import PRESETS, AugmentConfig, Config, InputConfig, ModelConfig, from_dict
from gravlens_jax.errors import InputError, parse_json
from gravlens_jax.lensing import PRESETS as PRIORS
from gravlens_jax.lensing import simulate_images
from gravlens_jax.model import make_model
from gravlens_jax.preprocess import prepare, to_unit


def values(config, **change):
    return json.loads(json.dumps(asdict(config))) | change


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_is_exact(preset):
    assert from_dict(Config, values(PRESETS[preset])) == PRESETS[preset]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": 1}, "'colour' is unknown"),
        ({"epochs": "6"}, r"config.epochs: expected .*int.*, got '6'"),
        ({"epochs": True}, "config.epochs"),
        ({"input": {"crop": 100}}, "config.input: field '.*' is missing"),
        ({"input": 3}, "config.input: expected an object"),
        ({"input": values(InputConfig(), stretch="cube")}, r"input.stretch: expected one of \('linear', .* got 'cube'"),
        ({"input": values(InputConfig(), crop=75, pool=2)}, "crop=75 is not a multiple of pool=2"),
        ({"input": values(InputConfig(), crop=10**6)}, "crop=1000000: expected at most 16384"),
        ({"seed": -1}, "seed=-1"),
        ({"augment": values(AugmentConfig(), max_rotation=math.inf)}, "max_rotation: expected .*, got inf"),
        ({"augment": values(AugmentConfig(), max_rotation=10**400)}, "max_rotation: expected .*, got 1000"),
        ({"model": values(ModelConfig(), width=10**9)}, "width=1000000000: expected 1 to 4096"),
        ({"model": values(ModelConfig(), depth=6 * 10**6 + 2)}, "depth=6000002: .* at most 1202"),
        *(({"model": values(ModelConfig(), depth=depth)}, "6n \\+ 2") for depth in (0, 2, 7, 21)),
        ({"data": "simulate:ct2"}, "data=simulate:ct2: expected simulate: and one of ct1, model_a"),
        ({"data": "simulate:ct1", "device_data": True}, "leave one out"),
    ],
)
def test_damaged_json_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(Config, values(Config(), **change))


@pytest.mark.parametrize("text", [b"\xff\xfe\xfa", b"[" * 10**5, b"1" * 5000, b"{'a': 1}", b""])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(InputError, match="a file is not readable JSON"):
        parse_json(text, "a file")


class Tuples(NamedTuple):
    image_shape: tuple[int, int] = (1, 2)
    classes: tuple[str, ...] = ("a", "b")


@pytest.mark.parametrize("value", [None, "ab", [], [1], [1, 2, 3], [1, "2"], [1, 2.0], [1, True], {"a": 1, "b": 2}])
@pytest.mark.parametrize("field", Tuples._fields)
def test_tuples_are_lists_of_the_right_length_and_type(field, value):
    lists = {"image_shape": [1, 2], "classes": ["a", "b"]}
    assert from_dict(Tuples, lists) == Tuples()
    with pytest.raises(InputError, match=rf"config\.{field}: expected"):
        from_dict(Tuples, lists | {field: value})


@pytest.mark.parametrize("stretch, mean, std", [("linear", 0.15, 0.17), ("sqrt", 0.34, 0.19), ("log", -2.3, 1.0)])
def test_mean_and_deviation_follow_the_stretch_unless_given(stretch, mean, std):
    assert InputConfig(stretch=stretch).resolve() == InputConfig(stretch=stretch, mean=mean, std=std)
    given = InputConfig(stretch=stretch, mean=0.0, std=3.0)
    assert given.resolve() == given
    assert make_model(ModelConfig(), InputConfig(stretch=stretch), ("a", "b")).input.mean == mean


def test_prepared_images_have_mean_0_and_deviation_1():
    images = np.concatenate(list(simulate_images(90, 3, 0, PRIORS["ct1"])))
    for stretch in ("linear", "sqrt", "log"):
        x = prepare(to_unit(images), InputConfig(stretch=stretch))
        assert abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1


def test_paths_of_a_run_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(data="packed").resolve()
    assert (config.data, config.simulation.folder) == (f"{tmp_path}/packed", f"{tmp_path}/data")
    assert config.resolve() == config and Config(data="simulate:ct1").resolve().stream == "ct1"


def test_stream_is_named_by_its_preset():
    assert Config(data="simulate:ct1").stream == "ct1" and Config(data="packed").stream is None
