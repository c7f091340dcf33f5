"""Accumulation onto dense buffers against float64, where a bound is what the eager op makes in the same dtype."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, DTYPES, assert_as_good, count_launches, needs_device, operand

from loraga.kernels import accumulate, common
from loraga.ops import reference

pytestmark = needs_device


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 64, 128), (67, 45, 83), (300, 16, 24), (1, 7, 5)])
def test_accumulate(shape, dtype, buffer):
    tokens, m, n = shape
    x, dy, g = operand(tokens, n, dtype=dtype), operand(tokens, m, dtype=dtype, seed=1), operand(m, n, dtype=buffer)
    truth = g.double() + 0.125 * (dy.double().mT @ x.double())
    eager = g.clone()
    reference.accumulate_(eager, x, dy, 0.125)
    for make in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        result = make(g)
        assert accumulate.accumulate(result, make(x), make(dy), 0.125)
        assert_as_good(result, truth, eager, slack=1.01)


def test_accumulate_rounds_to_nearest_once():
    """1 + 2⁻⁸ per token: rounding the product to bfloat16 before it is added would lose every one of them."""
    g = torch.zeros(16, 16, dtype=torch.bfloat16, device=DEVICE)
    ones = torch.ones(320, 16, device=DEVICE)
    accumulate.accumulate(g, ones, ones * (1 + 2.0**-8))
    assert (g == 322).all()  # the bfloat16 next to 321.25


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("tokens", [40, 900])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # that is what is tested
def test_accumulate_leaves_a_poisoned_batch_out(where, bad, tokens):
    x, dy, g = operand(tokens, 33), operand(tokens, 20, seed=1), operand(20, 33, seed=2)
    (x if where == "x" else dy)[-1, -1] = bad
    before = g.clone()
    assert not accumulate.accumulate(g, x, dy)
    assert torch.equal(g, before)


def test_accumulate_of_no_token_changes_nothing():
    g = operand(8, 8)
    before = g.clone()
    assert accumulate.accumulate(g, operand(0, 8), operand(0, 8))
    assert torch.equal(g, before)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_sizes_of_every_architecture(arch, dtype, monkeypatch):
    monkeypatch.setattr(common, "arch_of", lambda device: arch)
    x, dy, g = operand(80, 144, dtype=dtype), operand(80, 160, dtype=dtype, seed=1), operand(160, 144)
    truth, eager = g.double() + dy.double().mT @ x.double(), g.clone()
    reference.accumulate_(eager, x, dy, 1.0)
    assert accumulate.accumulate(g, x, dy)
    assert_as_good(g, truth, eager, slack=1.01)


@pytest.mark.parametrize(("splits", "expected"), [(1, 2), (4, 3)])
def test_launches(splits, expected, monkeypatch):
    monkeypatch.setattr(accumulate, "splits_for", lambda programs, steps, device: splits)
    launches = count_launches(monkeypatch, accumulate)
    accumulate.accumulate(operand(20, 30), operand(50, 30), operand(50, 20))
    assert len(launches) == expected and launches[0] == "_finite_kernel"
