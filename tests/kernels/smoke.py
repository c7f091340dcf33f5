"""Every kernel once, on shapes that reach each branch: what `benchmarks/gpu_session.sh` gives to compute-sanitizer.

Not collected by `pytest` alone: the other files of this folder ask more of the same kernels.
"""

from __future__ import annotations

import pytest
import torch
from kernel_operands import operand

from loraga.kernels import accumulate, basis, commit, random, subspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "m", "n", "k"), [(512, 256, 512, 80), (67, 45, 83, 19), (8192, 160, 192, 150)])
def test_every_kernel(tokens, m, n, k, dtype):
    layers, probes = 2, 8
    z = operand(layers, k, n)
    v = basis.basis(z.mT)
    left = operand(layers, k + probes, m).mT
    new_q = basis.basis(left[..., :k])
    state = [operand(layers, m, k), operand(layers, k, n), operand(layers, m, probes)]
    assert commit.commit(*state, new_q, z, left).all()
    x, dy = operand(tokens, n, dtype=dtype), operand(tokens, m, dtype=dtype, seed=1)
    for buffer in (torch.bfloat16, torch.float32):
        g = operand(m, n, dtype=buffer)
        assert accumulate.accumulate(g, x, dy, 0.5)
        for rank in (16, 18):
            q, projection = subspace.subspace(g[None], rank, 1, [3])
            assert torch.isfinite(q).all() and torch.isfinite(projection).all()
    random.fill(v[0], 5)
    assert all(torch.isfinite(t).all() for t in (v, new_q, *state))
