"""A stream of micro-batches through the kernels."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from kernel_operands import DEVICE, needs_device, operand

from loraga.estimators import LayerSpec, Streaming, finish
from loraga.factors import Factors
from loraga.ops import triton as dispatch

pytestmark = needs_device


def test_a_stream_through_the_kernels_gives_the_factors_of_torch(monkeypatch):
    """Every op of a streaming estimator, from first update to factors, replaced by its kernel launcher."""
    spec = LayerSpec("layer", 240, 208, 8, 7, torch.device(DEVICE))
    pairs = [(operand(300, 208, seed=2 * i), operand(300, 240, seed=2 * i + 1)) for i in range(3)]
    pairs[1][0][5, 5] = torch.nan  # is left out

    def factors() -> tuple[Factors, list[bool]]:
        estimator = Streaming(spec, 3)
        kept = [bool(estimator.update(x, dy)) for x, dy in pairs]
        return finish({"layer": estimator}, {"layer": 2.0})["layer"].factors, kept

    expected, kept = factors()
    calls = set()
    for op, (family, launcher, *_) in dispatch.LAUNCHERS.items():
        run = getattr(importlib.import_module(f"loraga.kernels.{family}"), launcher)

        def through(*args: Any, _run: Any = run, _op: str = op) -> Any:
            calls.add(_op)
            return _run(*args)

        monkeypatch.setattr(torch.ops.loraga, op, through)
    found, also_kept = factors()
    assert kept == also_kept == [True, False, True]
    assert calls == {"test_matrix_", "commit_", "basis"}
    torch.testing.assert_close(found.S, expected.S, rtol=1e-4, atol=0)
    for one, other in ((found.U, expected.U), (found.Vh.mT, expected.Vh.mT)):
        assert torch.linalg.matrix_norm(one @ one.mT - other @ other.mT, 2) <= 5e-2
