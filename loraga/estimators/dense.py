"""The dense estimator: the sum of gradients itself, in one buffer per layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loraga import _ops
from loraga.estimators.base import Estimate, LayerSpec
from loraga.factors import Factors
from loraga.linalg import truncated_svd


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
    def spec(self) -> LayerSpec:
        return self._spec

    @property
    def state_bytes(self) -> int:
        return self._g.numel() * self._g.element_size()

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        if self._host:
            g = self._g.to(self._spec.device, non_blocking=True)
            finite = _ops.accumulate_(g, x, dy, scale)
            self._g.copy_(g, non_blocking=True)  # same stream as the next fetch, so the order is kept
            return finite
        return _ops.accumulate_(self._g, x, dy, scale)

    @property
    def exchange_bytes(self) -> int:
        return 4 * self._g.numel()

    @classmethod
    def merging(cls, group: Sequence[Dense], scale: float) -> Iterator[Tensor]:
        device = group[0]._spec.device
        total = torch.stack([dense._g.to(device, torch.float32) for dense in group]).mul_(scale)
        yield total
        for dense, g in zip(group, total, strict=True):
            dense._g.copy_(g)

    def finish(self, divisor: float) -> Estimate:
        g = self._g.to(self._spec.device)
        factors = truncated_svd(g, self._spec.rank, seed=self._spec.seed)
        scale = factors.S[0].clamp_min(1e-30)
        energy = max(float((g / scale).double().square().sum()), float((factors.S / scale).double().square().sum()))
        result = Estimate(
            factors=Factors(factors.U, factors.S / divisor, factors.Vh),
            energy=energy * (float(scale) / divisor) ** 2,
        )
        del self._g
        return result
