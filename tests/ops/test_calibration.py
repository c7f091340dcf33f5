"""The file of `loraga calibrate`: where it is, when it counts, and that a bad one is said once and ignored."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from loraga.ops import calibration
from loraga.ops.device_facts import DeviceFacts

FACTS = DeviceFacts("NVIDIA H100 80GB HBM3", (9, 0), "580.159.04", "2.13.0", "3.7.1")
OPS = ("basis", "commit_")
CHOICES = {"basis": "triton", "commit_": "torch"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._read.cache_clear()
    yield tmp_path
    calibration._read.cache_clear()


def test_round_trip(cache):
    path = calibration.store(FACTS, CHOICES, {"basis": {"triton": [1.0, 1.1]}})
    assert path == cache / "loraga" / "kernels-nvidia-h100-80gb-hbm3-sm90.json"
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"
    assert calibration.stored(FACTS, OPS) == CHOICES
    assert calibration.file_in_use(FACTS, OPS) == path
    content = json.loads(path.read_text())
    assert content["for"] == {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "driver": "580.159.04",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "loraga": FACTS.loraga,
    }
    assert content["measured"] == {"basis": {"triton": [1.0, 1.1]}}


def test_without_a_file_nothing_is_said(recwarn):
    assert calibration.stored(FACTS, OPS) == {} and calibration.file_in_use(FACTS, OPS) is None
    assert not recwarn.list


def test_another_kind_of_device_has_another_file(recwarn):
    calibration.store(FACTS, CHOICES, {})
    assert calibration.stored(replace(FACTS, name="NVIDIA A100", capability=(8, 0)), OPS) == {}
    assert not recwarn.list


@pytest.mark.parametrize("cache_home", ["", "relative/path"])
def test_the_default_is_below_home(monkeypatch, tmp_path, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "user")
    assert calibration.path_of(FACTS).parent == tmp_path / "user" / ".cache" / "loraga"


def test_without_a_home_there_is_no_file(monkeypatch, recwarn):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert calibration.stored(FACTS, OPS) == {} and not recwarn.list
    with pytest.raises(RuntimeError, match="home directory"):
        calibration.store(FACTS, CHOICES, {})


def ignored_once(expected: str) -> None:
    with pytest.warns(UserWarning, match=expected) as seen:
        assert calibration.stored(FACTS, OPS) == {}
        assert calibration.file_in_use(FACTS, OPS) is None
    assert len(seen) == 1 and "is ignored; run `loraga calibrate` again, or delete the file" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.stored(FACTS, OPS) == {}


@pytest.mark.parametrize("change", [{"driver": "590.1"}, {"torch": "2.14.1"}, {"triton": "3.8"}, {"loraga": "9"}])
def test_a_stale_file(change):
    calibration.store(replace(FACTS, **change), CHOICES, {})
    ((name, value),) = change.items()
    ignored_once(f"was measured with {name} {value}, here {getattr(FACTS, name)}")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"for": {}, "choices": {}}',
        json.dumps({"for": FACTS.key()}),
        json.dumps({"for": FACTS.key(), "choices": {"basis": "triton"}}),
        json.dumps({"for": FACTS.key(), "choices": {"basis": "triton", "commit_": "fast"}}),
        json.dumps({"for": FACTS.key(), "choices": {"basis": "triton", "commit_": ["torch"]}}),
        json.dumps({"for": FACTS.key(), "choices": ["basis", "commit_"]}),
    ],
)
def test_a_broken_file(content):
    path = calibration.path_of(FACTS)
    path.parent.mkdir()
    path.write_text(content)
    ignored_once("is not a file of `loraga calibrate`")


def test_a_file_that_cannot_be_read(cache):
    path = calibration.path_of(FACTS)
    path.mkdir(parents=True)  # a folder, which no permission of a test's user opens
    ignored_once("cannot be read")


def test_a_new_file_is_read_at_once():
    calibration.store(FACTS, CHOICES, {})
    assert calibration.stored(FACTS, OPS)["commit_"] == "torch"
    calibration.store(FACTS, CHOICES | {"commit_": "triton"}, {})
    assert calibration.stored(FACTS, OPS)["commit_"] == "triton"


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    path = calibration.store(FACTS, CHOICES, {})
    before = path.read_text()
    with pytest.raises(TypeError):
        calibration.store(FACTS, CHOICES, {"basis": object()})
    assert path.read_text() == before and os.listdir(path.parent) == [path.name]
