"""Every op, declared once: schema, shape rule, checks and the public wrapper.

The other files of this folder register implementations per device, and PyTorch's dispatcher chooses between them.
`reference.py` is plain torch and runs on every device that has no implementation of its own. A check inside a fake
function does not run on real calls. Therefore each op has one `_check_*`, which its wrapper and its fake function call.
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


def _fake(op: str) -> Callable[[F], F]:
    """Register the decorated function as the shape rule of `op`, which PyTorch runs on meta and fake tensors."""

    def register(function: F) -> F:
        torch.library.register_fake(f"loraga::{op}", function, lib=_lib)
        return function

    return register


def implement(op: str, key: str) -> Callable[[F], F]:
    """Register the decorated function as the implementation of `op` for the dispatch key `key`."""

    def register(function: F) -> F:
        _lib.impl(op, function, key)
        return function

    return register


# ------------------------------------------------------------------------------------------------------------------
# test_matrix_: independent uniform numbers in [-1, 1) from a counter-based stream
# ------------------------------------------------------------------------------------------------------------------
_lib.define("test_matrix_(Tensor(a!) out, int seed) -> ()")


def _check_test_matrix(out: Tensor, seed: int) -> None:
    if out.dtype != torch.float32 or out.dim() != 2 or not out.is_contiguous():
        raise _fail("test_matrix_", f"out must be a contiguous float32 matrix, not {out.dtype} {tuple(out.shape)}")
    if out.numel() > 2**32:
        raise _fail("test_matrix_", f"at most 2**32 numbers come from one stream, not {out.numel()}")


@_fake("test_matrix_")
def _(out: Tensor, seed: int) -> None:
    _check_test_matrix(out, seed)


def test_matrix_(out: Tensor, seed: int) -> Tensor:
    """Fill `out` (rows, cols) float32 with independent uniform numbers in [-1, 1).

    Entry i (row-major) is word i mod 4 of Philox4x32-10 (Salmon et al., 2011) at counter i div 4 under key `seed` (64
    bits). A number depends on the seed and its position only and is the same on every device. The global generators of
    torch are not used.

    Raises:
        ValueError: `out` is not a contiguous float32 matrix, or has more than 2**32 numbers.
    """
    _check_test_matrix(out, seed)
    torch.ops.loraga.test_matrix_(out, seed)
    return out


test_matrix_.__test__ = False  # type: ignore[attr-defined]  # pytest would take the name for a test


# ------------------------------------------------------------------------------------------------------------------
# commit_: the new states of streaming updates replace the old ones where they are finite
# ------------------------------------------------------------------------------------------------------------------
_lib.define("commit_(Tensor(a!) q, Tensor(b!) z, Tensor(c!) probed, Tensor new_q, Tensor new_z, Tensor left) -> Tensor")


def _check_commit(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> None:
    tensors = (q, z, probed, new_q, new_z, left)
    if any(t.dtype != torch.float32 or t.dim() != 3 for t in tensors):
        raise _fail("commit_", "every argument must be a float32 batch of matrices")
    if not all(t.is_contiguous() for t in tensors[:5]):
        raise _fail("commit_", "q, z, probed, new_q and new_z must be contiguous")
    (b, m, k), probes = q.shape, probed.shape[2]
    expected = ((b, m, k), (b, k, z.shape[2]), (b, m, probes), (b, m, k), tuple(z.shape), (b, m, k + probes))
    if tuple(tuple(t.shape) for t in tensors) != expected:
        raise _fail("commit_", f"shapes {[tuple(t.shape) for t in tensors]} do not fit, expected {list(expected)}")


@_fake("commit_")
def _(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    _check_commit(q, z, probed, new_q, new_z, left)
    return q.new_empty(q.shape[0], dtype=torch.bool)


def commit_(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    """q ← new_q, z ← new_z, probed ← probed + left[..., k:] in place, in each layer without NaN or Inf.

    All are float32, with a first dimension of b layers: q, new_q (b, m, k), z, new_z (b, k, n), probed (b, m, p), left
    (b, m, k + p) with any strides, the others contiguous. A layer keeps its old state if its part of `left` or `new_z`
    contains a NaN or Inf. Returns (b,) bool, True where the state was replaced. The host does not wait for the device.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check_commit(q, z, probed, new_q, new_z, left)
    finite: Tensor = torch.ops.loraga.commit_(q, z, probed, new_q, new_z, left)
    return finite


# ------------------------------------------------------------------------------------------------------------------
# accumulate_: the gradient of one micro-batch is added to a dense buffer
# ------------------------------------------------------------------------------------------------------------------
_lib.define("accumulate_(Tensor(a!) g, Tensor x, Tensor dy, float scale) -> Tensor")


