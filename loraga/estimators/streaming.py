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

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from loraga import _ops
from loraga.estimators.base import LayerSpec, stacked
from loraga.factors import Factors
from loraga.linalg import test_matrix
from loraga.linalg.svd import factorize, in_sixteens

# Random vectors that G is applied to beside V, to estimate the energy that the sketch does not hold; as many as matrix
# units take at once.
_PROBES = 16


def sketch_width(rank: int) -> int:
    """Columns k of the sketch for `rank` triplets: max(4 rank, rank + 64), that is max(8r, 2r + 64) for LoRA-GA.

    Rounded up to a multiple of 16.
    """
    return in_sixteens(max(4 * rank, rank + 64))


def power_steps(micro_batches: int | None) -> int:
    """Extra passes over a micro-batch beyond one right product to start from and one left and right product each.

    The warm start makes every further micro-batch a power step for the ones before it, so only a single one needs a
    step of its own (measured: docs/numerics.md).
    """
    return 1 if micro_batches == 1 else 0


def _basis(y: Tensor) -> Tensor:
    """Orthonormal to what an intermediate basis needs; `finish` makes the factors orthonormal to the last digit."""
    return _ops.orthonormalize(y, refine=False)


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
    def columns(self) -> int:
        """k, the width of the sketch."""
        return self._k

    @property
    def kind(self) -> Hashable:
        return Streaming, self._spec.m, self._spec.n, self._spec.rank, self._spec.device

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._q, self._z, self._probes, self._probed))

    @property
    def merged_bytes(self) -> int:
        # SᵀΩ (n, k), S V and what the probes saw (m, k + probes), Qᵀ S (k, n): three sums over ranks
        return sum(t.numel() * t.element_size() for t in (self._z, self._q, self._probed, self._z))

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        # NaN or Inf in x or dy makes `left` not finite and all that follows worthless: `commit_` drops it at the end
        if self._empty:  # nothing summed yet: start from the left, which costs half of a pass
            start = test_matrix(self._spec.m, self._k, self._spec.seed, self._q.device)
            v = _basis(_ops.right_product(x, dy, start).mT)
        else:
            v = _basis(self._z.mT)
        left = self._left(x, dy, scale, v, torch.cat((v, self._probes), dim=1))
        q = _basis(left[:, : self._k])
        for _ in range(power_steps(self._micro_batches)):
            v = _basis(self._right(x, dy, scale, q).mT)
            q = _basis(self._left(x, dy, scale, v, v))
        finite = _ops.commit_(self._q, self._z, self._probed, q, self._right(x, dy, scale, q), left)
        self._empty = False
        return finite

    def _left(self, x: Tensor, dy: Tensor, scale: float, v: Tensor, beside: Tensor) -> Tensor:
        """(G_t + Q Z) V; columns that `beside` has beyond those of V see G_t only."""
        return _ops.left_product(x, dy, beside, scale, onto=None if self._empty else (self._q, self._z @ v))

    def _right(self, x: Tensor, dy: Tensor, scale: float, q: Tensor) -> Tensor:
        """Qᵀ (G_t + Q_old Z_old), the projection of the sum on the range of `q`."""
        return _ops.right_product(x, dy, q, scale, onto=None if self._empty else (q.mT @ self._q, self._z))

    @staticmethod
    def finish(group: Sequence[Streaming]) -> tuple[Factors, Tensor]:
        state = [(estimator._q, estimator._z, estimator._probes, estimator._probed) for estimator in group]
        q, z, probes, probed = (stacked(tensors) for tensors in zip(*state, strict=True))
        del state
        for estimator in group:
            del estimator._q, estimator._z, estimator._probes, estimator._probed
        factors, spectrum = factorize(q, z, group[0]._spec.rank)
        # energy = |QZ|² exactly + E|(I − QQᵀ) G ω|² / E|ω_i|², estimated from the probes (Hutchinson, 1989);
        # entries of ω are uniform in [-1, 1): variance 1/3
        scale = spectrum[:, :1, None].clamp_min(1e-30)
        outside = ((probed - q @ (z @ probes)) / scale).double().square().sum((-2, -1))
        inside = (spectrum[:, None] / scale).double().square().sum((-2, -1))
        return factors, (inside + 3 * outside / _PROBES) * scale[:, 0, 0].double().square()
