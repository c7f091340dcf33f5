"""Every op, declared once: schema, shape rule, checks and the public wrapper.

The files beside this one register implementations per device; PyTorch's dispatcher chooses. `reference.py` is plain
torch and answers on any device nobody else claimed. Checks written inside a fake function do not run on real calls, so
each op has one `_check_*` that its wrapper calls and its fake calls too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# left_product, right_product: the two thin products of a gradient that is never formed, added to those of a sum
# ------------------------------------------------------------------------------------------------------------------
_lib.define("left_product(Tensor x, Tensor dy, Tensor v, float scale, bool rounded, Tensor? q, Tensor? zv) -> Tensor")
_lib.define("right_product(Tensor x, Tensor dy, Tensor q, float scale, bool rounded, Tensor? c, Tensor? z) -> Tensor")


def _check_pair(op: str, x: Tensor, dy: Tensor) -> None:
    if x.dim() != 2 or dy.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise _fail(op, f"x (T, n) and dy (T, m) must share T, got {tuple(x.shape)} and {tuple(dy.shape)}")
    if x.dtype != dy.dtype or x.dtype not in _FLOATS:
        raise _fail(op, f"x and dy must share one of float32, bfloat16, float16, got {x.dtype} and {dy.dtype}")


def _check_onto(op: str, names: str, a: Tensor | None, b: Tensor | None, rows: range, columns: range) -> None:
    if a is None and b is None:
        return
    if a is None or b is None:
        raise _fail(op, f"{names} come together or not at all")
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise _fail(op, f"{names} must be float32 matrices that multiply, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.shape[0] not in rows or b.shape[1] not in columns:
        raise _fail(op, f"the product of {names}, {(a.shape[0], b.shape[1])}, does not fit onto the result")


def _check_left(x: Tensor, dy: Tensor, v: Tensor, q: Tensor | None, zv: Tensor | None) -> None:
    _check_pair("left_product", x, dy)
    if v.dtype != torch.float32 or v.dim() != 2 or v.shape[0] != x.shape[1]:
        raise _fail("left_product", f"v must be float32 ({x.shape[1]}, k), got {v.dtype} {tuple(v.shape)}")
    m, k = dy.shape[1], v.shape[1]
    _check_onto("left_product", "q and zv", q, zv, range(m, m + 1), range(k + 1))


def _check_right(x: Tensor, dy: Tensor, q: Tensor, c: Tensor | None, z: Tensor | None) -> None:
    _check_pair("right_product", x, dy)
    if q.dtype != torch.float32 or q.dim() != 2 or q.shape[0] != dy.shape[1]:
        raise _fail("right_product", f"q must be float32 ({dy.shape[1]}, k), got {q.dtype} {tuple(q.shape)}")
    n, k = x.shape[1], q.shape[1]
    _check_onto("right_product", "c and z", c, z, range(k, k + 1), range(n, n + 1))


@torch.library.register_fake("loraga::left_product", lib=_lib)
def _(x: Tensor, dy: Tensor, v: Tensor, scale: float, rounded: bool, q: Tensor | None, zv: Tensor | None) -> Tensor:
    _check_left(x, dy, v, q, zv)
    return v.new_empty(v.shape[1], dy.shape[1]).t()  # (PᵀdY)ᵀ is faster than dYᵀP


@torch.library.register_fake("loraga::right_product", lib=_lib)
def _(x: Tensor, dy: Tensor, q: Tensor, scale: float, rounded: bool, c: Tensor | None, z: Tensor | None) -> Tensor:
    _check_right(x, dy, q, c, z)
    return q.new_empty(q.shape[1], x.shape[1])


def left_product(
    x: Tensor,
    dy: Tensor,
    v: Tensor,
    scale: float = 1.0,
    *,
    rounded: bool = False,
    onto: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """scale · G V + Q (Z V), float32 (m, k), for G = dYᵀ X of x (T, n), dy (T, m) of one dtype and v (n, k) float32.

    `onto` is (Q (m, i), Z V (i, k')) float32; k' may be less than k, and the columns beyond get nothing from it.
    Operands go into the products with x and dy in the dtype of x (v and X V are rounded to it); sums are float32.
    With `rounded`, operands and the product (not what it is added to) may be rounded to as few as 8 bits, where the
    device multiplies those faster: for the search for directions, which takes no harm from it (docs/numerics.md).
    """
    q, zv = onto or (None, None)
    _check_left(x, dy, v, q, zv)
    return torch.ops.loraga.left_product(x, dy, v, scale, rounded, q, zv)


def right_product(
    x: Tensor,
    dy: Tensor,
    q: Tensor,
    scale: float = 1.0,
    *,
    rounded: bool = False,
    onto: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """scale · Qᵀ G + C Z, float32 (k, n), for G = dYᵀ X of x (T, n), dy (T, m) of one dtype and q (m, k) float32.

    `onto` is (C (k, i), Z (i, n)) float32. Operands go into the products with x and dy in the dtype of x (q and dY Q
    are rounded to it); sums are float32. `rounded` as in `left_product`.
    """
    c, z = onto or (None, None)
    _check_right(x, dy, q, c, z)
    return torch.ops.loraga.right_product(x, dy, q, scale, rounded, c, z)


# ------------------------------------------------------------------------------------------------------------------
# commit_: the new state of a streaming update replaces the old one, unless it is poisoned
# ------------------------------------------------------------------------------------------------------------------
_lib.define("commit_(Tensor(a!) q, Tensor(b!) z, Tensor(c!) probed, Tensor new_q, Tensor new_z, Tensor left) -> Tensor")


def _check_commit(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> None:
    tensors = (q, z, probed, new_q, new_z, left)
    if any(t.dtype != torch.float32 or t.dim() != 2 for t in tensors):
        raise _fail("commit_", "every argument must be a float32 matrix")
    if not all(t.is_contiguous() for t in tensors[:5]):
        raise _fail("commit_", "q, z, probed, new_q and new_z must be contiguous")
    (m, k), probes = q.shape, probed.shape[1]
    expected = ((m, k), (k, z.shape[1]), (m, probes), (m, k), tuple(z.shape), (m, k + probes))
    if tuple(tuple(t.shape) for t in tensors) != expected:
        raise _fail("commit_", f"shapes {[tuple(t.shape) for t in tensors]} do not fit, expected {list(expected)}")


@torch.library.register_fake("loraga::commit_", lib=_lib)
def _(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    _check_commit(q, z, probed, new_q, new_z, left)
    return q.new_empty((), dtype=torch.bool)


def commit_(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    """q ← new_q, z ← new_z, probed ← probed + left[:, k:] in place, unless left or new_z holds a NaN or Inf.

    q, new_q (m, k), z, new_z (k, n), probed (m, p), left (m, k + p), all float32. Returns a 0-dim bool tensor: was it
    done. Nothing waits for the device.
    """
    _check_commit(q, z, probed, new_q, new_z, left)
    return torch.ops.loraga.commit_(q, z, probed, new_q, new_z, left)


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
# subspace: the leading column spaces of a batch of matrices, and their coordinates in it
# ------------------------------------------------------------------------------------------------------------------
_lib.define("subspace(Tensor g, int k, int iterations, int[] seeds) -> (Tensor q, Tensor z)")


def _check_subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> None:
    if g.dtype not in _FLOATS or g.dim() != 3:
        raise _fail("subspace", f"g must be float32, bfloat16 or float16 (b, m, n), got {g.dtype} {tuple(g.shape)}")
    if not 1 <= k <= min(g.shape[1:]):
        raise _fail("subspace", f"k={k} must be between 1 and min(m, n) = {min(g.shape[1:])}")
    if iterations < 0 or len(seeds) != g.shape[0]:
        raise _fail("subspace", f"needs iterations >= 0 and {g.shape[0]} seeds, got {iterations} and {len(seeds)}")


@torch.library.register_fake("loraga::subspace", lib=_lib)
def _(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    _check_subspace(g, k, iterations, seeds)
    b, m, n = g.shape
    return g.new_empty(b, m, k, dtype=torch.float32), g.new_empty(b, k, n, dtype=torch.float32)


def subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Q (b, m, k) orthonormal and Z = Qᵀ G (b, k, n), both float32, with Q Z ≈ G for each matrix of `g` (b, m, n).

    Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4): Q starts as orth(G Ω), Ω (n, k) from
    `test_matrix_` under the matrix's own seed, and each of `iterations` makes it orth(G orth(Gᵀ Q)). `g` is float32,
    bfloat16 or float16 of any strides, with largest entries from 1e-35 to 1e35 (zero, too) and a spectral norm below
    1e38, and no copy of the whole of it is made. The thin operand goes into each product rounded to the dtype of `g`,
    into the last one (Z) as the sum of two such; sums are float32. A matrix with NaN or Inf gives numbers without
    meaning and no error, and leaves the others of the batch alone.
    """
    _check_subspace(g, k, iterations, seeds)
    return torch.ops.loraga.subspace(g, k, iterations, seeds)


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
