"""The dense estimator: it stores the sum of gradients in one buffer per layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from loraga.estimators.base import LayerSpec, stacked
from loraga.estimators.host_buffers import StagingRing
from loraga.factors import Factors
from loraga.linalg import truncated_svd
from loraga.ops import declared
from loraga.ops.reference import all_finite

# Numbers of a buffer that are widened to float32 at a time.
_BLOCK_NUMBERS = 2**22


class Dense:
    """Computes the factors of a sum of gradients from an m x n buffer.

    Args:
        spec (`LayerSpec`): the layer.
        dtype (`torch.dtype`): of the buffer. bfloat16 rounds once per micro-batch and is accurate up to about 256 of
            them (docs/numerics.md).
        ring (`StagingRing`, *optional*): the buffer is in host memory, and the device adds to it through this ring.
            Without it, the buffer is on the device.

    Raises:
        ValueError: the ring's blocks are too small for a row of the buffer.
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype = torch.float32, ring: StagingRing | None = None) -> None:
        self.spec, self._dtype = spec, dtype
        if ring is None:
            self._g = torch.zeros(spec.m, spec.n, dtype=dtype, device=spec.device)
        else:
            self._host = ring.matrix(spec.name, spec.m, spec.n, dtype)
        self._ring = ring

    @property
    def finish_key(self) -> Hashable:
        return Dense, self._dtype, self.spec.m, self.spec.n, self.spec.rank, self.spec.device

    @property
    def state(self) -> tuple[Tensor, ...]:
        return (self._g if self._ring is None else self._host.values,)

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state)

    @property
    def exchange_bytes(self) -> int:
        return 4 * self.spec.m * self.spec.n

    @property
    def merged_bytes(self) -> int:
        return 4 * self.spec.m * self.spec.n  # summed over ranks in float32

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        if self._ring is None:
            return declared.accumulate_(self._g, x, dy, scale)
        finite = all_finite(x) & all_finite(dy)
        dy = torch.where(finite, dy, torch.nan)  # so that either all blocks of rows are added or none
        self._ring.update(self._host, lambda g, rows: declared.accumulate_(g, x, dy[:, rows], scale), keep=(x, dy))
        return finite

    def add(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """Like `update`, for a gradient that autograd has formed: m n numbers, in any memory layout.

        After this call the caller's stream may reuse the gradient's memory.
        """
        if gradient.dtype == torch.float64:
            gradient = gradient.float()
        if self._ring is None:
            return declared.gradient_add_(self._g, gradient, scale)
        finite = all_finite(gradient)
        self._ring.update(
            self._host,
            lambda g, rows: declared.gradient_add_(g, gradient[rows], scale, finite),
            keep=(gradient, finite),
            wait=True,
        )
        return finite

    def _sum(self) -> Tensor:
        """The buffer, on its device."""
        return self._g if self._ring is None else self._ring.load(self._host)

    def _taken(self) -> Tensor:
        """The buffer, on its device. The estimator gives up its own reference."""
        g = self._sum()
        if self._ring is None:
            del self._g
        else:
            del self._host
        return g

    @staticmethod
    def merging(group: Sequence[Dense], scale: float) -> Iterator[Tensor]:
        device = group[0].spec.device
        total = torch.stack([dense._sum().to(device, torch.float32) for dense in group]).mul_(scale)
        yield total
        for dense, merged in zip(group, total, strict=True):
            if dense._ring is None:
                dense._g.copy_(merged)
            else:
                dense._ring.store(dense._host, merged)

    @staticmethod
    def finish(group: Sequence[Dense]) -> tuple[Factors, Tensor]:
        spec = group[0].spec
        g = stacked([estimator._taken() for estimator in group])
        factors = truncated_svd(g, spec.rank, seed=[estimator.spec.seed for estimator in group])
        # rounding must not make the energy smaller than that of the factors
        return factors, torch.maximum(_energy(g, factors.S[:, 0]), factors.S.double().square().sum(-1))


def _energy(g: Tensor, largest: Tensor) -> Tensor:
    """Squared Frobenius norm (b,) float64 of each matrix of `g` (b, m, n).

    `largest` (b,) is about the spectral norm of each matrix. Entries are divided by it, so that squares neither
    overflow nor underflow. The sum is taken over blocks of rows, so that their float32 copies need little memory.
    """
    b, _, n = g.shape
    scale = largest.clamp_min(1e-30)
    total = torch.zeros(b, dtype=torch.float64, device=g.device)
    for block in g.split(max(1, _BLOCK_NUMBERS // (b * n)), dim=1):
        total += (block / scale[:, None, None]).square().sum((-2, -1), dtype=torch.float64)
    return total * scale.double().square()
