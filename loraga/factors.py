"""`Factors`: the truncated SVD of a layer's gradient, which the estimators make and the starts read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Factors:
    """The q leading singular triplets of a gradient G (m, n) = (out_features, in_features), G ≈ U diag(S) Vh.

    ```py
    U, S, Vh = torch.linalg.svd(torch.randn(16, 8), full_matrices=False)
    factors = loraga.Factors(U, S, Vh).truncated(2)
    gradient = factors.U * factors.S @ factors.Vh  # (16, 8), the best approximation of rank 2
    ```

    Inside loraga the tensors of several layers of one shape may be stacked, with the layers as the first dimension.
    Users get the factors of one layer.

    Attributes:
        U (`torch.Tensor`): (m, q) float32, orthonormal columns. In those that loraga computes, the entry of largest
            absolute value of each column is positive.
        S (`torch.Tensor`): (q,) float32, descending, non-negative, in the unit of G.
        Vh (`torch.Tensor`): (q, n) float32, orthonormal rows.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def rank(self) -> int:
        """The number of triplets q."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the gradient."""
        return self.U.shape[0], self.Vh.shape[1]

    def truncated(self, rank: int) -> Factors:
        """The first `rank` triplets, as views; all of them if there are no more."""
        return Factors(self.U[:, :rank], self.S[:rank], self.Vh[:rank])

    def to(self, *args: Any, **kwargs: Any) -> Factors:
        """Factors whose three tensors are moved or cast as `torch.Tensor.to` does."""
        return Factors(self.U.to(*args, **kwargs), self.S.to(*args, **kwargs), self.Vh.to(*args, **kwargs))
