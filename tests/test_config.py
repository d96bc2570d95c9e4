import json

import pytest

from gravlens_jax.config import PRESETS, Config, InputConfig, InputError, ModelConfig, from_dict, to_json


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
    ],
)
def test_damaged_json_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(Config, json.loads(to_json(Config())) | change)


def test_literals_are_checked():
    values = json.loads(to_json(InputConfig())) | {"stretch": "cube"}
    with pytest.raises(InputError, match=r"input.stretch: expected one of \('linear', 'sqrt'\), got 'cube'"):
        from_dict(InputConfig, values, "input")


@pytest.mark.parametrize("depth", [0, 2, 7, 21])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(InputError, match="6n \\+ 2"):
        ModelConfig(depth=depth)


def test_crop_must_be_a_multiple_of_pool():
    with pytest.raises(InputError, match="crop=75 is not a multiple of pool=2"):
        InputConfig(crop=75, pool=2)
