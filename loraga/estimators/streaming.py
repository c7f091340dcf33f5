"""The streaming estimator: the range of a sum of gradients, none of which is ever formed.

Kept per layer: Q (m, k) orthonormal and Z (k, n) with (sum so far) ≈ Q Z. A micro-batch with gradient G_t = dYᵀ X is
absorbed by one step of subspace iteration on Q Z + G_t, warm-started from the row space of Z (design §4.2):

    V  = orth(Zᵀ)
    Y  = G_t V + Q (Z V)            left product
    Q' = orth(Y)
    Z' = Q'ᵀ G_t + (Q'ᵀ Q) Z        right product

The idea of updating a truncated factorization in place is that of incremental SVD (Brand, 2006); the range finder is
that of Halko, Martinsson, Tropp (2011), algorithm 4.4, with G applied as a product of two thin matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loraga import _ops
from loraga.estimators.base import Estimate, LayerSpec
from loraga.linalg import test_matrix
from loraga.linalg.svd import factorize

# Random vectors that G is applied to beside V, to estimate the energy that the sketch does not hold.
_PROBES = 8


def sketch_width(rank: int) -> int:
    """Columns k of the sketch for `rank` triplets: max(4 rank, rank + 64), that is max(8r, 2r + 64) for LoRA-GA."""
    return max(4 * rank, rank + 64)


def power_steps(micro_batches: int | None) -> int:
    """Extra passes over a micro-batch beyond one right product to start from and one left and right product each.

    The warm start makes every further micro-batch a power step for the ones before it, so only a single one needs a
    step of its own (measured: docs/numerics.md).
    """
    return 1 if micro_batches == 1 else 0


def _basis(y: Tensor) -> Tensor:
    """Orthonormal to what an intermediate basis needs; `finish` makes the factors orthonormal to the last digit."""
    return _ops.orthonormalize(y, refine=False)


def _product(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1.0 else product.mul_(scale)


def _all_finite(values: Tensor) -> Tensor:
    """0-dim bool; one pass over `values`, no temporary of their size."""
    low, high = torch.aminmax(values)
    return torch.isfinite(low) & torch.isfinite(high)


class Streaming:
    """Factors of a sum of gradients from k (m + n) numbers of state, k = `sketch_width(rank)`.

    Args:
        spec (`LayerSpec`): the layer.
        micro_batches (`int`, *optional*): how many updates will come, where that is known; a single one gets a power
            step.
    """

    def __init__(self, spec: LayerSpec, micro_batches: int | None = None) -> None:
        self._spec = spec
        self._micro_batches = micro_batches
        self._k = sketch_width(spec.rank)
        self._q = torch.zeros(spec.m, self._k, dtype=torch.float32, device=spec.device)
        self._z = torch.zeros(self._k, spec.n, dtype=torch.float32, device=spec.device)
        self._probes = test_matrix(spec.n, _PROBES, spec.seed + 1, spec.device)
        self._probed = torch.zeros(spec.m, _PROBES, dtype=torch.float32, device=spec.device)
        self._empty = True

    @staticmethod
    def pays(spec: LayerSpec) -> bool:
        """Is the sketch cheaper than the gradient itself (mn > 2k (m + n), in flops as in bytes)?"""
        return spec.m * spec.n > 2 * sketch_width(spec.rank) * (spec.m + spec.n)

    @property
    def spec(self) -> LayerSpec:
        return self._spec

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._q, self._z, self._probes, self._probed))

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        # NaN or Inf in x or dy makes `left` not finite and all that follows worthless: it is dropped at the end
        q, z = self._q, self._z
        if self._empty:  # nothing summed yet: start from the left, which costs half of a pass
            start = test_matrix(self._spec.m, self._k, self._spec.seed, q.device)
            v, zv = _basis(_ops.right_product(x, dy, start).mT), None
        else:
            v = _basis(z.mT)
            zv = z @ v
        left = _product(_ops.left_product(x, dy, torch.cat((v, self._probes), dim=1)), scale)
        new_q = self._range(left[:, : self._k], zv)
        for _ in range(power_steps(self._micro_batches)):
            v = _basis(self._project(x, dy, scale, new_q).mT)
            new_q = self._range(_product(_ops.left_product(x, dy, v), scale), z @ v)
        new_z = self._project(x, dy, scale, new_q)
        finite = _all_finite(left) & _all_finite(new_z)
        # in place, so that the memory of the state is taken once
        torch.where(finite, new_q, q, out=q)
        torch.where(finite, new_z, z, out=z)
        self._probed += torch.where(finite, left[:, self._k :], 0.0)
        self._empty = False
        return finite

    def _range(self, y: Tensor, zv: Tensor | None) -> Tensor:
        """orth(G_t V + Q (Z V))."""
        return _basis(y if zv is None else torch.addmm(y, self._q, zv))

    def _project(self, x: Tensor, dy: Tensor, scale: float, q: Tensor) -> Tensor:
        """Qᵀ (G_t + Q_old Z_old), the projection of the sum on the range of `q`."""
        projected = _product(_ops.right_product(x, dy, q), scale)
        return projected if self._empty else projected.addmm_(q.mT @ self._q, self._z)

    @property
    def exchange_bytes(self) -> int:
        return 4 * max(self._spec.n * self._k, self._spec.m * (self._k + _PROBES))

    @classmethod
    def merging(cls, group: Sequence[Streaming], scale: float) -> Iterator[Tensor]:
        """The range finder on the sum S of the ranks' Q Z, which is formed nowhere (design §4.7).

            V = orth(Sᵀ Ω),   Q = orth(S V),   Z = Qᵀ S

        Ω is the same on all ranks, so each of the three is a sum over ranks.
        """
        first = group[0]
        device, k = first._q.device, first._k
        q = torch.stack([streaming._q.to(device) for streaming in group])
        z = torch.stack([streaming._z.to(device) for streaming in group]).mul_(scale)
        omega = torch.stack([test_matrix(first._spec.m, k, s._spec.seed + 2, device) for s in group])
        sketch = z.mT @ (q.mT @ omega)
        yield sketch
        v = _basis(sketch)
        # what the probes saw is a sum over ranks already, and travels with the second
        probed = torch.stack([streaming._probed.to(device) for streaming in group]).mul_(scale)
        reached = torch.cat((q @ (z @ v), probed), dim=2)
        yield reached
        merged_q = _basis(reached[..., :k])
        merged_z = (merged_q.mT @ q) @ z
        yield merged_z
        for streaming, *state in zip(group, merged_q, merged_z, reached[..., k:], strict=True):
            for own, merged in zip((streaming._q, streaming._z, streaming._probed), state, strict=True):
                own.copy_(merged)

    def finish(self, divisor: float) -> Estimate:
        factors, spectrum = factorize(self._q, self._z, self._spec.rank)
        # energy = |QZ|² exactly + E|(I − QQᵀ) G ω|² / E|ω_i|², estimated from the probes (Hutchinson, 1989);
        # entries of ω are uniform in [-1, 1): variance 1/3
        scale = spectrum[0].clamp_min(1e-30)
        outside = (self._probed - self._q @ (self._z @ self._probes)) / scale
        energy = (spectrum / scale).double().square().sum() + 3 * outside.double().square().sum() / _PROBES
        result = Estimate(
            factors=type(factors)(factors.U, factors.S / divisor, factors.Vh),
            energy=float(energy * (scale.double() / divisor).square()),
        )
        del self._q, self._z, self._probed, self._probes
        return result
