"""Streams of (x, dy) whose exact gradient is known, and estimators that are fed with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loraga.estimators import Estimate, Estimator, LayerSpec, finish
from loraga.factors import Factors

CPU = torch.device("cpu")
RANK = 4  # triplets
R = RANK // 2
M, N = 300, 220

Pairs = Sequence[tuple[Tensor, Tensor]]


def spec(m: int = M, n: int = N, rank: int = RANK, seed: int = 3) -> LayerSpec:
    return LayerSpec("layer", m, n, rank, seed, CPU)


def stream(
    count: int,
    tokens: int = 96,
    m: int = M,
    n: int = N,
    seed: int = 0,
    decay: float = 0.8,
    scale: float = 1.0,
    directions: int = 40,
    noise: float = 0.3,
) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches whose gradients share a signal, of strengths 1, 2^-decay, 3^-decay ..., and differ by noise."""
    g = torch.Generator().manual_seed(seed)
    common_x, common_dy = torch.randn(directions, n, generator=g), torch.randn(directions, m, generator=g)
    weight = torch.arange(1, directions + 1, dtype=torch.float32) ** -decay
    result = []
    for _ in range(count):
        mix = torch.randn(tokens, directions, generator=g) * weight
        x = mix @ common_x + noise * torch.randn(tokens, n, generator=g)
        dy = mix @ common_dy + noise * torch.randn(tokens, m, generator=g)
        result.append((x, dy * scale))
    return result


def flat(count: int, m: int, n: int, directions: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches whose gradients share `directions` directions of nearly the same strength."""
    return stream(count, directions // count, m, n, decay=0.0, directions=directions, noise=0.0)


def spread(count: int, m: int = M, n: int = N, directions: int = 200) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches that share nothing: the singular values of their sum fall from 2 to 1."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.linalg.qr(torch.randn(size, directions, generator=g)).Q.T for size in (n, m))
    dy = dy * torch.linspace(2.0, 1.0, directions)[:, None]
    return [(x[i::count], dy[i::count]) for i in range(count)]


def exact(pairs: Pairs) -> Tensor:
    """The mean gradient in float64."""
    return sum(dy.double().T @ x.double() for x, dy in pairs) / len(pairs)


def lost_energy(pairs: Pairs, factors: Factors) -> float:
    """Share of the energy of the best factors of this rank that these factors do not have.

    The exact singular values come from the thin matrices of all tokens, which is fast where the gradient is large.
    """
    x, dy = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    core = torch.linalg.qr(dy.T).R @ torch.linalg.qr(x.T).R.T / len(pairs)
    best = torch.linalg.svdvals(core)[: factors.rank].square().sum()
    kept = (factors.U.double().T @ exact(pairs) @ factors.Vh.double().T).square().sum()
    return float(1 - kept / best)


def cold_start(pairs: Pairs, rank: int, columns: int, power_steps: int) -> Factors:
    """What a sketch of so many columns gives in float64 if each micro-batch starts from random directions."""
    g = torch.Generator().manual_seed(7)
    x, dy = pairs[0]
    q = torch.zeros(dy.shape[1], columns, dtype=torch.float64)
    z = torch.zeros(columns, x.shape[1], dtype=torch.float64)
    for x, dy in pairs:
        x, dy = x.double(), dy.double()
        v = torch.randn(x.shape[1], columns, dtype=torch.float64, generator=g)
        for _ in range(1 + power_steps):
            new_q = torch.linalg.qr(dy.T @ (x @ v) + q @ (z @ v)).Q
            new_z = (new_q.T @ dy.T) @ x + (new_q.T @ q) @ z
            v = torch.linalg.qr(new_z.T).Q
        q, z = new_q, new_z
    U, S, Vh = torch.linalg.svd(z, full_matrices=False)
    return Factors(q @ U[:, :rank], S[:rank], Vh[:rank])


def feed(estimator: Estimator, pairs: Iterable[tuple[Tensor, Tensor]]) -> Estimator:
    for x, dy in pairs:
        estimator.update(x, dy)
    return estimator


def end(estimator: Estimator, divisor: float) -> Estimate:
    return finish({"layer": estimator}, {"layer": divisor})["layer"]


def run(estimator: Estimator, pairs: Pairs) -> Estimate:
    return end(feed(estimator, pairs), len(pairs))


def merged(estimators: Sequence[Estimator], scale: float) -> None:
    """Merge estimators of one layer as ranks do, the sum over ranks taken in this process."""
    for tensors in zip(*(type(one).merging([one], scale) for one in estimators), strict=True):
        total = torch.stack(tensors).sum(0)
        for tensor in tensors:
            tensor.copy_(total)
