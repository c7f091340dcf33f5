"""Every op, declared once: schema, shape rule, checks and the public wrapper.

`loraga/backends/` registers implementations per device; PyTorch's dispatcher chooses. `backends/default.py` is plain
torch and answers on any device nobody else claimed. Checks written inside a fake function do not run on real calls, so
each op has one `_check_*` that its wrapper calls and its fake calls too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_lib = torch.library.Library("loraga", "DEF")
F = TypeVar("F", bound=Callable[..., Any])
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _fail(op: str, what: str) -> ValueError:
    return ValueError(f"loraga::{op}: {what}")


# ------------------------------------------------------------------------------------------------------------------
# test_matrix_: independent uniform numbers in [-1, 1) from a counter-based stream
# ------------------------------------------------------------------------------------------------------------------
_lib.define("test_matrix_(Tensor(a!) out, int seed) -> ()")


def _check_test_matrix(out: Tensor, seed: int) -> None:
    if out.dtype != torch.float32 or out.dim() != 2 or not out.is_contiguous():
        raise _fail("test_matrix_", f"out must be a contiguous float32 matrix, not {out.dtype} {tuple(out.shape)}")
    if out.numel() > 2**32:
        raise _fail("test_matrix_", f"at most 2**32 numbers come from one stream, not {out.numel()}")


@torch.library.register_fake("loraga::test_matrix_", lib=_lib)
def _(out: Tensor, seed: int) -> None:
    _check_test_matrix(out, seed)


def test_matrix_(out: Tensor, seed: int) -> Tensor:
    """Fill `out` (rows, cols) float32 with independent uniform numbers in [-1, 1).

    Entry i (row-major) is word i mod 4 of Philox4x32-10 (Salmon et al., 2011) at counter i div 4 under key `seed` (64
    bits): the numbers depend on position only, are the same on every device, and leave the global generators alone.
    """
    _check_test_matrix(out, seed)
    torch.ops.loraga.test_matrix_(out, seed)
    return out


test_matrix_.__test__ = False  # type: ignore[attr-defined]  # pytest would take the name for a test


# ------------------------------------------------------------------------------------------------------------------
# left_product, right_product: the two thin products of a gradient that is never formed
# ------------------------------------------------------------------------------------------------------------------
_lib.define("left_product(Tensor x, Tensor dy, Tensor v) -> Tensor")
_lib.define("right_product(Tensor x, Tensor dy, Tensor q) -> Tensor")


def _check_pair(op: str, x: Tensor, dy: Tensor) -> None:
    if x.dim() != 2 or dy.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise _fail(op, f"x (T, n) and dy (T, m) must share T, got {tuple(x.shape)} and {tuple(dy.shape)}")
    if x.dtype != dy.dtype or x.dtype not in _FLOATS:
        raise _fail(op, f"x and dy must share one of float32, bfloat16, float16, got {x.dtype} and {dy.dtype}")


def _check_left(x: Tensor, dy: Tensor, v: Tensor) -> None:
    _check_pair("left_product", x, dy)
    if v.dtype != torch.float32 or v.dim() != 2 or v.shape[0] != x.shape[1]:
        raise _fail("left_product", f"v must be float32 ({x.shape[1]}, k), got {v.dtype} {tuple(v.shape)}")


def _check_right(x: Tensor, dy: Tensor, q: Tensor) -> None:
    _check_pair("right_product", x, dy)
    if q.dtype != torch.float32 or q.dim() != 2 or q.shape[0] != dy.shape[1]:
        raise _fail("right_product", f"q must be float32 ({dy.shape[1]}, k), got {q.dtype} {tuple(q.shape)}")


@torch.library.register_fake("loraga::left_product", lib=_lib)
def _(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    _check_left(x, dy, v)
    return v.new_empty(v.shape[1], dy.shape[1]).t()  # (PᵀdY)ᵀ is faster than dYᵀP


@torch.library.register_fake("loraga::right_product", lib=_lib)
def _(x: Tensor, dy: Tensor, q: Tensor) -> Tensor:
    _check_right(x, dy, q)
    return q.new_empty(q.shape[1], x.shape[1])


def left_product(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    """G V = dYᵀ (X V), float32 (m, k), for x (T, n), dy (T, m) of one dtype and v (n, k) float32.

    Operands go into each product in the dtype of x (v and X V are rounded to it); sums are float32.
    """
    _check_left(x, dy, v)
    return torch.ops.loraga.left_product(x, dy, v)


def right_product(x: Tensor, dy: Tensor, q: Tensor) -> Tensor:
    """Qᵀ G = (dY Q)ᵀ X, float32 (k, n), for x (T, n), dy (T, m) of one dtype and q (m, k) float32.

    Operands go into each product in the dtype of x (q and dY Q are rounded to it); sums are float32.
    """
    _check_right(x, dy, q)
    return torch.ops.loraga.right_product(x, dy, q)


# ------------------------------------------------------------------------------------------------------------------
# accumulate_: one micro-batch onto a dense buffer
# ------------------------------------------------------------------------------------------------------------------
_lib.define("accumulate_(Tensor(a!) g, Tensor x, Tensor dy, float scale) -> Tensor")


def _check_accumulate(g: Tensor, x: Tensor, dy: Tensor) -> None:
    _check_pair("accumulate_", x, dy)
    if g.dim() != 2 or g.shape != (dy.shape[1], x.shape[1]) or g.dtype not in (torch.float32, torch.bfloat16):
        raise _fail(
            "accumulate_",
            f"g must be a float32 or bfloat16 ({dy.shape[1]}, {x.shape[1]}), got {g.dtype} {tuple(g.shape)}",
        )


@torch.library.register_fake("loraga::accumulate_", lib=_lib)
def _(g: Tensor, x: Tensor, dy: Tensor, scale: float) -> Tensor:
    _check_accumulate(g, x, dy)
    return g.new_empty((), dtype=torch.bool)


def accumulate_(g: Tensor, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
    """G += scale · dYᵀ X in place, unless x or dy holds a NaN or Inf; returns a 0-dim bool tensor: was it added.

    g (m, n) float32 or bfloat16; x (T, n), dy (T, m) of one dtype. The product is summed in float32 and rounded to
    nearest once, when it is stored. Nothing waits for the device.
    """
    _check_accumulate(g, x, dy)
    return torch.ops.loraga.accumulate_(g, x, dy, scale)


# ------------------------------------------------------------------------------------------------------------------
# orthonormalize: an orthonormal basis of the range of a tall block
# ------------------------------------------------------------------------------------------------------------------
_lib.define("orthonormalize(Tensor y, bool refine) -> Tensor")


def _check_orthonormalize(y: Tensor) -> None:
    if y.dtype != torch.float32 or y.dim() < 2 or y.shape[-2] < y.shape[-1]:
        raise _fail("orthonormalize", f"y must be float32 (..., m, k) with m >= k, got {y.dtype} {tuple(y.shape)}")


@torch.library.register_fake("loraga::orthonormalize", lib=_lib)
def _(y: Tensor, refine: bool) -> Tensor:
    _check_orthonormalize(y)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def orthonormalize(y: Tensor, refine: bool = True) -> Tensor:
    """Orthonormal Q (..., m, k) float32 whose columns span the range of `y` (..., m, k), m >= k.

    Fixed control flow, no wait for the device, any finite input: zero, rank-deficient and badly scaled blocks give a
    Q of full rank too, completed by fixed dense directions. ‖QᵀQ − I‖ stays below 1e-6 up to condition 1e7; without
    `refine` the work halves and that holds up to condition 1e2 only, which serves a basis that is used once and made
    anew (up to 1e7 its condition stays near 1). A block with NaN or Inf gives numbers without meaning and no error.
    """
    _check_orthonormalize(y)
    return torch.ops.loraga.orthonormalize(y, refine)


# ------------------------------------------------------------------------------------------------------------------
# small_svd: the full SVD of small square cores
# ------------------------------------------------------------------------------------------------------------------
_lib.define("small_svd(Tensor core) -> (Tensor, Tensor, Tensor)")


def _check_small_svd(core: Tensor) -> None:
    if core.dtype != torch.float32 or core.dim() < 2 or core.shape[-1] != core.shape[-2]:
        raise _fail("small_svd", f"core must be float32 (..., k, k), got {core.dtype} {tuple(core.shape)}")


@torch.library.register_fake("loraga::small_svd", lib=_lib)
def _(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_small_svd(core)
    return torch.empty_like(core), core.new_empty(core.shape[:-1]), torch.empty_like(core)


def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., k, k), S (..., k) descending, Vh (..., k, k), all float32, of `core` (..., k, k) float32.

    A core with NaN or Inf gives NaN or zero factors and no error.
    """
    _check_small_svd(core)
    return torch.ops.loraga.small_svd(core)


