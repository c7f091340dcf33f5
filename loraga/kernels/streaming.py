"""The two products of a streaming update, each as one `project` and one `fold` (see thin.py).

    left_product:   scale · dYᵀ (X V) + Q (Z V)        X is read once, dY is read once
    right_product:  scale · (dY Q)ᵀ X + C Z            dY is read once, X is read once

Launches of a whole update of one layer (`estimators/streaming.py`), not the first: orthonormal basis of Zᵀ 4, Z V 1, V
beside the probes 1, in the dtype of X 1, left product 2, orthonormal basis of Y 4, Q'ᵀQ 1, Q' in the dtype of X 1,
right product 2, commit 2: 19, and one more for each product whose sum is cut into parts. Layers are not batched here:
to wait for a sibling would mean to keep activations and gradients that backward is about to free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraga.kernels.thin import fold, project
from loraga.ops import reference

left_product_reference = reference.left_product
right_product_reference = reference.right_product


def _operand(thin: Tensor, dtype: torch.dtype) -> Tensor:
    """`thin` (rows, k) as (1, rows, k') of `dtype`, with zero columns up to a multiple of 16: wide loads need it."""
    k = thin.shape[1]
    if k % 16 == 0:
        return thin.to(dtype).contiguous()[None]
    padded = thin.new_zeros(1, thin.shape[0], -(-k // 16) * 16, dtype=dtype)
    padded[0, :, :k] = thin
    return padded


def left_product(
    x: Tensor, dy: Tensor, v: Tensor, scale: float, rounded: bool, q: Tensor | None, zv: Tensor | None
) -> Tensor:
    """See `loraga.ops.declared.left_product`; float32 operands are never rounded."""
    p = project(x[None], _operand(v, x.dtype), out_dtype=x.dtype)
    onto = None if q is None or zv is None else (q, zv)
    return fold(dy[None], p, scale=scale, onto=onto, transposed=True)[0, : v.shape[1]].t()


def right_product(
    x: Tensor, dy: Tensor, q: Tensor, scale: float, rounded: bool, c: Tensor | None, z: Tensor | None
) -> Tensor:
    """See `loraga.ops.declared.right_product`; float32 operands are never rounded."""
    r = project(dy[None], _operand(q, dy.dtype), out_dtype=dy.dtype)
    onto = None if c is None or z is None else (z.t(), c.t())
    return fold(x[None], r, scale=scale, onto=onto, transposed=True)[0, : q.shape[1]]
