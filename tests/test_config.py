"""InitConfig: every bad value is refused with what is allowed, every good one is kept."""

from __future__ import annotations

import json

import pytest

from loraga.config import (
    BUFFER_DEVICES,
    BUFFER_DTYPES,
    DIRECTIONS,
    ESTIMATORS,
    METHODS,
    OFFSETS,
    SCALES,
    InitConfig,
)

CHOICES = {
    "method": METHODS,
    "direction": DIRECTIONS,
    "scale": SCALES,
    "offset": OFFSETS,
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


@pytest.mark.parametrize("option", [name for name in CHOICES if name != "offset"])
def test_none_is_a_choice_for_offset_only(option):
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


@pytest.mark.parametrize("offset", ["anchor", "subtract", "zero-b"])
def test_lora_one_takes_no_offset(offset):
    with pytest.raises(ValueError, match=f"offset='{offset}' does not go with method='lora-one'"):
        InitConfig(method="lora-one", offset=offset)
    assert InitConfig(offset=offset).offset == offset


def test_lora_ga_needs_an_offset():
    with pytest.raises(ValueError, match="offset='none' does not go with method='lora-ga'"):
        InitConfig(offset="none")


@pytest.mark.parametrize("option, value", [("direction", "random"), ("scale", "gd")])
def test_lora_one_has_no_direction_or_scale(option, value):
    with pytest.raises(ValueError, match=f"{option}='{value}' does not go with method='lora-one'"):
        InitConfig(method="lora-one", **{option: value})


def test_offset_follows_the_method():
    assert InitConfig().offset == "anchor"
    assert InitConfig(method="lora-one").offset == "none"
    assert InitConfig(method="lora-one", offset="none").offset == "none"


@pytest.mark.parametrize("option", [name for name in CHOICES if name not in ("method", "offset")])
def test_every_allowed_choice_is_kept(option):
    for value in CHOICES[option]:
        assert getattr(InitConfig(**{option: value}), option) == value


def test_triplets():
    assert InitConfig().triplets(8) == 16
    assert InitConfig(method="lora-one").triplets(8) == 8


def test_to_dict_makes_the_same_config_again():
    config = InitConfig(direction="random", scale="gd", stable_gamma=64, estimator="dense")
    assert InitConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-5, ValueError), (1e6, TypeError), (True, TypeError), ("1M", TypeError)]
)
def test_staging_bytes_is_a_whole_number_above_zero(value, error):
    with pytest.raises(error, match="staging_bytes"):
        InitConfig(staging_bytes=value)
    assert InitConfig(staging_bytes=2**20).staging_bytes == 2**20
