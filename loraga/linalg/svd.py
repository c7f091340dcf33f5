"""Truncated SVD by randomized subspace iteration, deterministic and with fixed signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraga.factors import Factors
from loraga.linalg.precision import own_precision
from loraga.ops import declared


def in_sixteens(columns: int) -> int:
    """`columns` rounded up to a multiple of 16, the number that matrix units and wide loads process at once."""
    return -(-columns // 16) * 16


def fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of vectors so that the largest entry (by size) of each column of `u` is positive.

    u (..., m, k), vh (..., k, n).
    """
    peak = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return u * sign, vh * sign.mT


def factorize(q: Tensor, z: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """The first `rank` singular triplets of each Q Z, and all its k singular values (..., k).

    q (..., m, k) float32 with any columns, z (..., k, n) float32, k <= min(m, n); the factors have the same leading
    dimensions. It computes orthonormal bases of both sides and the SVD of one k x k core, and forms no m x n matrix.
    """
    left = declared.orthonormalize(q)
    right = declared.orthonormalize(z.mT)
    return _triplets(left, (left.mT @ q) @ (z @ right), right, rank)


def _triplets(left: Tensor, core: Tensor, right: Tensor, rank: int) -> tuple[Factors, Tensor]:
    """The first `rank` triplets of left · core · rightᵀ and all its singular values (..., k).

    left (..., m, k) and right (..., n, k) are orthonormal, core is (..., k, k), all float32.
    """
    u, s, vh = declared.small_svd(core)
    u, vh = fix_signs(left @ u[..., :rank], vh[..., :rank, :] @ right.mT)
    return Factors(u, s[..., :rank], vh), s


def truncated_svd(
    g: Tensor, rank: int, *, seed: int | Sequence[int] = 0, oversampling: int = 32, iterations: int = 4
) -> Factors:
    """Leading `rank` singular triplets of `g` (m, n), or of each matrix of `g` (b, m, n).

    Randomized subspace iteration (`ops.declared.subspace`) with a block of max(2 rank, rank + oversampling) columns,
    rounded up to a multiple of 16. Signs are fixed by `fix_signs`.
    The size of the batch changes the triplets of a matrix by no more than rounding, and the values of the other
    matrices do not change them at all.

    Args:
        g (`torch.Tensor`): bfloat16, float16 or float32, any strides. Not changed.
        rank (`int`): number of triplets, at most min(m, n).
        seed (`int` or `Sequence[int]`): key of the test matrix; for a batch, one per matrix. The same seeds give the
            same bits.
        oversampling (`int`): least number of extra columns.
        iterations (`int`): passes with both gᵀ and g after the first product. Each multiplies the separation of the
            wanted singular values from the rest by the square of their ratio. A block of min(m, n) columns spans the
            smaller side; it gets at most one pass, which repairs the bad condition of a square test matrix.

    Returns:
        `Factors`: U (..., m, rank), S (..., rank), Vh (..., rank, n), float32.

    Raises:
        ValueError: `rank` is below 1 or above min(m, n), or the seeds do not match the batch.
    """
    m, n = g.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank={rank} must be between 1 and min(m, n) = {min(m, n)} for a matrix of shape {m, n}.")
    if isinstance(seed, int) != (g.dim() == 2):
        raise ValueError(
            f"seed must be one number for a matrix and a sequence for a batch; g has {g.dim()} dimensions."
        )
    if isinstance(seed, int):
        f = truncated_svd(g[None], rank, seed=[seed], oversampling=oversampling, iterations=iterations)
        return Factors(f.U[0], f.S[0], f.Vh[0])
    k = min(in_sixteens(max(2 * rank, rank + oversampling)), m, n)
    with own_precision(g.device):
        q, z = declared.subspace(g, k, iterations if k < min(m, n) else min(iterations, 1), seed)
        right = declared.orthonormalize(z.mT)
        factors, _ = _triplets(q, z @ right, right, rank)
    return factors
