"""InitConfig: every bad value is refused with what is allowed, every good one is kept."""

from __future__ import annotations

import dataclasses
import json

import pytest

from loraga.config import (
    BUFFER_DEVICES,
    BUFFER_DTYPES,
    DIRECTIONS,
    ESTIMATORS,
    METHODS,
    SCALES,
    STARTS,
    InitConfig,
)

CHOICES = {
    "method": METHODS,
    "direction": DIRECTIONS,
    "scale": SCALES,
    "start": STARTS,
    "estimator": ESTIMATORS,
    "buffer_dtype": BUFFER_DTYPES,
    "buffer_device": BUFFER_DEVICES,
}


@pytest.mark.parametrize("bad", ["foo", "", 3, True, ["ArB2r"], "ARB2R"])
@pytest.mark.parametrize("option", CHOICES)
def test_unknown_choice_lists_what_is_allowed(option, bad):
    with pytest.raises(ValueError) as error:
        InitConfig(**{option: bad})
    message = str(error.value)
    assert f"{option}={bad!r}" in message
    assert all(repr(allowed) in message for allowed in CHOICES[option])


@pytest.mark.parametrize("option", CHOICES)
def test_none_is_no_choice(option):
    with pytest.raises(ValueError, match=f"{option}=None"):
        InitConfig(**{option: None})


@pytest.mark.parametrize("option", ["stable_gamma", "lora_one_gamma"])
@pytest.mark.parametrize("bad", [0, 0.0, -1.0, float("nan"), float("inf"), -float("inf"), 10**400])
def test_gamma_must_be_finite_and_positive(option, bad):
    with pytest.raises(ValueError, match=f"{option}=.* must be finite and above 0"):
        InitConfig(**{option: bad})


@pytest.mark.parametrize("option", ["stable_gamma", "lora_one_gamma"])
@pytest.mark.parametrize("bad", ["16", None, True, [16.0], 1j])
def test_gamma_must_be_a_number(option, bad):
    with pytest.raises(TypeError, match=f"{option} must be a number above 0"):
        InitConfig(**{option: bad})


def test_the_default_is_lora_gas_mirror():
    assert STARTS == ("mirror", "zero-b")
    assert (InitConfig().method, InitConfig().start) == ("lora-ga", "mirror")


@pytest.mark.parametrize("option, value", [("start", "zero-b"), ("direction", "random"), ("scale", "gd")])
def test_lora_one_has_a_start_of_its_own(option, value):
    with pytest.raises(ValueError, match=f"{option}='{value}' does not go with method='lora-one'"):
        InitConfig(method="lora-one", **{option: value})
    assert getattr(InitConfig(**{option: value}), option) == value


@pytest.mark.parametrize("direction", [direction for direction in DIRECTIONS if direction != "ArB2r"])
def test_zero_b_has_one_direction(direction):
    with pytest.raises(ValueError, match=f"direction='{direction}' does not go with start='zero-b'"):
        InitConfig(start="zero-b", direction=direction)
    assert InitConfig(start="zero-b", scale="gd").scale == "gd"


@pytest.mark.parametrize("option, value", [("method", "lora-one"), ("start", "zero-b")])
def test_one_option_of_a_config_can_be_replaced(option, value):
    assert dataclasses.replace(InitConfig(), **{option: value}) == InitConfig(**{option: value})


@pytest.mark.parametrize("option", [name for name in CHOICES if name != "method"])
def test_every_allowed_choice_is_kept(option):
    for value in CHOICES[option]:
        assert getattr(InitConfig(**{option: value}), option) == value


@pytest.mark.parametrize(
    "options, unused",
    [
        ({"direction": "random", "scale": "gd", "stable_gamma": 64, "estimator": "dense"}, {"lora_one_gamma"}),
        ({"start": "zero-b", "scale": "unit"}, {"lora_one_gamma", "direction"}),
        ({"method": "lora-one", "lora_one_gamma": 7}, {"start", "direction", "scale", "stable_gamma"}),
    ],
)
def test_to_dict_says_what_played_a_part_and_makes_the_same_config_again(options, unused):
    config = InitConfig(**options)
    saved = json.loads(json.dumps(config.to_dict()))
    assert {name for name, value in saved.items() if value is None} == unused
    assert set(saved) == {field.name for field in dataclasses.fields(InitConfig)}
    assert InitConfig(**{name: value for name, value in saved.items() if value is not None}) == config


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-5, ValueError), (1e6, TypeError), (True, TypeError), ("1M", TypeError)]
)
def test_staging_bytes_is_a_whole_number_above_zero(value, error):
    with pytest.raises(error, match="staging_bytes"):
        InitConfig(staging_bytes=value)
    assert InitConfig(staging_bytes=2**20).staging_bytes == 2**20
