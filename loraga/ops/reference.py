"""Every op in plain torch, for any device: the reference that every other implementation is tested against."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraga.ops import declared
from loraga.ops.declared import implement

_KEY = "CompositeExplicitAutograd"

# Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011)
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# Size of the fixed direction that is added to every column before its Gram matrix is formed, relative to the column:
# large enough that a zero or dependent column becomes a usable direction, and far below what a sketch resolves.
JITTER = 1e-6
# A column with at most this norm counts as zero: the reciprocal of a smaller one would overflow float32.
SMALLEST_NORM = 1e-37
# Shift of each pass of `basis`, relative to the trace of the Gram matrix.
BASIS_SHIFT = 1e-7


def philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64) of Philox4x32-10 at each `counter` (int64) under the 64-bit key `seed`."""
    # fills and arithmetic make the constants on the device, so nothing is copied from the host
    multiplier, keys = counter.new_empty(2, 1), counter.new_empty(10, 2, 1)
    for i in range(2):
        multiplier[i].fill_(_PHILOX_M[i])
        torch.arange(10, device=counter.device, out=keys[:, i, 0])
        keys[:, i].mul_(_PHILOX_W[i]).add_((seed >> (32 * i)) & _MASK).bitwise_and_(_MASK)
    flat = counter.reshape(1, -1)
    even = torch.cat((flat & _MASK, torch.zeros_like(flat)))  # words 0 and 2, which are multiplied
    odd = torch.cat(((flat >> 32) & _MASK, torch.zeros_like(flat)))  # words 1 and 3
    for key in keys:
        # int64 products wrap; their upper and lower 32 bits are still those of the unsigned product
        product = even * multiplier
        even = (((product >> 32) & _MASK).flip(0) ^ odd) ^ key
        odd = (product & _MASK).flip(0)
    return tuple(word.view(counter.shape) for word in (even[0], odd[0], even[1], odd[1]))  # type: ignore[return-value]


