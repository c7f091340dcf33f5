"""Every CUDA kernel of the native core once, wherever its arrays lie: what `benchmarks/gpu_session.sh` gives to
compute-sanitizer, with which it has to be quick.

Not collected by `pytest` alone: the other files here ask more of the same kernels.
"""

from __future__ import annotations

import pytest
import torch

from loraga.ops import native_core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a native core that is of no use there fails


@pytest.mark.parametrize("k", [1, 40, 130, 180])  # on an H100: both arrays in shared memory, or one, or none
def test_jacobi(k):
    core = torch.randn(3, k, k, device=DEVICE)
    core[1] = core[1, :, :1] * core[1, :1]  # the rest of its basis is completed
    core[2, 0, 0] = torch.nan
    u, s, vh, status = native_core.jacobi_svd(core)
    assert status.tolist() == [0, 0, 2]
    assert torch.allclose((u * s[:, None] @ vh)[:2], core[:2], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 40, 200, 350])  # the last is worked on in place
def test_cholesky(k, dtype):
    tall = torch.randn(3, k, 2 * k, dtype=dtype, device=DEVICE)
    gram = tall @ tall.mT
    gram[2] = -1.0
    inverse, status = native_core.cholesky_inverse(gram, 1e-12)
    assert status.tolist() == [0, 0, 1]
    identity = (inverse @ gram @ inverse.mT)[:2]
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-3}[dtype]  # the shift is in the first, too
    assert torch.allclose(identity, torch.eye(k, dtype=dtype, device=DEVICE), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient(dtype):
    in_order = torch.randn(70, 3, 50, device=DEVICE).to(dtype)
    for gradient in (in_order, in_order[1:], in_order.mT):  # the second is no multiple of 16 bytes from the start
        for sums in (torch.float32, torch.bfloat16):
            total = torch.zeros(gradient.numel(), device=DEVICE, dtype=sums)
            assert native_core.gradient_add(total, gradient, 0.5)
            assert torch.allclose(total.float(), 0.5 * gradient.float().reshape(-1), rtol=1e-2)
