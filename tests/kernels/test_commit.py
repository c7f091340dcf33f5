"""The end of a batch of updates: the kernels do what the reference does, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, count_launches, needs_device, operand

from loraga.kernels import commit
from loraga.ops import reference

pytestmark = needs_device


@pytest.mark.parametrize("order", ["rows", "columns", "slice"])
@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("poisoned", [(), ("left",), ("z",), ("left", "z")])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_layer_decides_alone(layers, poisoned, probes, order):
    m, n, k = 45, 130, 12
    state = [operand(layers, *shape) for shape in ((m, k), (k, n), (m, probes))]
    new_q, new_z = operand(layers, m, k, seed=1), operand(layers, k, n, seed=1)
    left = operand(layers, m, k + probes, seed=1)
    if order == "columns":
        left = left.mT.contiguous().mT
    elif order == "slice":
        left = torch.cat((left, left), dim=2)[..., : k + probes]
    if "left" in poisoned:
        left[0, m - 1, k + probes - 1] = torch.nan
    if "z" in poisoned:
        new_z[layers - 1, k - 1, n - 1] = -torch.inf
    expected = [t.clone() for t in state]
    finite = reference.commit_(*expected, new_q, new_z, left)
    result = commit.commit(*state, new_q, new_z, left)
    assert result.dtype == torch.bool and torch.equal(result, finite)
    assert int((~finite).sum()) == min(layers, len(poisoned))
    for got, wanted in zip(state, expected, strict=True):
        assert torch.equal(got, wanted)


def test_each_entry_counts():
    """NaN and both infinities, wherever they are: also beyond the first blocks of a program."""
    m, n, k = 700, 600, 4
    state = [operand(1, *shape) for shape in ((m, k), (k, n), (m, 2))]
    for bad in (torch.nan, torch.inf, -torch.inf):
        for where in ("left", "z"):
            new_q, new_z, left = operand(1, m, k), operand(1, k, n), operand(1, m, k + 2)
            operands = left if where == "left" else new_z
            operands[0, -1, -1] = bad
            assert not commit.commit(*state, new_q, new_z, left)


def test_launches(monkeypatch):
    launches = count_launches(monkeypatch, commit)
    for layers in (1, 5):
        launches.clear()
        state = [operand(layers, *shape) for shape in ((9, 4), (4, 20), (9, 2))]
        commit.commit(*state, operand(layers, 9, 4), operand(layers, 4, 20), operand(layers, 9, 6))
        assert launches == ["_finite_kernel", "_commit_kernel"]


def test_no_layer():
    empty = [torch.empty(0, *shape, device=DEVICE) for shape in ((9, 4), (4, 20), (9, 2), (9, 4), (4, 20), (9, 6))]
    assert commit.commit(*empty).shape == (0,)
