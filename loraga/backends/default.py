"""Plain torch, any device: the reference that every other backend is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraga import _ops
from loraga._ops import implement

_KEY = "CompositeExplicitAutograd"

# Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011)
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# Added to every unit column before its Gram matrix is taken, as a share of it: large enough that a zero or dependent
# column becomes a usable direction, far below what a sketch resolves.
_JITTER = 1e-6


def philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64) of Philox4x32-10 at each `counter` (int64) under the 64-bit key `seed`."""
    # made on the device by fills and arithmetic: nothing is copied from the host
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
    count = out.numel()
    words = torch.stack(philox(torch.arange((count + 3) // 4, device=out.device), seed), dim=1).view(-1)[:count]
    # the upper 24 bits are exact in float32
    out.view(-1).copy_((words >> 8).float()).mul_(2.0**-23).sub_(1.0)


def _multiplies_half(a: Tensor) -> bool:
    """Are there products of half-precision operands with float32 sums where `a` is? Dry runs stand for a GPU."""
    return a.is_cuda or a.is_meta


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with operands as they are and float32 sums and result."""
    if a.dtype == torch.float32:
        return a @ b
    if _multiplies_half(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@implement("left_product", _KEY)
def left_product(x: Tensor, dy: Tensor, v: Tensor, scale: float, q: Tensor | None, zv: Tensor | None) -> Tensor:
    p = product(x, v.to(x.dtype)).to(x.dtype)
    out = _scaled(product(p.t(), dy), scale)
    if q is not None and zv is not None:
        out[: zv.shape[1]].addmm_(zv.t(), q.t())
    return out.t()


@implement("right_product", _KEY)
def right_product(x: Tensor, dy: Tensor, q: Tensor, scale: float, c: Tensor | None, z: Tensor | None) -> Tensor:
    r = product(dy, q.to(dy.dtype)).to(dy.dtype)
    out = _scaled(product(r.t(), x), scale)
    return out if c is None or z is None else out.addmm_(c, z)


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1.0 else product.mul_(scale)


@implement("commit_", _KEY)
def commit_(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    finite = _all_finite(left) & _all_finite(new_z)
    # in place, so that the memory of the state is taken once
    torch.where(finite, new_q, q, out=q)
    torch.where(finite, new_z, z, out=z)
    probed += torch.where(finite, left[:, q.shape[1] :], 0.0)
    return finite


def _all_finite(values: Tensor) -> Tensor:
    """0-dim bool; one pass over `values`, no temporary of their size."""
    low, high = torch.aminmax(values)
    return torch.isfinite(low) & torch.isfinite(high)


@implement("accumulate_", _KEY)
def accumulate_(g: Tensor, x: Tensor, dy: Tensor, scale: float) -> Tensor:
    finite = torch.isfinite(x).all() & torch.isfinite(dy).all()
    total = product(dy.t(), x).mul_(scale).add_(g)
    g.copy_(torch.where(finite, total.to(g.dtype), g))
    return finite


@implement("orthonormalize", _KEY)
def orthonormalize(y: Tensor, refine: bool) -> Tensor:
    """Column scaling, then CholeskyQR with Gram, factor and product in float64 (docs/numerics.md).

    CholeskyQR2 (Yamamoto et al., 2015) in float32 fails from condition 1e4; a float64 Gram carries it to 1e7. The
    jitter bounds the condition by about its reciprocal, so the first Cholesky always exists; the second pass removes
    what rounding left. A square block can be worse conditioned than the jitter suggests and gets a third pass.
    """
    m, k = y.shape[-2:]
    row, column = (torch.arange(length, dtype=torch.float32, device=y.device) for length in (m, k))
    # columns of the DCT, the highest frequencies first: orthonormal, dense, like no gradient, and free of state
    noise = ((math.pi / m) * (row + 0.5)[:, None] * (m - 1 - column)).cos_().mul_(math.sqrt(2 / m))
    largest = y.abs().amax(dim=-2, keepdim=True)
    a = y / torch.where(largest > 0, largest, 1.0)  # squares overflow and vanish no more
    norm = torch.linalg.vector_norm(a, dim=-2, keepdim=True)
    a = torch.where(norm > 0, a / norm + _JITTER * noise, noise).double()
    eye = torch.eye(k, dtype=a.dtype, device=a.device)
    shifts = (1e-15,) if not refine else (1e-15, 0.0) if m >= 1.5 * k else (1e-14, 1e-15, 0.0)
    for shift in shifts:
        gram = a.mT @ a
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        lower = torch.linalg.cholesky_ex(gram + (shift * k) * mean * eye).L
        a = a @ torch.linalg.solve_triangular(lower, eye, upper=False).mT
    return a.float()


@implement("subspace", _KEY)
def subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    if g.dtype == torch.float32 or _multiplies_half(g):
        return _subspace(g, k, iterations, seeds, g.dtype)
    # no half-precision products with float32 sums here: one matrix at a time, widened once
    b, m, n = g.shape
    q, z = (torch.empty(b, *shape, dtype=torch.float32, device=g.device) for shape in ((m, k), (k, n)))
    for i, seed in enumerate(seeds):
        q[i : i + 1], z[i : i + 1] = _subspace(g[i : i + 1].float(), k, iterations, [seed], g.dtype)
    return q, z


def _subspace(g: Tensor, k: int, iterations: int, seeds: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`subspace` with thin operands rounded to `dtype`, the dtype of `g` before it was widened, if it was.

    `g` is never scaled: columns of about unit norm (an orthonormal V, Q; Ω by chance) make products no larger than
    the spectral norm of `g`, which S must be able to hold anyway, and `orthonormalize` takes them at any scale.
    """
    b, _, n = g.shape
    v = torch.empty(b, n, k, dtype=torch.float32, device=g.device)
    for out, seed in zip(v, seeds, strict=True):
        _ops.test_matrix_(out, seed)
    for _ in range(iterations):
        q = _ops.orthonormalize(_batched_product(g, v.to(dtype)), refine=False)
        v = _ops.orthonormalize(_batched_product(q.to(dtype).mT, g).mT, refine=False)
    q = _ops.orthonormalize(_batched_product(g, v.to(dtype)))
    if dtype == torch.float32:
        return q, _batched_product(q.mT, g)
    # Rounding Q to bfloat16 once would cost S three digits (measured: 3e-4 of the largest): what it leaves goes in as
    # columns of their own. Before, rounding costs nothing: 5e-7 of the captured energy without this, nothing with it.
    high = q.to(dtype)
    z = _batched_product(torch.cat((high, (q - high).to(dtype)), dim=-1).mT, g)
    return q, z[:, :k] + z[:, k:]


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for batches, at least one of them in half precision or both float32, with float32 sums and result."""
    if a.dtype == b.dtype == torch.float32:
        return a @ b
    if _multiplies_half(a):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@implement("small_svd", _KEY)
def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # LAPACK raises on NaN, and squares inside overflow near the ends of float32: scale, and blank what has no meaning
    largest = core.abs().amax(dim=(-2, -1), keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    scaled = torch.where(usable, core / torch.where(usable, largest, 1.0), 0.0)
    u, s, vh = torch.linalg.svd(scaled.double())
    scale = torch.where(usable, largest, torch.where(largest == 0, 0.0, torch.nan))
    return u.float().contiguous(), (s * scale.squeeze(-1)).float(), vh.float().contiguous()