@implement("test_matrix_", _KEY)
def test_matrix_(out: Tensor, seed: int) -> None:
    if out.is_meta:  # there are no numbers to write, and dry runs would spend half of their time here
        return
    count = out.numel()
    words = torch.stack(philox(torch.arange((count + 3) // 4, device=out.device), seed), dim=1).view(-1)[:count]
    # the upper 24 bits are exact in float32
    out.view(-1).copy_((words >> 8).float()).mul_(2.0**-23).sub_(1.0)


def multiplies_half(a: Tensor) -> bool:
    """Whether the device of `a` multiplies half-precision operands with float32 sums.

    GPUs do; the meta device counts as one, because dry runs predict what a GPU does.
    """
    return a.is_cuda or a.is_meta


@functools.cache
def has_bfloat16_units(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32: CPUs with AVX512-BF16 or AMX, GPUs from sm_80 on."""
    if device.type == "cpu":
        features = ("avx512_bf16", "amx_tile") if torch.backends.mkldnn.is_available() else ()
        return any(getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in features)
    # meta: dry runs predict what a GPU does
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


@implement("commit_", _KEY)
def commit_(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    finite = torch.maximum(_largest(left), _largest(new_z)) < torch.inf  # false for NaN, too
    keep = finite[:, None, None]
    # in place, so that there is never a second copy of the state
    torch.where(keep, new_q, q, out=q)
    torch.where(keep, new_z, z, out=z)
    probed += torch.where(keep, left[..., q.shape[2] :], 0.0)
    return finite


def _largest(batch: Tensor) -> Tensor:
    """The largest absolute value of each matrix of `batch` (b, m, k), NaN where one has a NaN: (b,)."""
    if batch.shape[0] == 1 and batch.is_cpu:  # one pass; the reduction below takes a temporary and five times as long
        low, high = torch.aminmax(batch.mT if batch.stride(-2) == 1 else batch)
        return torch.maximum(-low, high)[None]
    largest: Tensor = torch.linalg.vector_norm(batch, ord=torch.inf, dim=(-2, -1))
    return largest


def all_finite(values: Tensor) -> Tensor:
    """Whether no entry is NaN or Inf, as a 0-dim bool: one pass over `values`, no temporary of their size."""
    if values.numel() == 0:  # an expert that got no token
        return torch.ones((), dtype=torch.bool, device=values.device)
    # minimum and maximum do not depend on the order, and `aminmax` is ten times slower on a column-major matrix
    low, high = torch.aminmax(values.mT if values.dim() > 1 and values.stride(-2) == 1 else values)
    return torch.isfinite(low) & torch.isfinite(high)


@implement("accumulate_", _KEY)
def accumulate_(g: Tensor, x: Tensor, dy: Tensor, scale: float) -> Tensor:
    finite = all_finite(x) & all_finite(dy)
    if g.is_cpu:  # the host may look
        if finite:
            _add_product(g, x, dy, scale)
        return finite
    _add_product(g, torch.where(finite, x, 0.0), torch.where(finite, dy, 0.0), scale)
    return finite


# Entries of a product that exist beside the buffer.
_BLOCK = 2**22


def _add_product(g: Tensor, x: Tensor, dy: Tensor, scale: float) -> None:
    """g += scale · dyᵀ x, summed in float32 and rounded once.

    With one dtype it is one call that makes no temporary. Else it goes by blocks of rows.
    """
    if g.dtype == x.dtype:
        g.addmm_(dy.t(), x, alpha=scale)
        return
    half = x.dtype != torch.float32 and multiplies_half(x)
    x, step = x if half else x.float(), max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, len(g), step):
        rows = slice(start, start + step)
        left = dy[:, rows].t()
        product = torch.mm(left, x, out_dtype=torch.float32) if half else left.float() @ x
        g[rows] = product.mul_(scale).add_(g[rows])


def directions(m: int, k: int, device: torch.device, by_columns: bool = False) -> Tensor:
    """(m, k) float32, row-major or (`by_columns`) column-major: the columns of the DCT from the highest frequency down.

    They are orthonormal and dense, do not resemble a gradient, and need no state.
    Entry (i, j) is √(2/m) cos(2π (2i + 1) f / 4m), f = m - 1 - j. The angle is a 32-bit integer in units of 2⁻³² turns.
    When its product overflows, only full turns are lost, so the angle is exact and the same on every device. A float32
    angle would have no correct digit in a long column.
    """
    frequency = (torch.arange(m - 1, m - 1 - k, -1, device=device) * 2**30 // m).to(torch.int32)
    odd = torch.arange(1, 2 * m, 2, dtype=torch.int32, device=device)
    angle = (frequency[:, None] * odd).mT if by_columns else odd[:, None] * frequency
    return angle.float().mul_(2 * math.pi / 2**32).cos_().mul_(math.sqrt(2 / m))


# `directions` with at most this many numbers are cached: those of the layers of real models up to adapter rank 128.
_CACHED_NUMBERS = 2**23


@functools.lru_cache(maxsize=16)
def _cached_directions(m: int, k: int, device: torch.device, by_columns: bool) -> Tensor:
    """`directions`, cached because a model has few shapes and each of them returns in every micro-batch.

    To compute them costs as much as a Gram matrix on a CPU, and ten launches on a GPU. `forget` frees them.
    """
    return directions(m, k, device, by_columns)


forget = _cached_directions.cache_clear


def _jittered(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of `y` (..., m, k) scaled to unit norm, and JITTER times a direction added to each, in `dtype`.

    A column that is zero becomes the direction itself. The result has the memory layout of `y`.
    """
    m, k = y.shape[-2:]
    cached = m * k <= _CACHED_NUMBERS and not y.is_meta
    noise = (_cached_directions if cached else directions)(m, k, y.device, y.stride(-2) == 1)
    # in float64 the squares neither overflow nor underflow
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True, dtype=torch.float64)
    known = norm > SMALLEST_NORM
    unit = torch.where(known, norm.reciprocal(), 0.0).to(dtype)
    # of two numbers `where` would make the caller's default dtype, in which JITTER may be another number
    weight = torch.where(known, norm.new_full((), JITTER, dtype=dtype), 1.0)
    return torch.addcmul(noise * weight, y.to(dtype), unit)


def _times(a: Tensor, inverse: Tensor, by_columns: bool) -> Tensor:
    """a · inverseᵀ in the memory layout of `a`: MKL takes up to seven times as long to write the other (2048 x 80)."""
    return (inverse @ a.mT).mT if by_columns else a @ inverse.mT


@implement("basis", _KEY)
def basis(y: Tensor, passes: int = 2) -> Tensor:
    """Column scaling, then passes of CholeskyQR in float32, each with the shift BASIS_SHIFT (docs/numerics.md).

    The shift is larger than what rounding can take from the smallest eigenvalue of the Gram matrix, so the Cholesky
    factor exists for any input (shifted CholeskyQR: Fukaya et al., 2020). A column below SMALLEST_NORM counts as zero.
    """
    by_columns = y.is_cpu and y.stride(-2) == 1
    a = _jittered(y, torch.float32)
    for _ in range(passes):
        a = _times(a, declared.cholesky_inverse(a.mT @ a, BASIS_SHIFT), by_columns)
    return a.contiguous()


def shifts(m: int, k: int) -> tuple[float, ...]:
    """The diagonal shift of each pass of `orthonormalize` over an (m, k) block, as a share of its Gram matrix's trace.

    The Gram matrix of a tall block with few rows that are not zero does not see the added directions: each of its sums
    has one term of order one and thousands below its rounding. The first shift is larger than all that is lost there.
    """
    return (1e-13, 0.0) if m >= 1.5 * k else (1e-13, 1e-13, 0.0)


@implement("orthonormalize", _KEY)
def orthonormalize(y: Tensor) -> Tensor:
    """Column scaling, then CholeskyQR with Gram, factor and product in float64 (docs/numerics.md).

    CholeskyQR2 (Yamamoto et al., 2015) in float32 fails from condition 1e4 on; with a float64 Gram matrix it works up
    to 1e7. The jitter bounds the condition by about 1 / JITTER, so the first Cholesky factor always exists. The last
    pass removes the error that the shift and rounding left. A square block can have a larger condition than the jitter
    suggests, and gets a pass more.
    """
    by_columns = y.is_cpu and y.stride(-2) == 1
    a = _jittered(y, torch.float64)
    for shift in shifts(*y.shape[-2:]):
        a = _times(a, declared.cholesky_inverse(a.mT @ a, shift), by_columns)
    return a.float().contiguous()


@implement("subspace", _KEY)
def subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    if g.dtype == torch.float32 or multiplies_half(g):
        return _subspace(g, k, iterations, seeds, g.dtype)
    # this device has no half-precision products with float32 sums: widen one matrix at a time, to limit the memory
    b, m, n = g.shape
    q, z = (torch.empty(b, *shape, dtype=torch.float32, device=g.device) for shape in ((m, k), (k, n)))
    for i, seed in enumerate(seeds):
        q[i : i + 1], z[i : i + 1] = _subspace(g[i : i + 1].float(), k, iterations, [seed], g.dtype)
    return q, z


def _subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`subspace` with thin operands rounded to `dtype`, the dtype that `g` had before it was widened to float32.

    `g` is never scaled. The products with V and Q, which are orthonormal, and with the random Ω have no entries much
    larger than the spectral norm of `g`, which S must represent anyway. `orthonormalize` accepts any scale.
    """
    b, _, n = g.shape
    v = torch.empty(b, n, k, dtype=torch.float32, device=g.device)
    for out, seed in zip(v, seeds, strict=True):
        declared.test_matrix_(out, seed)
    for _ in range(iterations):
        q = declared.basis(_batched_product(g, v.to(dtype)))
        v = declared.basis(_batched_product(q.to(dtype).mT, g).mT)
    q = declared.orthonormalize(_batched_product(g, v.to(dtype)))
    if dtype == torch.float32:
        return q, _batched_product(q.mT, g)
    # Rounding Q to bfloat16 would cost S three digits (measured: 3e-4 of the largest). Therefore Q goes in as the sum
    # of two rounded matrices, whose columns are multiplied in one product. The earlier products need no such sum: with
    # only this one, no captured energy is lost (without it, 5e-7 of the energy).
    high = q.to(dtype)
    z = _batched_product(torch.cat((high, (q - high).to(dtype)), dim=-1).mT, g)
    return q, z[:, :k] + z[:, k:]


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for batches, at least one of them in half precision or both float32, with float32 sums and result."""
    if a.dtype == b.dtype == torch.float32:
        return a @ b
    if multiplies_half(a):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@implement("small_svd", _KEY)
def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # LAPACK raises on NaN, and squares inside it overflow near the ends of the float32 range. Therefore cores are
    # scaled by their largest entry, and a core with NaN or Inf is replaced by zero.
    largest = core.abs().amax(dim=(-2, -1), keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    scaled = torch.where(usable, core / torch.where(usable, largest, 1.0), 0.0)
    u, s, vh = (_svd_by_eigenvalues if core.is_cuda else torch.linalg.svd)(scaled.double())
    scale = torch.where(usable, largest, torch.where(largest == 0, 0.0, torch.nan))
    return u.float().contiguous(), (s * scale.squeeze(-1)).float(), vh.float().contiguous()


def _svd_by_eigenvalues(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The full SVD of `core` (..., k, k) float64 by the eigenvectors of its Gram matrix.

    For cores wider than 512 on a GPU, and for narrower ones where the native core is missing. cuSOLVER computes the
    SVDs of a batch one by one, each in many small launches, but symmetric eigenproblems in large launches. Squaring the
    core halves the digits of float64. The accuracy that
    remains: S is right to 1e-8 of the largest, U and Vh are orthonormal to 1e-5, and rows of Vh are singular vectors
    where S is at least 1e-5 of the largest.
    """
    u = torch.linalg.eigh(core @ core.mT).eigenvectors
    rows = u.mT @ core
    s, order = torch.linalg.vector_norm(rows, dim=-1).sort(dim=-1, descending=True, stable=True)
    u = u.gather(-1, order[..., None, :].expand_as(u))
    rows = rows.gather(-2, order[..., None].expand_as(rows))
    known = ((s >= 1e-5 * s[..., :1]) & (s > 0))[..., None]  # shorter rows are no longer orthogonal
    rows = torch.where(known, rows / s[..., None], 0.0)
    return u, s, torch.where(known, rows, declared.orthonormalize(rows.mT.float()).mT.double())


@implement("cholesky_inverse", _KEY)
def cholesky_inverse(gram: Tensor, shift: float) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    lower, info = torch.linalg.cholesky_ex(gram + shift * trace * eye)
    if shift > 0 and not (gram.is_cpu and (info == 0).all()):  # a CPU tensor costs no wait
        more, failed = torch.linalg.cholesky_ex(gram + 100 * shift * trace * eye)
        lower, info = torch.where(info[..., None, None] == 0, lower, more), torch.where(info == 0, info, failed)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    # LAPACK reports success when a NaN or Inf appears after the last pivot
    usable = (info[..., None, None] == 0) & torch.isfinite(inverse).all(dim=(-2, -1), keepdim=True)
    return torch.where(usable, inverse, torch.nan).contiguous()


# Entries that `gradient_add_` widens to float32 at a time: the op exists to avoid a second copy of the gradient.
_CHUNK = 2**18


@implement("gradient_add_", _KEY)
def gradient_add_(total: Tensor, gradient: Tensor, scale: float, finite: Tensor | None) -> Tensor:
    added = torch.ones((), dtype=torch.bool, device=total.device) if finite is None else finite.clone()
    if total.numel() == 0:
        return added
    gradient = torch.atleast_1d(gradient)
    rows = gradient.shape[0]
    step = max(1, _CHUNK * rows // total.numel())
    parts = list(zip(total.view(rows, -1).split(step), gradient.split(step), strict=True))
    if finite is None:
        for _, part in parts:
            added &= torch.isfinite(part).all()
    for old, part in parts:
        new = torch.add(old.float(), part.reshape(old.shape).float(), alpha=scale)
        torch.where(added, new.to(old.dtype), old, out=old)
    return added