def _check_accumulate(g: Tensor, x: Tensor, dy: Tensor) -> None:
    if x.dim() != 2 or dy.dim() != 2 or x.shape[0] != dy.shape[0]:
        raise _fail("accumulate_", f"x (T, n) and dy (T, m) must share T, got {tuple(x.shape)} and {tuple(dy.shape)}")
    if x.dtype != dy.dtype or x.dtype not in _FLOATS:
        raise _fail(
            "accumulate_", f"x and dy must share one of float32, bfloat16, float16, got {x.dtype} and {dy.dtype}"
        )
    if g.dim() != 2 or g.shape != (dy.shape[1], x.shape[1]) or g.dtype not in (torch.float32, torch.bfloat16):
        raise _fail(
            "accumulate_",
            f"g must be a float32 or bfloat16 ({dy.shape[1]}, {x.shape[1]}), got {g.dtype} {tuple(g.shape)}",
        )


@_fake("accumulate_")
def _(g: Tensor, x: Tensor, dy: Tensor, scale: float) -> Tensor:
    _check_accumulate(g, x, dy)
    return g.new_empty((), dtype=torch.bool)


def accumulate_(g: Tensor, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
    """G += scale · dYᵀ X in place, unless x or dy contains a NaN or Inf.

    g (m, n) float32 or bfloat16; x (T, n), dy (T, m) of one dtype. The product is summed in float32 and rounded to
    nearest once, when it is stored. Returns a 0-dim bool tensor, which is True if the product was added. The host does
    not wait for the device.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_accumulate(g, x, dy)
    added: Tensor = torch.ops.loraga.accumulate_(g, x, dy, scale)
    return added


# ------------------------------------------------------------------------------------------------------------------
# basis, orthonormalize: an orthonormal basis of the range of a tall block, for use in a loop and for a result
# ------------------------------------------------------------------------------------------------------------------
_lib.define("basis(Tensor y, int passes=2) -> Tensor")
_lib.define("orthonormalize(Tensor y) -> Tensor")


def _check_tall(op: str, y: Tensor) -> None:
    if y.dtype != torch.float32 or y.dim() < 2 or y.shape[-2] < y.shape[-1]:
        raise _fail(op, f"y must be float32 (..., m, k) with m >= k, got {y.dtype} {tuple(y.shape)}")


def _check_basis(y: Tensor, passes: int) -> None:
    _check_tall("basis", y)
    if passes not in (1, 2):
        raise _fail("basis", f"passes must be 1 or 2, got {passes}")


@_fake("basis")
def _(y: Tensor, passes: int = 2) -> Tensor:
    _check_basis(y, passes)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_fake("orthonormalize")
def _(y: Tensor) -> Tensor:
    _check_tall("orthonormalize", y)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def basis(y: Tensor, passes: int = 2) -> Tensor:
    """Q (..., m, k) float32 that spans the range of `y` (..., m, k), m >= k, as orthonormal as a loop needs it.

    It is CholeskyQR in float32, twice, with a shift each time (docs/numerics.md). Every finite input gives a finite Q
    of full rank, also a zero, rank-deficient, sparse or badly scaled block. The singular values of Q are at most
    1 + 1e-4. They are within 1 % of 1, except those of directions that have less than 1e-4 of the largest singular
    value of the block after its columns are scaled to unit norm; these become shorter. The control flow is fixed, and
    the host does not wait for the device. A block with NaN or Inf gives numbers without meaning and no error.

    With one pass the work halves, and directions below 1e-2 of the largest become shorter, down to about 1e-4. That is
    enough for a block that is only multiplied with, where the product gets a basis of its own.

    Raises:
        ValueError: `y` is not float32, or has more columns than rows, or `passes` is not 1 or 2.
    """
    _check_basis(y, passes)
    q: Tensor = torch.ops.loraga.basis(y, passes)
    return q


def orthonormalize(y: Tensor) -> Tensor:
    """Orthonormal Q (..., m, k) float32 whose columns span the range of `y` (..., m, k), m >= k.

    It is CholeskyQR in float64 (docs/numerics.md). The control flow is fixed and the host does not wait for the device.
    Every finite input is allowed: Q has full rank also for a zero, rank-deficient, sparse or badly scaled block,
    because fixed dense directions complete it. ‖QᵀQ − I‖ stays below 1e-6. A block with NaN or Inf gives numbers
    without meaning and no error.

    Raises:
        ValueError: `y` is not float32, or has more columns than rows.
    """
    _check_tall("orthonormalize", y)
    q: Tensor = torch.ops.loraga.orthonormalize(y)
    return q


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


@_fake("subspace")
def _(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    _check_subspace(g, k, iterations, seeds)
    b, m, n = g.shape
    return g.new_empty(b, m, k, dtype=torch.float32), g.new_empty(b, k, n, dtype=torch.float32)


def subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Q (b, m, k) orthonormal and Z = Qᵀ G (b, k, n), both float32, with Q Z ≈ G for each matrix of `g` (b, m, n).

    Randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4): Q starts as orth(G Ω), where
    `test_matrix_` makes Ω (n, k) from the matrix's own seed. Each of `iterations` replaces Q by orth(G orth(Gᵀ Q)).
    Inside the iteration orth is `basis`, at its end `orthonormalize`.

    `g` is float32, bfloat16 or float16 and has any strides. The largest entry of a matrix is zero or between 1e-35 and
    1e35, its spectral norm below 1e38. On devices that multiply the dtype of `g`, no full copy of `g` is made. The thin
    operand of each product is rounded to the dtype of `g`; for the last product (Z) it is the sum of two such numbers.
    Sums are float32. A matrix with NaN or Inf gives numbers without meaning and no error, and does not affect the
    other matrices of the batch.

    Raises:
        ValueError: `k`, `iterations`, the number of seeds, or shape or dtype of `g` do not fit.
    """
    _check_subspace(g, k, iterations, seeds)
    sketch: tuple[Tensor, Tensor] = torch.ops.loraga.subspace(g, k, iterations, seeds)
    return sketch


# ------------------------------------------------------------------------------------------------------------------
# small_svd: the full SVD of small square cores
# ------------------------------------------------------------------------------------------------------------------
_lib.define("small_svd(Tensor core) -> (Tensor, Tensor, Tensor)")


def _check_small_svd(core: Tensor) -> None:
    if core.dtype != torch.float32 or core.dim() < 2 or core.shape[-1] != core.shape[-2]:
        raise _fail("small_svd", f"core must be float32 (..., k, k), got {core.dtype} {tuple(core.shape)}")


@_fake("small_svd")
def _(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_small_svd(core)
    return torch.empty_like(core), core.new_empty(core.shape[:-1]), torch.empty_like(core)


def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., k, k), S (..., k) descending, Vh (..., k, k), all float32, of `core` (..., k, k) float32.

    A core with NaN or Inf gives NaN or zero factors and no error.

    Raises:
        ValueError: `core` is not float32 or not square.
    """
    _check_small_svd(core)
    factors: tuple[Tensor, Tensor, Tensor] = torch.ops.loraga.small_svd(core)
    return factors


# ------------------------------------------------------------------------------------------------------------------
# cholesky_inverse: the inverse Cholesky factor of a Gram matrix, which makes a tall block orthonormal
# ------------------------------------------------------------------------------------------------------------------
_lib.define("cholesky_inverse(Tensor gram, float shift) -> Tensor")


def _check_cholesky_inverse(gram: Tensor, shift: float) -> None:
    if gram.dtype not in (torch.float32, torch.float64) or gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise _fail(
            "cholesky_inverse", f"gram must be float32 or float64 (..., k, k), got {gram.dtype} {tuple(gram.shape)}"
        )
    if not 0 <= shift < float("inf"):
        raise _fail("cholesky_inverse", f"shift must be finite and not negative, got {shift}")


@_fake("cholesky_inverse")
def _(gram: Tensor, shift: float) -> Tensor:
    _check_cholesky_inverse(gram, shift)
    return torch.empty_like(gram, memory_format=torch.contiguous_format)


def cholesky_inverse(gram: Tensor, shift: float = 0.0) -> Tensor:
    """L⁻¹, lower triangular, with L Lᵀ = gram + shift · trace(gram) · I, for gram (..., k, k) float32 or float64.

    The arithmetic and the result have the dtype of `gram`. Only the lower triangle is read. `gram` is a Gram matrix, so
    no pivot of that sum is below shift · trace but for rounding. Where rounding has made one smaller, the native core
    takes the shift for the pivot and zero for the column of L below it; the reference adds 100 times the shift to the
    whole matrix. If a pivot is still not positive and finite, all entries of this inverse are NaN, and there is no
    error. The host does not wait for the device.

    Raises:
        ValueError: `gram` is not float32 or float64 or not square, or `shift` is negative or not finite.
    """
    _check_cholesky_inverse(gram, shift)
    inverse: Tensor = torch.ops.loraga.cholesky_inverse(gram, shift)
    return inverse


# ------------------------------------------------------------------------------------------------------------------
# gradient_add_: one gradient that autograd formed is added to a dense buffer
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


@_fake("gradient_add_")
def _(total: Tensor, gradient: Tensor, scale: float, finite: Tensor | None) -> Tensor:
    _check_gradient_add(total, gradient, finite)
    return total.new_empty((), dtype=torch.bool)


def gradient_add_(total: Tensor, gradient: Tensor, scale: float = 1.0, finite: Tensor | None = None) -> Tensor:
    """total += scale · gradient in place, unless the gradient contains a NaN or Inf.

    Entries are matched in row-major order of their indices, whatever the layout of the gradient in memory. The sum is
    taken in float32 and rounded to nearest once, when it is stored. Where `finite` (0-dim bool) is given, it decides
    instead of the entries; a caller that adds a gradient in parts has checked all parts before. Returns a 0-dim bool,
    which is True if the gradient was added. The host does not wait for the device.

    Raises:
        ValueError: sizes, dtypes or strides do not fit.
    """
    _check_gradient_add(total, gradient, finite)
    added: Tensor = torch.ops.loraga.gradient_add_(total, gradient, scale, finite)
    return added
