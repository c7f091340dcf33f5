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

Layers of one shape share memory, so that several of them are updated together: four products per layer, and everything
else once for all (`Streaming.absorb`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from loraga.estimators.base import LayerSpec, stacked
from loraga.factors import Factors
from loraga.linalg import test_matrix
from loraga.linalg.products import left_products, right_products
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


class Sketches:
    """The state of b layers of one shape, rank and device, stacked.

    Attributes:
        q (`torch.Tensor`): (b, m, k), orthonormal. Zero before the first update.
        z (`torch.Tensor`): (b, k, n), with (sum of gradients) ≈ Q Z.
        probes (`torch.Tensor`): (b, n, p), random vectors ω.
        probed (`torch.Tensor`): (b, m, p), the products of the sum with them.
    """

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        first, b = specs[0], len(specs)
        k = sketch_width(first.rank)
        self.q, self.z, self.probes, self.probed = (
            torch.zeros(b, *shape, dtype=torch.float32, device=first.device)
            for shape in ((first.m, k), (k, first.n), (first.n, _PROBES), (first.m, _PROBES))
        )
        for probes, spec in zip(self.probes, specs, strict=True):
            declared.test_matrix_(probes, spec.seed + 1)
        self._written: Any = _event(first.device)

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        """Context of a CUDA stream that updates the state. It waits for the writes before, on whatever stream.

        Afterwards the caller's stream waits for it. `stream` is None where the device has no streams.
        """
        if stream is None:
            yield
            return
        caller = torch.cuda.current_stream(stream.device)
        stream.wait_event(self._written)
        with torch.cuda.stream(stream):
            yield
        self._written = stream.record_event()
        caller.wait_event(self._written)

    def wait(self) -> None:
        """Make the caller's stream wait for the last write."""
        if self._written is not None:
            torch.cuda.current_stream(self.q.device).wait_event(self._written)

    def __getitem__(self, layers: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, z, probes, probed) of some layers, in the same memory."""
        return self.q[layers], self.z[layers], self.probes[layers], self.probed[layers]


class Streaming:
    """Computes factors of a sum of gradients from k (m + n) numbers of state, k = `sketch_width(rank)`.

    Args:
        spec (`LayerSpec`): the layer.
        micro_batches (`int`, *optional*): number of updates that will come, if known. A single one gets a power step.
        sketches (`Sketches`, *optional*): where its state is, at `index`. Without it, it gets a state of its own.
        index (`int`): its place in `sketches`.
    """

    def __init__(
        self, spec: LayerSpec, micro_batches: int | None = None, sketches: Sketches | None = None, index: int = 0
    ) -> None:
        self.spec = spec
        self._micro_batches = micro_batches
        self._sketches = Sketches([spec]) if sketches is None else sketches
        self._index = index
        self._empty = True

    @staticmethod
    def together(specs: Sequence[LayerSpec], micro_batches: int | None = None) -> list[Streaming]:
        """An estimator for each of `specs`, which share shape, rank and device, in one piece of memory."""
        sketches = Sketches(specs)
        return [Streaming(spec, micro_batches, sketches, index) for index, spec in enumerate(specs)]

    @staticmethod
    def pays(spec: LayerSpec) -> bool:
        """Whether the sketch is cheaper than the gradient itself: mn > 2k (m + n), for flops and bytes alike."""
        return spec.m * spec.n > 2 * sketch_width(spec.rank) * (spec.m + spec.n)

    @staticmethod
    def bytes_of(spec: LayerSpec) -> int:
        """Bytes of the state of one layer."""
        return 4 * (sketch_width(spec.rank) + _PROBES) * (spec.m + spec.n)

    @property
    def columns(self) -> int:
        """k, the width of the sketch."""
        return sketch_width(self.spec.rank)

    @property
    def place(self) -> tuple[Hashable, int]:
        """Layers that can be absorbed together have equal first and consecutive second values.

        They are neighbours in memory, and all of them or none got an update before.
        """
        return (id(self._sketches), self._empty), self._index

    def on_stream(self, stream: Any) -> AbstractContextManager[None]:
        """See `Sketches.on_stream`."""
        return self._sketches.on_stream(stream)

    @property
    def finish_key(self) -> Hashable:
        return Streaming, self.spec.m, self.spec.n, self.spec.rank, self.spec.device

    @property
    def state(self) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in _shared([self]))

    @property
    def state_bytes(self) -> int:
        return self.bytes_of(self.spec)

    @property
    def exchange_bytes(self) -> int:
        return 4 * max(self.spec.n * self.columns, self.spec.m * (self.columns + _PROBES))

    @property
    def merged_bytes(self) -> int:
        q, z, _, probed = self.state
        # three sums over ranks: SᵀΩ (n, k), S V with the products of the probes (m, k + probes), and Qᵀ S (k, n)
        return sum(t.numel() * t.element_size() for t in (z, q, probed, z))

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        return self.absorb([self], [x], [dy], scale)[0]

    @staticmethod
    def absorb(group: Sequence[Streaming], xs: Sequence[Tensor], dys: Sequence[Tensor], scale: float = 1.0) -> Tensor:
        """Add scale · dyᵀ x to each of b layers that are neighbours in memory (see `place`), as `update` does to one.

        xs and dys hold b tensors each, (Tᵢ, n) and (Tᵢ, m), all of one dtype. Returns (b,) bool on the device, True
        where the product was added. On a CPU the bits are those of b single updates.
        """
        first = group[0]
        q, z, probes, probed = first._sketches[first._index : first._index + len(group)]

        def left(v: Tensor, columns: Tensor) -> Tensor:
            """(G_t + Q Z) V; `columns` is V and further columns, which are multiplied with G_t only."""
            out = left_products(xs, dys, columns, scale)
            if not first._empty:
                out.mT[:, : v.shape[2]].baddbmm_((z @ v).mT, q.mT)
            return out

        def right(q_new: Tensor, rounded: bool) -> Tensor:
            """Q'ᵀ (G_t + Q Z), the projection of the sum on the range of Q'."""
            out = right_products(xs, dys, q_new, scale, rounded=rounded)
            return out if first._empty else out.baddbmm_(q_new.mT @ q, z)

        # A NaN or Inf in x or dy makes `reached` or the new Z not finite. Then `commit_` keeps the old state.
        if first._empty:  # there is no Z to start from: start with a random matrix on the left, for half of a pass
            start = [test_matrix(s.spec.m, s.columns, s.spec.seed, s.spec.device) for s in group]
            v = declared.basis(right_products(xs, dys, stacked(start), rounded=True).mT, passes=1)
        else:
            v = declared.basis(z.mT, passes=1)
        reached = left(v, torch.cat((v, probes), dim=2))
        new_q = declared.basis(reached[..., : first.columns])
        for _ in range(power_steps(first._micro_batches)):
            v = declared.basis(right(new_q, rounded=True).mT, passes=1)
            new_q = declared.basis(left(v, v))
        del v
        finite = declared.commit_(q, z, probed, new_q, right(new_q, rounded=False), reached)
        for streaming in group:
            streaming._empty = False
        return finite

    @staticmethod
    def merging(group: Sequence[Streaming], scale: float) -> Iterator[Tensor]:
        """The range finder on the sum S of the ranks' Q Z, which is never formed (docs/architecture.md).

            V = orth(Sᵀ Ω),   Q = orth(S V),   Z = Qᵀ S

        Ω is the same on all ranks, so each of the three is a sum over ranks.
        """
        device, k = group[0].spec.device, group[0].columns
        q, z, _, probed = (tensor.to(device) for tensor in _shared(group))
        z = z * scale
        omega = stacked([test_matrix(s.spec.m, k, s.spec.seed + 2, device) for s in group])
        sketch = z.mT @ (q.mT @ omega)
        yield sketch
        v = declared.basis(sketch)
        # the products with the probes only need to be summed, and are part of the second all-reduce
        reached = torch.cat((q @ (z @ v), probed * scale), dim=2)
        yield reached
        merged_q = declared.basis(reached[..., :k])
        merged_z = (merged_q.mT @ q) @ z
        yield merged_z
        for streaming, *merged in zip(group, merged_q, merged_z, reached[..., k:], strict=True):
            own_q, own_z, _, own_probed = streaming.state
            for own, value in zip((own_q, own_z, own_probed), merged, strict=True):
                own.copy_(value)

    @staticmethod
    def finish(group: Sequence[Streaming]) -> tuple[Factors, Tensor]:
        q, z, probes, probed = _shared(group)
        for estimator in group:
            del estimator._sketches
        factors, spectrum = factorize(q, z, group[0].spec.rank)
        # energy = |QZ|² exactly + E|(I − QQᵀ) G ω|² / E|ω_i|², estimated from the probes (Hutchinson, 1989);
        # entries of ω are uniform in [-1, 1): variance 1/3
        scale = spectrum[:, :1, None].clamp_min(1e-30)
        outside = ((probed - q @ (z @ probes)) / scale).double().square().sum((-2, -1))
        inside = (spectrum[:, None] / scale).double().square().sum((-2, -1))
        return factors, (inside + 3 * outside / _PROBES) * scale[:, 0, 0].double().square()


def _shared(group: Sequence[Streaming]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, z, probes, probed) of `group`, each with a first dimension of b layers: a view where they are neighbours."""
    first = group[0]
    for sketches in {id(s._sketches): s._sketches for s in group}.values():
        sketches.wait()
    if all(s._sketches is first._sketches and s._index == first._index + i for i, s in enumerate(group)):
        return first._sketches[first._index : first._index + len(group)]
    parts = [s._sketches[s._index : s._index + 1] for s in group]
    q, z, probes, probed = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q, z, probes, probed


def _event(device: torch.device) -> Any:
    """An event on the caller's stream of a CUDA device, None on other devices."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
