"""Randomized subspace iteration on a batch of buffers of one shape: the range finder of `linalg.truncated_svd`.

    Q = orth(G Ω);   `iterations` times:  W = orth(Gᵀ Q),  Q = orth(G W);   Z = Qᵀ G

Halko, Martinsson, Tropp (2011), algorithm 4.4. G is read once per product and never copied or widened; Ω is drawn where
it is used. Launches: 2 + 16 x iterations, whatever the number of matrices, and one more for each sum that is cut into
parts. Besides these, torch makes the last basis, which is exact to float32, and casts thin operands to half types.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraga.kernels.thin import fold, project
from loraga.ops import declared, reference

subspace_reference = reference.subspace


def subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See `loraga.ops.declared.subspace`: q (b, m, k) orthonormal and z = qᵀ g (b, k, n), float32, for g (b, m, n)."""
    if k % 4 == 0:
        y = project(g, None, seeds=seeds, k=k)
    else:  # drawing goes by fours
        omega = torch.empty(g.shape[0], g.shape[2], k, dtype=torch.float32, device=g.device)
        for out, seed in zip(omega, seeds, strict=True):
            declared.test_matrix_(out, seed)
        y = project(g, omega.to(g.dtype))
    for _ in range(iterations):
        q = declared.basis(y)
        v = declared.basis(fold(g, q.to(g.dtype)))
        y = project(g, v.to(g.dtype))
    q = declared.orthonormalize(y)
    if g.dtype == torch.float32:
        return q, fold(g, q, transposed=True)
    # what rounding Q to a half type leaves goes in as columns of their own: see the reference
    high = q.to(g.dtype)
    z = fold(g, torch.cat((high, (q - high).to(g.dtype)), dim=-1), transposed=True)
    return q, z[:, :k] + z[:, k:]
