"""Plain torch, any device: the reference that every other backend is held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with operands as they are and float32 sums and result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@implement("left_product", _KEY)
def left_product(x: Tensor, dy: Tensor, v: Tensor) -> Tensor:
    p = product(x, v.to(x.dtype)).to(x.dtype)
    return product(p.t(), dy).t()


@implement("right_product", _KEY)
def right_product(x: Tensor, dy: Tensor, q: Tensor) -> Tensor:
    r = product(dy, q.to(dy.dtype)).to(dy.dtype)
    return product(r.t(), x)


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
    shifts = (1e-15,) if not refine else (1e-15, 0.0) if m >= 1.5 * k else (1e-14, 1e-15, 0.0)
    for shift in shifts:
        a = a @ torch.ops.loraga.cholesky_inverse(a.mT @ a, shift).mT
    return a.float()


@implement("small_svd", _KEY)
def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # LAPACK raises on NaN, and squares inside overflow near the ends of float32: scale, and blank what has no meaning
    largest = core.abs().amax(dim=(-2, -1), keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    scaled = torch.where(usable, core / torch.where(usable, largest, 1.0), 0.0)
    u, s, vh = torch.linalg.svd(scaled.double())
    scale = torch.where(usable, largest, torch.where(largest == 0, 0.0, torch.nan))
    return u.float().contiguous(), (s * scale.squeeze(-1)).float(), vh.float().contiguous()


@implement("cholesky_inverse", _KEY)
def cholesky_inverse(gram: Tensor, shift: float) -> Tensor:
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    lower, info = torch.linalg.cholesky_ex(gram + shift * trace * eye)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    # LAPACK calls a NaN or Inf that comes up after the last pivot a success
    usable = (info[..., None, None] == 0) & torch.isfinite(inverse).all(dim=(-2, -1), keepdim=True)
    return torch.where(usable, inverse, torch.nan).contiguous()


# Entries that the reference of gradient_add_ widens at a time: a whole gradient twice is what the op is there to avoid.
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
