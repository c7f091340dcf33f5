"""Kernels run where they were measured to win."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_operands import needs_device

from loraga.kernels import choice
from loraga.ops import reference
from loraga.ops import triton as dispatch

pytestmark = needs_device


class TestChoice:
    def test_only_measured_wins_are_picked(self, monkeypatch):
        monkeypatch.delenv("LORAGA_TRITON", raising=False)
        monkeypatch.setattr(choice, "wins", lambda: {"accumulate_": {"90": {"16": [[1000, 2000]]}}})
        half, full = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
        assert choice.picks("accumulate_", 90, half, 1000)
        assert not choice.picks("accumulate_", 90, half, 999)
        assert not choice.picks("accumulate_", 90, half, 2001)
        assert not choice.picks("accumulate_", 80, half, 1500)
        assert not choice.picks("accumulate_", 90, full, 1500)
        assert not choice.picks("commit_", 90, half, 1500)

    def test_the_environment_decides(self, monkeypatch):
        for value, expected in (("1", True), ("0", False)):
            monkeypatch.setenv("LORAGA_TRITON", value)
            assert choice.picks("accumulate_", 90, torch.empty(1), 1) is expected
        monkeypatch.setenv("LORAGA_TRITON", "yes")
        with pytest.raises(ValueError, match="LORAGA_TRITON='yes'"):
            choice.picks("accumulate_", 90, torch.empty(1), 1)


def test_without_a_measured_win_torch_does_the_work(monkeypatch):
    monkeypatch.delenv("LORAGA_TRITON", raising=False)
    monkeypatch.setattr(choice, "wins", dict)
    for op in dispatch.LAUNCHERS:
        assert dispatch.launcher_for(op, (torch.empty(1),), 90) is getattr(reference, op)
    monkeypatch.setenv("LORAGA_TRITON", "1")
    for op, (family, launcher, _) in dispatch.LAUNCHERS.items():
        module = importlib.import_module(f"loraga.kernels.{family}")
        assert dispatch.launcher_for(op, (torch.empty(1),), 90) is getattr(module, launcher)
