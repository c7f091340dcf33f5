"""What runs the ops is decided before the first batch, and a whole initialisation runs through these choices."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kernel_operands import DEVICE, needs_device
from tiny import MLP, config, init, mlp_batches
from torch import nn
from triton.runtime.errors import OutOfResources

import loraga
from loraga.capture import run
from loraga.capture.run import Request, estimate_step
from loraga.distributed.ranks import Ranks
from loraga.estimators import Streaming
from loraga.kernels import commit
from loraga.linalg import precision
from loraga.ops import first_use, triton
from loraga.ops.device_facts import DeviceFacts
from loraga.ops.selection import Selection
from loraga.report import build

HERE = torch.device(DEVICE)


class Recorded:
    """In place of the selection: which devices it was asked for, and whether float32 products were exact."""

    def __init__(self) -> None:
        self.calls: list[tuple[set[torch.device], bool]] = []

    def agree(self, ranks: Ranks, devices: set[torch.device]) -> None:
        self.calls.append((devices, precision._read() == precision._EXACT))


@pytest.fixture
def recorded(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(run, "selection", recorded)
    return recorded


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 40)).to(HERE)


def batches_of(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(24, width, generator=generator).to(HERE) for _ in range(2)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_before_the_first_batch_and_with_exact_products(recorded):
    def loader():
        assert len(recorded.calls) == 1
        yield from batches_of(8)

    torch.set_float32_matmul_precision("high")
    try:
        loraga.estimate_factors(model_of(8), loader(), ["0"], rank=2, loss_fn=loss_of)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert recorded.calls == [({model_of(8)[0].weight.device}, True)]


def test_before_a_step(recorded):
    model = model_of(8)

    def step() -> None:
        assert len(recorded.calls) == 1
        loss_of(model, batches_of(8)[0]).backward()

    request = Request({"0": 2}, {"0": model[0]}, loraga.InitConfig(), 0)
    with Ranks() as ranks:
        estimate_step(model, request, step, ranks)
    assert len(recorded.calls) == 1


def test_the_report_has_what_ran(monkeypatch):
    kernels = {"cuda:0": {"basis": "triton", "commit_": "torch: wrong result: x"}}
    monkeypatch.setattr(build.selection, "report", lambda: kernels)
    assert init(MLP(), mlp_batches(1), config(target_modules="all-linear")).loraga_report.kernels == kernels


@contextmanager
def without_commit():
    """Its last launch fails: the kernel takes more memory than the device has."""
    kernel = commit._commit_kernel
    kind = type(kernel)
    launcher = kind.__getitem__

    def fails(self: Any, grid: Any) -> Any:
        if self is kernel:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return launcher(self, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__getitem__", fails)
        yield


@needs_device
@pytest.mark.slow
@pytest.mark.parametrize("fails", ["nothing", "the check", "later launches"])
def test_a_whole_initialisation_by_the_kernels(monkeypatch, fails):
    """Every op of it goes through the selection, as on a CUDA device. What it finds is what torch finds."""
    monkeypatch.delenv("LORAGA_TRITON", raising=False)
    width = 352
    # of the first layer a sketch is kept, the second one is summed
    monkeypatch.setattr(Streaming, "pays", lambda spec: spec.m == width)

    def factors() -> dict[str, loraga.Factors]:
        return loraga.estimate_factors(model_of(width), batches_of(width), ["0", "2"], rank=4, loss_fn=loss_of)

    expected = factors()
    facts = DeviceFacts("Some GPU", (9, 0), "580.1", "2.13.0", "3.7.1")
    chosen = Selection(
        triton.LAUNCHERS,
        lambda op, device: first_use.problem(op, triton.launcher(op), device),
        lambda device: facts,
        lambda facts, ops: {},
    )
    monkeypatch.setattr(triton, "selection", chosen)
    called = set()
    for op in triton.LAUNCHERS:

        def through(*args: Any, _op: str = op) -> Any:
            called.add(_op)
            return triton.run(_op, HERE, *args)

        monkeypatch.setattr(torch.ops.loraga, op, through)
    if fails == "nothing":
        found = factors()
    elif fails == "the check":
        with without_commit(), pytest.warns(UserWarning, match="The Triton kernel of commit_ cannot be used") as seen:
            found = factors()
        assert [w.category for w in seen].count(UserWarning) == 1  # numpy warns of the interpreter of Triton 3.4
    else:
        assert chosen.chosen("commit_", HERE).runs == "triton"
        with without_commit(), pytest.warns(UserWarning, match="The Triton kernel of commit_ cannot be used") as seen:
            found = factors()
        assert [w.category for w in seen].count(UserWarning) == 1
    assert called == set(triton.LAUNCHERS)
    runs = {op: chosen.chosen(op, HERE).runs for op in triton.LAUNCHERS}
    assert runs == dict.fromkeys(triton.LAUNCHERS, "triton") | ({} if fails == "nothing" else {"commit_": "torch"})
    for name, one in found.items():
        torch.testing.assert_close(one.S, expected[name].S, rtol=1e-3, atol=0)
