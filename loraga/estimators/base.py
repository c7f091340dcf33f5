"""What every estimator takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Sums the gradients of one layer. `update` never waits for the device; `finish` may."""

    @property
    def spec(self) -> LayerSpec:
        """The layer."""

    @property
    def state_bytes(self) -> int:
        """Bytes held between updates."""

    def update(self, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
        """Add scale · dyᵀ x for x (T, n), dy (T, m); returns a 0-dim bool tensor, False where NaN or Inf was met."""

    @property
    def exchange_bytes(self) -> int:
        """Size of the largest tensor that `merging` yields for one layer."""

    @classmethod
    def merging(cls, group: Sequence[Any], scale: float) -> Iterator[Tensor]:
        """Yield tensors, each to be summed over ranks in place before the next is asked for.

        At the end each of the `group` stands for the sum over ranks of what it stood for, times that rank's `scale`.
        """

    def finish(self, divisor: float) -> Estimate:
        """The result for the sum divided by `divisor`; the state is freed."""
