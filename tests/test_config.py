import json
from typing import NamedTuple

import pytest

from gravlens_jax.config import PRESETS, Config, InputConfig, ModelConfig, from_dict, to_json
from gravlens_jax.errors import InputError, parse_json


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_is_exact(preset):
    assert from_dict(Config, json.loads(to_json(PRESETS[preset]))) == PRESETS[preset]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"colour": 1}, "'colour' is unknown"),
        ({"epochs": "6"}, r"config.epochs: expected .*int.*, got '6'"),
        ({"epochs": True}, "config.epochs"),
        ({"input": {"crop": 100}}, "config.input: field '.*' is missing"),
        ({"input": 3}, "config.input: expected an object"),
        ({"seed": -1}, "seed=-1"),
        (
            {"augment": {"flip": True, "max_rotation": float("inf"), "max_shift": 0}},
            "max_rotation: expected .*, got inf",
        ),
        ({"augment": {"flip": True, "max_rotation": 10**400, "max_shift": 0}}, "max_rotation: expected .*, got 1000"),
        ({"model": json.loads(to_json(ModelConfig())) | {"depth": 6 * 10**6 + 2}}, "depth=6000002: .* at most 1202"),
        ({"model": json.loads(to_json(ModelConfig())) | {"width": 10**9}}, "width=1000000000: expected 1 to 4096"),
        ({"input": json.loads(to_json(InputConfig())) | {"crop": 10**6}}, "crop=1000000: expected at most 16384"),
    ],
)
def test_damaged_json_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(Config, json.loads(to_json(Config())) | change)


@pytest.mark.parametrize("text", [b"\xff\xfe\xfa", b"[" * 10**5, b"1" * 5000, b"{'a': 1}", b""])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(InputError, match="a file is not readable JSON"):
        parse_json(text, "a file")


@pytest.mark.parametrize("value", [None, "ab", [], [1], [1, 2, 3], [1, "2"], [1, 2.0], [1, True], {"a": 1, "b": 2}])
def test_tuples_are_lists_of_the_right_length_and_type(value):
    class Shape(NamedTuple):
        image_shape: tuple[int, int]

    assert from_dict(Shape, {"image_shape": [1, 2]}) == ((1, 2),)
    with pytest.raises(InputError, match=r"config\.image_shape: expected"):
        from_dict(Shape, {"image_shape": value})


@pytest.mark.parametrize("value", [None, "ab", [], [1], ["a", None]])
def test_classes_are_one_or_more_texts(value):
    class Classes(NamedTuple):
        classes: tuple[str, ...]

    assert from_dict(Classes, {"classes": ["a", "b"]}) == (("a", "b"),)
    with pytest.raises(InputError, match=r"config\.classes: expected"):
        from_dict(Classes, {"classes": value})


def test_literals_are_checked():
    values = json.loads(to_json(InputConfig())) | {"stretch": "cube"}
    with pytest.raises(InputError, match=r"input.stretch: expected one of \('linear', 'sqrt', 'log'\), got 'cube'"):
        from_dict(InputConfig, values, "input")


@pytest.mark.parametrize("depth", [0, 2, 7, 21])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(InputError, match="6n \\+ 2"):
        ModelConfig(depth=depth)


def test_crop_must_be_a_multiple_of_pool():
    with pytest.raises(InputError, match="crop=75 is not a multiple of pool=2"):
        InputConfig(crop=75, pool=2)


def test_stream_is_named_by_its_preset():
    assert Config(data="simulate:ct1").stream == "ct1" and Config(data="packed").stream is None
    with pytest.raises(InputError, match="data=simulate:ct2: expected simulate: and one of ct1, model_a"):
        Config(data="simulate:ct2")
    with pytest.raises(InputError, match="leave one out"):
        Config(data="simulate:ct1", device_data=True)