# ------------------------------------------------------------------------------------------------------------------
# cholesky_inverse: what makes a tall block orthonormal, from its Gram matrix
# ------------------------------------------------------------------------------------------------------------------
_lib.define("cholesky_inverse(Tensor gram, float shift) -> Tensor")


def _check_cholesky_inverse(gram: Tensor, shift: float) -> None:
    if gram.dtype != torch.float64 or gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise _fail("cholesky_inverse", f"gram must be float64 (..., k, k), got {gram.dtype} {tuple(gram.shape)}")
    if not 0 <= shift < float("inf"):
        raise _fail("cholesky_inverse", f"shift must be finite and not negative, got {shift}")


@torch.library.register_fake("loraga::cholesky_inverse", lib=_lib)
def _(gram: Tensor, shift: float) -> Tensor:
    _check_cholesky_inverse(gram, shift)
    return torch.empty_like(gram, memory_format=torch.contiguous_format)


def cholesky_inverse(gram: Tensor, shift: float = 0.0) -> Tensor:
    """L⁻¹, lower triangular, with L Lᵀ = gram + shift · trace(gram) · I, for gram (..., k, k) float64.

    Only the lower triangle is read. Where that sum is not positive definite or not finite, the result is NaN and there
    is no error; nothing waits for the device.
    """
    _check_cholesky_inverse(gram, shift)
    return torch.ops.loraga.cholesky_inverse(gram, shift)


