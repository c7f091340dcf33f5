"""The range finder against the exact SVD and against the reference, which draws the same numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, DTYPES, needs_device, operand

from loraga.kernels import subspace
from loraga.ops import reference

pytestmark = needs_device


def falling(b: int, m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    inner = min(m, n)
    spectrum = (1.0 + torch.arange(inner, device=DEVICE)) ** -1.0
    left, right = (torch.linalg.qr(operand(b, size, inner, seed=size)).Q for size in (m, n))
    return (left * spectrum @ right.mT).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 48, 16), (45, 83, 18), (90, 37, 20)])
def test_against_the_exact_svd(m, n, k, dtype):
    g = falling(2, m, n, dtype)
    q, z = subspace.subspace(g, k, 4, [3, 4])
    assert q.shape == (2, m, k) and z.shape == (2, k, n)
    eye = torch.eye(k, dtype=torch.float64, device=DEVICE)
    assert torch.linalg.matrix_norm(q.double().mT @ q.double() - eye, 2).max() <= 1e-6
    exact = torch.linalg.svdvals(g.double())[:, :8].square().sum(-1)
    captured = torch.linalg.svdvals(z.double())[:, :8].square().sum(-1)
    assert ((exact - captured).abs() <= 1e-4 * exact).all()
    basis, _ = reference.subspace(g, k, 4, [3, 4])
    projector, wanted = q.double() @ q.double().mT, basis.double() @ basis.double().mT
    assert ((projector - wanted) @ g.double()).norm() <= 2e-2 * g.double().norm()


def test_zero_rank_deficient_and_empty():
    g = torch.zeros(2, 40, 32, device=DEVICE)
    g[1] = operand(40, 3) @ operand(3, 32)
    q, z = subspace.subspace(g, 16, 2, [1, 2])
    eye = torch.eye(16, dtype=torch.float64, device=DEVICE)
    assert torch.linalg.matrix_norm(q.double().mT @ q.double() - eye, 2).max() <= 1e-6
    assert (z[0] == 0).all()
    assert (q[1] @ z[1] - g[1]).norm() <= 1e-5 * g[1].norm()
    q, z = subspace.subspace(torch.empty(0, 40, 32, device=DEVICE), 16, 2, [])
    assert q.shape == (0, 40, 16) and z.shape == (0, 16, 32)
