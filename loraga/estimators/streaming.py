"""The streaming estimator: the range of a sum of gradients, without forming any of them.

The state of a layer is Q (m, k) orthonormal and Z (k, n) with (sum so far) ≈ Q Z. A micro-batch has the gradient
G_t = dYᵀ X. One step of subspace iteration on Q Z + G_t adds it; the step starts from the row space of Z
(docs/architecture.md):

    V  = orth(Zᵀ)
    Y  = G_t V + Q (Z V)            left product
    Q' = orth(Y)
    Z' = Q'ᵀ G_t + (Q'ᵀ Q) Z        right product

Incremental SVD (Brand, 2006) also updates a truncated factorization in place. The range finder is algorithm 4.4 of
Halko, Martinsson, Tropp (2011), in which G is applied as a product of two matrices.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from loraga.estimators.base import LayerSpec, stacked
from loraga.factors import Factors
from loraga.linalg import test_matrix
from loraga.linalg.svd import factorize, in_sixteens
from loraga.ops import declared

# Number of random vectors that G is applied to together with V. They estimate the energy outside of the sketch. Matrix
# units process 16 columns at once.
_PROBES = 16


def sketch_width(rank: int) -> int:
    """Columns k of the sketch for `rank` triplets: max(4 rank, rank + 64).

    Rounded up to a multiple of 16.
    """
    return in_sixteens(max(4 * rank, rank + 64))


def power_steps(micro_batches: int | None) -> int:
    """Number of extra passes over a micro-batch, each of one right and one left product.

    With the warm start every further micro-batch is a power step for those before it. Only a single micro-batch has
    none after it and needs an extra pass (measured: docs/numerics.md).
    """
    return 1 if micro_batches == 1 else 0


def _basis(y: Tensor) -> Tensor:
    """An orthonormal basis, as accurate as an intermediate result needs; `finish` orthonormalizes to full accuracy."""
    return declared.orthonormalize(y, refine=False)


class Streaming:
    """Computes factors of a sum of gradients from k (m + n) numbers of state, k = `sketch_width(rank)`.

    Args:
        spec (`LayerSpec`): the layer.
        micro_batches (`int`, *optional*): number of updates that will come, if known. A single one gets a power step.
    """

    def __init__(self, spec: LayerSpec, micro_batches: int | None = None) -> None:
        self.spec = spec
        self._micro_batches = micro_batches
        self._k = sketch_width(spec.rank)
        self._q = torch.zeros(spec.m, self._k, dtype=torch.float32, device=spec.device)
        self._z = torch.zeros(self._k, spec.n, dtype=torch.float32, device=spec.device)
        self._probes = test_matrix(spec.n, _PROBES, spec.seed + 1, spec.device)
        self._probed = torch.zeros(spec.m, _PROBES, dtype=torch.float32, device=spec.device)
        self._empty = True

    @staticmethod
    def pays(spec: LayerSpec) -> bool:
        """Whether the sketch is cheaper than the gradient itself: mn > 2k (m + n), for flops and bytes alike."""
        return spec.m * spec.n > 2 * sketch_width(spec.rank) * (spec.m + spec.n)

    @property
    def columns(self) -> int:
        """k, the width of the sketch."""
        return self._k

    @property
    def finish_key(self) -> Hashable:
        return Streaming, self.spec.m, self.spec.n, self.spec.rank, self.spec.device

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self._q, self._z, self._probes, self._probed

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state)

    @property
    def exchange_bytes(self) -> int:
        return 4 * max(self.spec.n * self._k, self.spec.m * (self._k + _PROBES))

    @property
    def merged_bytes(self) -> int:
        # three sums over ranks: SᵀΩ (n, k), S V with the products of the probes (m, k + probes), and Qᵀ S (k, n)
        return sum(t.numel() * t.element_size() for t in (self._z, self._q, self._probed, self._z))

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        # A NaN or Inf in x or dy makes `left` or the new Z not finite. Then `commit_` keeps the old state.
        if self._empty:  # there is no Z to start from: start with a random matrix on the left, for half of a pass
            start = test_matrix(self.spec.m, self._k, self.spec.seed, self._q.device)
            v = _basis(declared.right_product(x, dy, start, rounded=True).mT)
        else:
            v = _basis(self._z.mT)
        left = self._left(x, dy, scale, v, torch.cat((v, self._probes), dim=1))
        q = _basis(left[:, : self._k])
        for _ in range(power_steps(self._micro_batches)):
            v = _basis(self._right(x, dy, scale, q, rounded=True).mT)
            q = _basis(self._left(x, dy, scale, v, v))
        finite = declared.commit_(self._q, self._z, self._probed, q, self._right(x, dy, scale, q, rounded=False), left)
        self._empty = False
        return finite

    def _left(self, x: Tensor, dy: Tensor, scale: float, v: Tensor, columns: Tensor) -> Tensor:
        """(G_t + Q Z) V; `columns` is V and further columns, which are multiplied with G_t only."""
        onto = None if self._empty else (self._q, self._z @ v)
        return declared.left_product(x, dy, columns, scale, rounded=True, onto=onto)

    def _right(self, x: Tensor, dy: Tensor, scale: float, q: Tensor, rounded: bool) -> Tensor:
        """Qᵀ (G_t + Q_old Z_old), the projection of the sum on the range of `q`."""
        onto = None if self._empty else (q.mT @ self._q, self._z)
        return declared.right_product(x, dy, q, scale, rounded=rounded, onto=onto)

    @staticmethod
    def merging(group: Sequence[Streaming], scale: float) -> Iterator[Tensor]:
        """The range finder on the sum S of the ranks' Q Z, which is never formed (docs/architecture.md).

            V = orth(Sᵀ Ω),   Q = orth(S V),   Z = Qᵀ S

        Ω is the same on all ranks, so each of the three is a sum over ranks.
        """
        device, k = group[0].spec.device, group[0]._k
        q, z, probed = (
            stacked([state.to(device) for state in states])
            for states in zip(*((s._q, s._z, s._probed) for s in group), strict=True)
        )
        z = z * scale
        omega = stacked([test_matrix(s.spec.m, k, s.spec.seed + 2, device) for s in group])
        sketch = z.mT @ (q.mT @ omega)
        yield sketch
        v = _basis(sketch)
        # the products with the probes only need to be summed, and are part of the second all-reduce
        reached = torch.cat((q @ (z @ v), probed * scale), dim=2)
        yield reached
        merged_q = _basis(reached[..., :k])
        merged_z = (merged_q.mT @ q) @ z
        yield merged_z
        for streaming, *state in zip(group, merged_q, merged_z, reached[..., k:], strict=True):
            for own, merged in zip((streaming._q, streaming._z, streaming._probed), state, strict=True):
                own.copy_(merged)

    @staticmethod
    def finish(group: Sequence[Streaming]) -> tuple[Factors, Tensor]:
        state = [(estimator._q, estimator._z, estimator._probes, estimator._probed) for estimator in group]
        q, z, probes, probed = (stacked(tensors) for tensors in zip(*state, strict=True))
        del state
        for estimator in group:
            del estimator._q, estimator._z, estimator._probes, estimator._probed
        factors, spectrum = factorize(q, z, group[0].spec.rank)
        # energy = |QZ|² exactly + E|(I − QQᵀ) G ω|² / E|ω_i|², estimated from the probes (Hutchinson, 1989);
        # entries of ω are uniform in [-1, 1): variance 1/3
        scale = spectrum[:, :1, None].clamp_min(1e-30)
        outside = ((probed - q @ (z @ probes)) / scale).double().square().sum((-2, -1))
        inside = (spectrum[:, None] / scale).double().square().sum((-2, -1))
        return factors, (inside + 3 * outside / _PROBES) * scale[:, 0, 0].double().square()
