"""The thin products G V and Qᵀ G of gradients G = dYᵀ X that are never formed, for a batch of layers of one shape.

X and dY of each layer are multiplied where they are, and everything around these products is done for the whole batch
at once: on a GPU an update is bound by the number of launches before it is bound by work. cuBLAS does the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraga.ops.reference import has_bfloat16_units, multiplies_half

# Number of tokens (rows of x or dy) per step of a sum over tokens on a CPU. So few rows stay in cache also when wide.
_TOKENS = 512


def left_products(xs: Sequence[Tensor], dys: Sequence[Tensor], v: Tensor, scale: float = 1.0) -> Tensor:
    """scale · dYᵢᵀ (Xᵢ Vᵢ), float32 (b, m, k), stored column by column.

    The search for directions tolerates rounded operands (docs/numerics.md): V and X V are rounded to the dtype of x,
    and where the device multiplies bfloat16 faster than float32, all operands are rounded to bfloat16. Sums are
    float32, and on CPUs with such units the result is rounded as well.

    Args:
        xs, dys (sequences of b `torch.Tensor`): (Tᵢ, n) and (Tᵢ, m), all of one dtype and on one device.
        v (`torch.Tensor`): (b, n, k) float32.
        scale (`float`): a factor.
    """
    return _rounded(xs, v, dys, scale).mT


def right_products(
    xs: Sequence[Tensor], dys: Sequence[Tensor], q: Tensor, scale: float = 1.0, *, rounded: bool = False
) -> Tensor:
    """scale · (dYᵢ Qᵢ)ᵀ Xᵢ, float32 (b, k, n).

    With `rounded` operands are rounded as in `left_products`. Without it, neither Q nor dY Q loses digits that matter:
    with x and dy in half precision both enter as the sum of two numbers of that dtype.

    Args:
        xs, dys (sequences of b `torch.Tensor`): (Tᵢ, n) and (Tᵢ, m), all of one dtype and on one device.
        q (`torch.Tensor`): (b, m, k) float32.
        scale (`float`): a factor.
        rounded (`bool`): for a product that only searches for directions.
    """
    if rounded:
        return _rounded(dys, q, xs, scale)
    if xs[0].dtype == torch.float32 or not multiplies_half(q):
        return _in_float32(dys, q, xs, scale)
    return _split(dys, q, xs, scale)


def _rounded(outer: Sequence[Tensor], w: Tensor, inner: Sequence[Tensor], scale: float) -> Tensor:
    """scale · (aᵢ wᵢ)ᵀ bᵢ for a of `outer` and b of `inner`, with w and a w rounded: (b, k, j) float32."""
    dtype = outer[0].dtype
    if has_bfloat16_units(w.device) and (dtype == torch.float32 or w.is_cpu):
        dtype = torch.bfloat16
    if dtype == torch.float32:
        return _in_float32(outer, w, inner, scale)
    out, thin = _empty(w, inner), w.to(dtype)
    for i, (a, b) in enumerate(zip(outer, inner, strict=True)):
        a, b = a.to(dtype), b.to(dtype)
        if multiplies_half(w):
            torch.mm((a @ thin[i]).t(), b, out_dtype=torch.float32, out=out[i])
        elif dtype == torch.bfloat16 and has_bfloat16_units(w.device):
            out[i] = (a @ thin[i]).t() @ b
        else:
            _add_by_tokens(out[i].zero_(), a, thin[i].float(), b, dtype)
    return _scaled(out, scale)


def _in_float32(outer: Sequence[Tensor], w: Tensor, inner: Sequence[Tensor], scale: float) -> Tensor:
    """scale · (aᵢ wᵢ)ᵀ bᵢ without any rounding of operands: (b, k, j) float32."""
    out = _empty(w, inner)
    for i, (a, b) in enumerate(zip(outer, inner, strict=True)):
        if a.dtype == torch.float32:
            torch.mm((a @ w[i]).t(), b, out=out[i])
        else:
            _add_by_tokens(out[i].zero_(), a, w[i], b, torch.float32)
    return _scaled(out, scale)


def _add_by_tokens(out: Tensor, a: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """out += (a w)ᵀ b for half-precision a and b on a device that cannot multiply them; a w is rounded to `dtype`."""
    for start in range(0, len(a), _TOKENS):
        rows = slice(start, start + _TOKENS)
        out.addmm_((a[rows].float() @ w).to(dtype).float().t(), b[rows].float())


def _split(outer: Sequence[Tensor], w: Tensor, inner: Sequence[Tensor], scale: float) -> Tensor:
    """scale · (aᵢ wᵢ)ᵀ bᵢ in half precision, with w and a w as high and low part: (b, k, j) float32.

    Both parts are columns of one product, so a and b are read once. It costs twice the flops of a rounded product.
    Rounded once, w and a w would cost a bfloat16 model up to 4.5 % of the objective (docs/numerics.md).
    """
    k = w.shape[2]
    thin = _high_and_low(w, outer[0].dtype)
    rows = [len(a) for a in outer]
    products = w.new_empty(sum(rows), 2 * k)
    for i, (a, product) in enumerate(zip(outer, products.split(rows), strict=True)):
        torch.mm(a, thin[i], out_dtype=torch.float32, out=product)
    parts = _high_and_low(products[:, :k] + products[:, k:], outer[0].dtype)
    del thin, products
    out = w.new_empty(len(inner), 2 * k, inner[0].shape[1])
    for i, (part, b) in enumerate(zip(parts.split(rows), inner, strict=True)):
        torch.mm(part.t(), b, out_dtype=torch.float32, out=out[i])
    return _scaled(out[:, :k] + out[:, k:], scale)


def _high_and_low(w: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 2 k) of `dtype`: w (..., k) float32 rounded, and beside it what rounding left."""
    high = w.to(dtype)
    return torch.cat((high, (w - high).to(dtype)), dim=-1)


def _empty(w: Tensor, inner: Sequence[Tensor]) -> Tensor:
    return w.new_empty(len(inner), w.shape[2], inner[0].shape[1])


def _scaled(products: Tensor, scale: float) -> Tensor:
    return products if scale == 1.0 else products.mul_(scale)
