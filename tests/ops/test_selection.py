"""Which implementation runs an op: the priorities, the warnings, what ranks agree on, what env and report say of it."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from loraga.cli import environment
from loraga.ops import calibration
from loraga.ops.device_facts import DeviceFacts
from loraga.ops.selection import TORCH, TRITON, Choice, Selection, decide
from loraga.report.report import InitReport

FACTS = DeviceFacts("Some GPU", (9, 0), "580.1", "2.13.0", "3.7.1")
GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
OPS = ("basis", "commit_", "accumulate_")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv("LORAGA_TRITON", raising=False)


class Tries:
    """A check that finds `problems` by op, and knows of what it was asked."""

    def __init__(self, **problems: str) -> None:
        self.problems, self.asked = problems, []

    def __call__(self, op: str, device: torch.device) -> str:
        self.asked.append((op, str(device)))
        return self.problems.get(op, "")


class FakeRanks:
    """One of several ranks; `others` are the rows that the others gave."""

    def __init__(self, *others: list[int]) -> None:
        self.size, self.others, self.exchanged = 1 + len(others), others, 0

    def any(self, here: bool) -> bool:
        return here or any(any(row) for row in self.others)

    def gather(self, numbers, device):
        self.exchanged += 1
        return [numbers, *([row] for row in self.others)]


def selection(check: Tries, facts: DeviceFacts = FACTS, calibrated: dict[str, str] | None = None) -> Selection:
    return Selection(OPS, check, lambda device: facts, lambda facts, ops: calibrated or {})


def silent(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run()


class TestPriorities:
    def test_a_kernel_that_passes_its_check_is_on(self):
        check = Tries()
        chosen = selection(check)
        assert silent(lambda: [chosen.chosen(op, GPU) for op in OPS]) == [Choice(TRITON)] * 3
        silent(lambda: [chosen.chosen(op, GPU) for op in OPS])
        assert check.asked == [(op, "cuda:0") for op in OPS], "every kernel is checked once"

    def test_the_environment_comes_first_and_nothing_is_tried(self, monkeypatch):
        check = Tries(basis="broken")
        chosen = selection(check, replace(FACTS, triton=None), {"commit_": TORCH})
        for value, expected in (("0", Choice(TORCH, "LORAGA_TRITON=0")), ("1", Choice(TRITON))):
            monkeypatch.setenv("LORAGA_TRITON", value)
            assert silent(lambda: [chosen.chosen(op, GPU) for op in OPS]) == [expected] * 3
        assert not check.asked

    @pytest.mark.parametrize("value", ["yes", "2", " 1", "true"])
    def test_other_values_are_refused(self, monkeypatch, value):
        monkeypatch.setenv("LORAGA_TRITON", value)
        with pytest.raises(ValueError, match=f"LORAGA_TRITON='{value}' is not known; set it to 0 or 1"):
            selection(Tries()).chosen("basis", GPU)

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            (replace(FACTS, triton=None), "triton is not installed"),
            (replace(FACTS, capability=(7, 5)), "needs compute capability 8.0, and this device has 7.5"),
            (replace(FACTS, rocm=True), "for NVIDIA devices"),
            (replace(FACTS, interpreted=True), "TRITON_INTERPRET=1"),
        ],
    )
    def test_what_is_known_of_a_device_needs_no_try_and_no_warning(self, facts, reason):
        check = Tries()
        choice = silent(lambda: selection(check, facts, {"basis": TRITON}).chosen("basis", GPU))
        assert choice.runs == TORCH and reason in choice.reason and not check.asked

    def test_a_measurement_switches_off_and_never_on(self):
        check = Tries(commit_="wrong result")
        chosen = selection(check, calibrated={"basis": TORCH, "commit_": TRITON, "accumulate_": TRITON})
        with pytest.warns(UserWarning, match="commit_"):
            assert chosen.chosen("basis", GPU).reason == "loraga calibrate found the kernel not faster"
        assert chosen.chosen("commit_", GPU) == Choice(TORCH, "wrong result", failed=True)
        assert chosen.chosen("accumulate_", GPU) == Choice(TRITON)
        assert [op for op, _ in check.asked] == ["commit_", "accumulate_"]

    def test_the_rule_needs_no_device(self):
        assert decide("basis", FACTS, {}, lambda: "") == Choice(TRITON)
        assert decide("basis", FACTS, {}, lambda: "bad") == Choice(TORCH, "bad", failed=True)


class TestWarnings:
    def test_one_for_each_reason_and_device(self):
        chosen = selection(Tries(basis="no compiler", commit_="no compiler", accumulate_="wrong result"))
        with pytest.warns(UserWarning) as seen:
            for _ in range(3):
                for op in OPS:
                    chosen.chosen(op, GPU)
        assert [str(w.message).split(" (")[0] for w in seen] == [
            "The Triton kernels of basis, commit_ cannot be used on cuda:0",
            "The Triton kernel of accumulate_ cannot be used on cuda:0",
        ]
        assert all("LORAGA_TRITON=0 does so without a try, LORAGA_TRITON=1" in str(w.message) for w in seen)
        with pytest.warns(UserWarning, match="on cuda:1"):
            chosen.chosen("basis", SECOND)

    def test_a_launch_that_fails_is_said_once_and_remembered(self):
        chosen = selection(Tries())
        chosen.chosen("basis", GPU)
        with pytest.warns(
            UserWarning, match=r"The Triton kernel of basis cannot be used on cuda:0 \(RuntimeError: too"
        ):
            assert chosen.gives_up("basis", GPU, RuntimeError("too large\nat line 3"))
        assert silent(lambda: chosen.chosen("basis", GPU)) == Choice(TORCH, "RuntimeError: too large", failed=True)
        assert chosen.chosen("commit_", GPU).runs == TRITON
        assert chosen.chosen("basis", SECOND).runs == TRITON, "another device keeps its kernel"

    def test_a_kernel_that_was_asked_for_shows_its_error(self, monkeypatch):
        chosen = selection(Tries())
        monkeypatch.setenv("LORAGA_TRITON", "1")
        assert not silent(lambda: chosen.gives_up("basis", GPU, RuntimeError("too large")))
        assert chosen.chosen("basis", GPU).runs == TRITON


class TestRanks:
    def test_alone_every_device_has_its_own_choice(self):
        def problem(op, device):
            return "bad" if (op, device) == ("basis", GPU) else ""

        chosen = Selection(OPS, problem, lambda device: FACTS, lambda facts, ops: {})
        ranks = FakeRanks()
        with pytest.warns(UserWarning, match="basis"):
            chosen.agree(ranks, [SECOND, GPU, torch.device("cpu"), GPU])
        assert chosen.report() == {
            "cuda:0": {"basis": "torch: bad", "commit_": "triton", "accumulate_": "triton"},
            "cuda:1": dict.fromkeys(OPS, "triton"),
        }
        assert not ranks.exchanged

    def test_what_one_rank_cannot_run_no_rank_runs(self):
        chosen = selection(Tries())
        silent(lambda: chosen.agree(FakeRanks([0, 0, 0], [0, 1, 0]), [GPU, SECOND]))
        for device in (GPU, SECOND):
            assert [chosen.chosen(op, device).runs for op in OPS] == [TRITON, TORCH, TRITON]
        assert chosen.report()["cuda:0"]["commit_"] == "torch: another rank takes torch"

    def test_the_own_reason_is_kept(self):
        chosen = selection(Tries(commit_="wrong result"))
        with pytest.warns(UserWarning, match="commit_"):
            chosen.agree(FakeRanks([0, 1, 0]), [GPU])
        assert chosen.report()["cuda:0"]["commit_"] == "torch: wrong result"

    def test_where_all_is_well_nothing_is_exchanged(self):
        ranks = FakeRanks([0, 0, 0])
        selection(Tries()).agree(ranks, [GPU])
        assert not ranks.exchanged

    def test_a_rank_without_a_device_listens(self):
        ranks = FakeRanks([1, 0, 0])
        chosen = selection(Tries())
        chosen.agree(ranks, [torch.device("cpu")])
        assert ranks.exchanged == 1 and chosen.report() == {}

    def test_the_next_call_agrees_anew(self):
        chosen = selection(Tries())
        chosen.agree(FakeRanks([1, 1, 1]), [GPU])
        assert {chosen.chosen(op, GPU).runs for op in OPS} == {TORCH}
        chosen.agree(FakeRanks([0, 0, 0]), [GPU])
        assert {chosen.chosen(op, GPU).runs for op in OPS} == {TRITON}

    def test_ranks_agree_whatever_each_was_told(self, monkeypatch):
        chosen = selection(Tries())
        monkeypatch.setenv("LORAGA_TRITON", "1")
        chosen.agree(FakeRanks([1, 0, 0]), [GPU])
        assert [chosen.chosen(op, GPU).runs for op in OPS] == [TORCH, TRITON, TRITON]
        monkeypatch.setenv("LORAGA_TRITON", "0")
        ranks = FakeRanks([0, 0, 0])
        chosen.agree(ranks, [GPU])
        assert ranks.exchanged == 1 and set(chosen.report()["cuda:0"].values()) == {"torch: LORAGA_TRITON=0"}


def test_a_trial_decides_while_it_lasts(monkeypatch):
    monkeypatch.setenv("LORAGA_TRITON", "0")
    chosen = selection(Tries())
    with chosen.trial({"basis": TRITON}):
        assert chosen.chosen("basis", GPU) == Choice(TRITON)
        assert not chosen.gives_up("basis", GPU, RuntimeError("too large")), "a measurement wants to see it"
        assert chosen.chosen("commit_", GPU).runs == TORCH
    assert chosen.chosen("basis", GPU).runs == TORCH


class TestShown:
    KERNELS: ClassVar = {"cuda:0": {"basis": "triton", "commit_": "torch: wrong result: x", "accumulate_": "triton"}}

    def test_in_the_report_its_text_and_its_file(self, tmp_path):
        report = InitReport([], {}, {}, 0, 1, kernels=self.KERNELS)
        path = tmp_path / "loraga_report.json"
        report.save(path)
        assert json.loads(path.read_text())["kernels"] == self.KERNELS
        assert InitReport.load(path) == report
        assert str(report).splitlines()[-2:] == [
            "cuda:0: triton for basis, accumulate_",
            "cuda:0: torch for commit_ (wrong result: x)",
        ]

    def test_in_env(self, monkeypatch, tmp_path, recwarn):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(environment, "_devices", lambda: {"cpu": "some"})
        monkeypatch.setattr(environment, "facts_of", lambda device: FACTS)
        chosen = Selection(OPS, Tries(basis="no compiler"), lambda device: FACTS, calibration.stored)
        monkeypatch.setattr(environment, "selection", chosen)
        file = calibration.store(FACTS, dict.fromkeys(OPS, TRITON) | {"commit_": TORCH}, {})
        found = environment.environment()
        assert found["kernels"]["cuda:0"] == {
            "basis": "torch: no compiler",
            "commit_": "torch: loraga calibrate found the kernel not faster",
            "accumulate_": "triton",
        }
        assert found["calibration"] == {"cuda:0": str(file)}
        text = environment.describe(json.loads(json.dumps(found)))
        assert "  cuda:0: torch for basis (no compiler)\n" in text and f"  cuda:0: chosen by {file}\n" in text
        assert not recwarn.list, "what env prints is not said twice"
