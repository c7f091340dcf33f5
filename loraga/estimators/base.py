"""The interface that all estimators implement, and its data types."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraga.factors import Factors


@dataclass(frozen=True)
class LayerSpec:
    """One target layer.

    Attributes:
        name (`str`): the layer's name.
        m, n (`int`): shape (out_features, in_features) of its gradient.
        rank (`int`): number of singular triplets to estimate.
        seed (`int`): key of its random matrices.
        device (`torch.device`): device of the estimator's state.
    """

    name: str
    m: int
    n: int
    rank: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Estimate:
    """The result for one layer, at the end of the stream.

    Attributes:
        factors (`Factors`): the leading triplets of the mean over micro-batches.
        energy (`float`): estimate of the squared Frobenius norm of that mean. To rounding, it is at least that of the
            factors.
    """

    factors: Factors
    energy: float


class Estimator(Protocol):
    """Sums the gradients of one layer. No method makes the host wait for the device."""

    @property
    def spec(self) -> LayerSpec:
        """The layer."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that are stored between updates."""

    @property
    def state_bytes(self) -> int:
        """Size of `state` in bytes."""

    @property
    def exchange_bytes(self) -> int:
        """Size in bytes of the largest tensor that `merging` yields for one layer."""

    @property
    def merged_bytes(self) -> int:
        """Bytes that a rank sends in all-reduces to merge its sums with the others' (docs/architecture.md)."""

    @property
    def finish_key(self) -> Hashable:
        """Equal for estimators that can be finished together."""

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        """Add scale · dyᵀ x for x (T, n), dy (T, m), unless x or dy contains a NaN or Inf.

        Returns a 0-dim bool tensor on the device, which is True if it was added.
        """

    @staticmethod
    def merging(group: Sequence[Any], scale: float) -> Iterator[Tensor]:
        """Yield tensors; the caller sums each over ranks in place before it asks for the next.

        The estimators of `group` have one class, (m, n) and rank. At the end the sum of each is the sum over ranks of
        that rank's sum times that rank's `scale`. After that they take no more updates.
        """

    @staticmethod
    def finish(group: Sequence[Any]) -> tuple[Factors, Tensor]:
        """Factors and energies of the sums of `group`, b estimators with one `finish_key`. Their state is freed.

        The factors have a leading dimension b; the energies are (b,) float64.
        """


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack `tensors` of one shape along a new first dimension; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
