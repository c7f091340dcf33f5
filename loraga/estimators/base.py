"""What every estimator takes and gives."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraga.factors import Factors


@dataclass(frozen=True)
class LayerSpec:
    """One target layer: its name, gradient shape (m, n), triplets wanted and the device its state lives on."""

    name: str
    m: int
    n: int
    rank: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Estimate:
    """What is known of a layer's mean gradient when the stream has ended.

    Attributes:
        factors (`Factors`): the leading triplets of the mean over micro-batches.
        energy (`float`): estimate of the squared Frobenius norm of that mean, never below that of the factors.
    """

    factors: Factors
    energy: float


class Estimator(Protocol):
    """Sums the gradients of one layer, without waiting for the device."""

    @property
    def spec(self) -> LayerSpec:
        """The layer."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors held between updates."""

    @property
    def state_bytes(self) -> int:
        """Bytes held between updates."""

    @property
    def exchange_bytes(self) -> int:
        """Size of the largest tensor that `merging` yields for one layer."""

    @property
    def merged_bytes(self) -> int:
        """Bytes that a rank puts into all-reduces to merge its sums with those of the others (docs/architecture.md)."""

    @property
    def kind(self) -> Hashable:
        """Equal for estimators that can be finished together."""

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        """Add scale · dyᵀ x for x (T, n), dy (T, m); returns a 0-dim bool tensor, False where NaN or Inf was met."""

    @staticmethod
    def merging(group: Sequence[Any], scale: float) -> Iterator[Tensor]:
        """Yield tensors, each to be summed over ranks in place before the next is asked for.

        `group` is estimators of one class, (m, n) and rank. At the end each stands for the sum over ranks of what it
        stood for, times that rank's `scale`, and takes no more updates.
        """

    @staticmethod
    def finish(group: Sequence[Any]) -> tuple[Factors, Tensor]:
        """Factors and energies (b,) float64 of the sums of `group`, b estimators of one kind, whose state is freed.

        The factors have a leading dimension b.
        """


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` of one shape along a new first dimension; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
