"""The dense estimator: the sum of gradients itself, in one buffer per layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from loraga import _ops
from loraga.estimators.base import LayerSpec, stacked
from loraga.factors import Factors
from loraga.linalg import truncated_svd

# Numbers of a buffer that are widened at a time.
_BLOCK_NUMBERS = 2**22


class Dense:
    """Factors of a sum of gradients from an m x n buffer.

    Args:
        spec (`LayerSpec`): the layer.
        dtype (`torch.dtype`): of the buffer. bfloat16 rounds once per micro-batch: sound up to about 256 of them.
        host (`bool`): keep the buffer in (pinned) host memory and fetch it for each update.
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype = torch.float32, host: bool = False) -> None:
        self._spec = spec
        self._host = host and spec.device.type != "cpu"
        self._g = torch.zeros(
            spec.m, spec.n, dtype=dtype, device="cpu" if self._host else spec.device, pin_memory=self._host
        )

    @property
    def kind(self) -> Hashable:
        return Dense, self._g.dtype, self._spec.m, self._spec.n, self._spec.rank, self._spec.device

    @property
    def state_bytes(self) -> int:
        return self._g.numel() * self._g.element_size()

    @property
    def merged_bytes(self) -> int:
        return 4 * self._g.numel()  # summed over ranks in float32

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        if self._host:
            g = self._g.to(self._spec.device, non_blocking=True)
            finite = _ops.accumulate_(g, x, dy, scale)
            self._g.copy_(g, non_blocking=True)  # same stream as the next fetch, so the order is kept
            return finite
        return _ops.accumulate_(self._g, x, dy, scale)

    @staticmethod
    def finish(group: Sequence[Dense]) -> tuple[Factors, Tensor]:
        spec = group[0]._spec
        g = stacked([estimator._g.to(spec.device, non_blocking=True) for estimator in group])
        for estimator in group:
            del estimator._g
        factors = truncated_svd(g, spec.rank, seed=[estimator._spec.seed for estimator in group])
        # never below the factors' own energy, by the same sums
        return factors, torch.maximum(_energy(g, factors.S[:, 0]), factors.S.double().square().sum(-1))


def _energy(g: Tensor, largest: Tensor) -> Tensor:
    """Squared Frobenius norm (b,) float64 of each matrix of `g` (b, m, n), `largest` (b,) about its spectral norm.

    Taken in blocks of rows, so that widening them needs little memory.
    """
    b, _, n = g.shape
    scale = largest.clamp_min(1e-30)
    total = torch.zeros(b, dtype=torch.float64, device=g.device)
    for block in g.split(max(1, _BLOCK_NUMBERS // (b * n)), dim=1):
        total += (block / scale[:, None, None]).square().sum((-2, -1), dtype=torch.float64)
    return total * scale.double().square()
