"""The truncated SVD of a layer's gradient, as every room passes it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Factors:
    """Leading singular triplets of a gradient G (m, n) = (out_features, in_features).

    Inside loraga factors of several layers of one shape may share leading dimensions; users get one layer's.

    Attributes:
        U (`torch.Tensor`): (m, q) float32, orthonormal columns. The largest entry (in absolute value) of
            each column is positive.
        S (`torch.Tensor`): (q,) float32, descending, non-negative.
        Vh (`torch.Tensor`): (q, n) float32, orthonormal rows.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of triplets q."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the gradient."""
        return self.U.shape[0], self.Vh.shape[1]

    def truncated(self, rank: int) -> Factors:
        """The first `rank` triplets."""
        return Factors(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def to(self, *args: Any, **kwargs: Any) -> Factors:
        """All three tensors moved or cast as `torch.Tensor.to` does."""
        return Factors(self.U.to(*args, **kwargs), self.S.to(*args, **kwargs), self.Vh.to(*args, **kwargs))
