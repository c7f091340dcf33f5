"""The dense estimator: the sum of gradients itself, in one buffer per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from loraga import _ops
from loraga.estimators.base import Estimate, LayerSpec
from loraga.estimators.staging import StagingRing
from loraga.factors import Factors
from loraga.linalg import truncated_svd


class Dense:
    """Factors of a sum of gradients from an m x n buffer.

    Args:
        spec (`LayerSpec`): the layer.
        dtype (`torch.dtype`): of the buffer. bfloat16 rounds once per micro-batch: sound up to about 256 of them.
        ring (`StagingRing`, *optional*): keep the buffer in host memory and sum through this ring of the device; left
            out, the buffer is on the device.

    Raises:
        ValueError: the ring's blocks are too small for a row of the buffer.
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype = torch.float32, ring: StagingRing | None = None) -> None:
        self._spec = spec
        if ring is None:
            self._g = torch.zeros(spec.m, spec.n, dtype=dtype, device=spec.device)
        else:
            self._host = ring.matrix(spec.name, spec.m, spec.n, dtype)
        self._ring = ring

    @property
    def state_bytes(self) -> int:
        g = self._g if self._ring is None else self._host.values
        return g.numel() * g.element_size()

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        if self._ring is None:
            return _ops.accumulate_(self._g, x, dy, scale)
        finite = torch.isfinite(x).all() & torch.isfinite(dy).all()
        dy = torch.where(finite, dy, torch.nan)  # either every block of rows takes its part in or none does
        self._ring.update(self._host, lambda g, rows: _ops.accumulate_(g, x, dy[:, rows], scale), keep=(x, dy))
        return finite

    def add(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """As `update`, for a gradient that autograd has formed: m n numbers, in any layout, read once.

        Behind this call the caller's stream may use the gradient's memory anew.
        """
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if gradient.dtype == torch.float64:
            gradient = gradient.float()
        if self._ring is None:
            return _ops.gradient_add_(self._g, gradient, scale)
        low, high = torch.aminmax(gradient)  # NaN goes through; no temporary of the gradient's size
        finite = torch.isfinite(low) & torch.isfinite(high)
        self._ring.update(
            self._host,
            lambda g, rows: _ops.gradient_add_(g, gradient[rows], scale, finite),
            keep=(gradient, finite),
            wait=True,
        )
        return finite

    def finish(self, divisor: float) -> Estimate:
        g = self._g if self._ring is None else self._ring.load(self._host)
        factors = truncated_svd(g, self._spec.rank, seed=self._spec.seed)
        scale = factors.S[0].clamp_min(1e-30)
        energy = max(float((g / scale).double().square().sum()), float((factors.S / scale).double().square().sum()))
        result = Estimate(
            factors=Factors(factors.U, factors.S / divisor, factors.Vh),
            energy=energy * (float(scale) / divisor) ** 2,
        )
        if self._ring is None:
            del self._g
        else:
            del self._host
        return result
