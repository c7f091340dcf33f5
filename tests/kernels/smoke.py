"""Every kernel once, on shapes that reach each branch: what `benchmarks/gpu_session.sh` gives to compute-sanitizer.

Not collected by `pytest` alone: test_products.py asks more of the same kernels.
"""

from __future__ import annotations

import pytest
import torch
from kernel_operands import operand

from loraga.kernels import accumulate, commit, orthonormalize, random, streaming, subspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "m", "n", "k"), [(512, 256, 512, 88), (67, 45, 83, 19), (8192, 64, 96, 16)])
def test_every_kernel(tokens, m, n, k, dtype):
    x, dy = operand(tokens, n, dtype=dtype), operand(tokens, m, dtype=dtype, seed=1)
    v, q, z = operand(n, k + 8), operand(m, k), operand(k, n)
    left = streaming.left_product(x, dy, v, 0.5, True, q, operand(k, k))
    new_z = streaming.right_product(x, dy, q, 0.5, True, operand(k, k), z)
    probed = torch.zeros_like(left[:, k:]).contiguous()
    assert commit.commit(q, z, probed, orthonormalize.orthonormalize(q, refine=False), new_z, left)
    for buffer in (torch.bfloat16, torch.float32):
        g = operand(m, n, dtype=buffer)
        assert accumulate.accumulate(g, x, dy, 0.5)
        for rank in (16, 18):
            basis, projection = subspace.subspace(g[None], rank, 1, [3])
            assert torch.isfinite(basis).all() and torch.isfinite(projection).all()
    random.fill(v, 5)
    assert torch.isfinite(left).all() and torch.isfinite(new_z).all()