# ------------------------------------------------------------------------------------------------------------------
# gradient_add_: one gradient that autograd formed onto a dense buffer
# ------------------------------------------------------------------------------------------------------------------
_lib.define("gradient_add_(Tensor(a!) total, Tensor gradient, float scale, Tensor? finite) -> Tensor")


def _check_gradient_add(total: Tensor, gradient: Tensor, finite: Tensor | None) -> None:
    if total.dtype not in (torch.float32, torch.bfloat16) or not total.is_contiguous():
        raise _fail("gradient_add_", f"total must be contiguous and float32 or bfloat16, got {total.dtype}")
    if gradient.dtype not in _FLOATS or gradient.numel() != total.numel():
        raise _fail(
            "gradient_add_",
            f"gradient must be float32, bfloat16 or float16 with the {total.numel()} entries of total, got "
            f"{gradient.dtype} {tuple(gradient.shape)}",
        )
    if finite is not None and (finite.dtype != torch.bool or finite.dim() != 0):
        raise _fail("gradient_add_", f"finite must be a 0-dim bool, got {finite.dtype} {tuple(finite.shape)}")


@torch.library.register_fake("loraga::gradient_add_", lib=_lib)
def _(total: Tensor, gradient: Tensor, scale: float, finite: Tensor | None) -> Tensor:
    _check_gradient_add(total, gradient, finite)
    return total.new_empty((), dtype=torch.bool)


def gradient_add_(total: Tensor, gradient: Tensor, scale: float = 1.0, finite: Tensor | None = None) -> Tensor:
    """total += scale · gradient in place, unless the gradient holds a NaN or Inf; returns a 0-dim bool: was it added.

    Entries are matched in row-major order of their indices, whatever the layout of the gradient in memory. The sum is
    taken in float32 and rounded to nearest once, when it is stored. `finite`, a 0-dim bool, decides instead where it is
    given: for a part of a gradient of which the whole has been looked at. Nothing waits for the device.
    """
    _check_gradient_add(total, gradient, finite)
    return torch.ops.loraga.gradient_add_(total, gradient, scale, finite)


def implement(op: str, key: str) -> Callable[[F], F]:
    """Register the decorated function as the implementation of `op` for the dispatch key `key`."""

    def register(function: F) -> F:
        _lib.impl(op, function, key)
        return function

    return register
