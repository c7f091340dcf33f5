"""Truncated SVD by randomized subspace iteration, deterministic and with fixed signs."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from loraga import _ops
from loraga.factors import Factors


def seed_of(seed: int, name: str) -> int:
    """A 64-bit key of its own for each (seed, layer name), the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def test_matrix(rows: int, cols: int, seed: int, device: torch.device | str) -> Tensor:
    """(rows, cols) float32 on `device`: see `loraga._ops.test_matrix_`."""
    return _ops.test_matrix_(torch.empty(rows, cols, dtype=torch.float32, device=device), seed)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest would take the name for a test


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of vectors so that the largest entry (by size) of each column of `u` is positive."""
    peak = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return u * sign, vh * sign.mT


def factorize(q: Tensor, z: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """The first `rank` singular triplets of Q Z and all its k singular values (k,).

    q (m, k) float32 with any columns, z (k, n) float32, k <= min(m, n). Works through orthonormal bases of both sides
    and one k x k core, so nothing m x n is formed.
    """
    with torch.autocast(q.device.type, enabled=False):  # the caller's, which would round the products to half precision
        left = _ops.orthonormalize(q)
        right = _ops.orthonormalize(z.mT)
        core = (left.mT @ q) @ (z @ right)
        u, s, vh = _ops.small_svd(core)
        u, vh = fix_signs(left @ u[:, :rank], vh[:rank] @ right.mT)
    return Factors(u, s[:rank], vh), s


def truncated_svd(g: Tensor, rank: int, *, seed: int = 0, oversampling: int = 32, iterations: int = 4) -> Factors:
    """Leading `rank` singular triplets of `g` (m, n), bfloat16, float16 or float32.

    Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4) with a block of
    max(2 rank, rank + oversampling) columns, orthonormalised after every product.

    Args:
        g (`torch.Tensor`): (m, n). Not changed.
        rank (`int`): triplets wanted, at most min(m, n).
        seed (`int`): key of the test matrix; the same seed gives the same bits.
        oversampling (`int`): least number of extra columns.
        iterations (`int`): passes with both gᵀ and g after the first product; each sharpens the separation of the
            wanted singular values by the square of their ratio to the rest.

    Returns:
        `Factors`: U (m, rank), S (rank,), Vh (rank, n), float32.

    Raises:
        ValueError: `rank` is below 1 or above min(m, n).
    """
    m, n = g.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank={rank} must be between 1 and min(m, n) = {min(m, n)} for a matrix of shape {m, n}.")
    k = min(max(2 * rank, rank + oversampling), m, n)
    with torch.autocast(g.device.type, enabled=False):
        scale = g.abs().amax().float()
        g = g.float() / torch.where(scale > 0, scale, 1.0)
        q = _ops.orthonormalize(g @ test_matrix(n, k, seed, g.device))
        for _ in range(iterations):
            q = _ops.orthonormalize(g @ _ops.orthonormalize(g.mT @ q))
        factors, _ = factorize(q, q.mT @ g, rank)
    return Factors(factors.U, factors.S * scale, factors.Vh)
