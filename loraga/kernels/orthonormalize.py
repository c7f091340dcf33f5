"""Orthonormal bases of batches of tall blocks: CholeskyQR of a scaled and jittered block that is never stored.

    A = Y D + jitter · N      D: columns to unit norm; N: columns of the DCT (alone where a column of Y is zero)
    W = AᵀA                   float64, the lower triangle
    L Lᵀ = W + shift · I      `cholesky_inverse`, k x k
    Q = A L⁻ᵀ                 and once or twice more from Q itself to refine it

(Fukaya et al. 2020, shifted CholeskyQR3, with the float64 Gram matrix of docs/numerics.md in place of a large shift.)
Everything is summed in float64: products of float32 are exact there, so the Gram matrix of a block of condition 1e7
keeps enough digits. A is made anew from Y, its norms and the index of the entry wherever it is used: Y (from any
strides, such as Zᵀ) is read three times, most of them from cache, and no float64 block is written. Between passes Q is
stored in float32: it is well conditioned by then, and the next pass makes exactly the stored one orthonormal.

Launches: norms 1, then 3 or 4 in every pass (Gram, the sum of its parts if it has several, factor, product). Sums
over m are cut into parts that are added in a fixed order, without atomics. Tensor cores of sm_80 and sm_90 have a
float64 product; on sm_100 Triton makes it of fused multiply-adds, and of blocks narrower than 64 only. Triton before
3.5 has none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga._version import release_of
from loraga.kernels.common import Build, arch_of, splits_for
from loraga.ops import declared, reference

orthonormalize_reference = reference.orthonormalize

_FLOAT64_DOT = release_of(triton.__version__) >= (3, 5)

# Up to how many columns: block sizes of the Gram and product kernels. A block of norms is always _NORMS. The entries of
# 80 are for its float64 tensor cores, which 90 has too; on 86, 89 and 120 they would spill.
_CONFIG = {
    80: {
        32: {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        256: {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    100: {256: {"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}},
}
_NORMS = {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# Most parts that norms are summed in: every program of the kernels that follow reads all of them. A power of two.
_PARTS = 32
_SUM = 1024


@triton.jit
def _norms_kernel(
    y_ptr, partial_ptr, m, k, splits, stride_yb, stride_ym, stride_yk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """partial[batch, split, j] = sum of y[i, j]² over the rows of the split, float64: nothing overflows or vanishes."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    y_ptr += batch * stride_yb + columns[None, :].to(tl.int64) * stride_yk
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
    for start in range(part * BLOCK_M, m, splits * BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (rows[:, None] < m) & (columns[None, :] < k)
        y = tl.load(y_ptr + rows[:, None] * stride_ym, mask=inside, other=0.0).to(tl.float64)
        sums += y * y
    out = partial_ptr + (batch * splits + part) * k + columns
    tl.store(out, tl.sum(sums, axis=0), mask=columns < k)


@triton.jit
def _scales(norms_ptr, parts, batch, columns, m, k, weight, jitter, PARTS: tl.constexpr):
    """What A is made of, by column: factor of y (float64), weight and frequency of the DCT column."""
    part = tl.arange(0, PARTS)
    inside = (part[:, None] < parts) & (columns[None, :] < k)
    squares = tl.load(norms_ptr + (batch * parts + part[:, None]) * k + columns[None, :], mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    factor = tl.where(norm > 0, 1.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    weights = tl.where(norm > 0, weight * jitter, weight)
    # in units of 2⁻³² turns; products with it wrap, which drops whole turns (`reference.directions`)
    frequency = ((m - 1 - columns).to(tl.int64) * 1073741824 // m).to(tl.int32)
    return factor, weights, frequency


@triton.jit
def _cosine(phase):
    """cos(2π · phase / 2³²) of int32 `phase`, to 2e-7: an odd minimax polynomial of the sine a quarter turn on.

    tl.cos would keep a slow path for large arguments, and stack for it.
    """
    turns = 0.25 - tl.abs(phase.to(tl.float32) * 2.3283064365386963e-10)
    square = turns * turns
    series = 81.60100415613911 + square * (-76.54978418152142 + square * 39.53672025467399)
    return turns * (6.283185160095122 + square * (-41.34165503274556 + square * series))


@triton.jit
def _block(y, rows, inside, factor, weights, frequency, RAW: tl.constexpr):
    """Float64 entries of A from loaded ones of Y; of Y itself if RAW."""
    a = y.to(tl.float64)
    if not RAW:
        phase = (2 * rows + 1).to(tl.int32)[:, None] * frequency[None, :]
        a = a * factor[None, :] + (weights[None, :] * _cosine(phase)).to(tl.float64)
        a = tl.where(inside, a, 0.0)
    return a


@triton.jit
def _gram_kernel(
    y_ptr,
    norms_ptr,
    out_ptr,
    parts,
    weight,
    jitter,
    m,
    k,
    blocks,
    splits,
    batches,
    stride_yb,
    stride_ym,
    stride_yk,
    PARTS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, batch] = lower blocks of AᵀA over the rows of the split."""
    left = tl.program_id(0) // blocks
    right = tl.program_id(0) % blocks
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if right <= left:
        left_columns = left * BLOCK_K + tl.arange(0, BLOCK_K)
        right_columns = right * BLOCK_K + tl.arange(0, BLOCK_K)
        left_ptr = y_ptr + batch * stride_yb + left_columns[None, :].to(tl.int64) * stride_yk
        right_ptr = y_ptr + batch * stride_yb + right_columns[None, :].to(tl.int64) * stride_yk
        lf, lw, lq = _scales(norms_ptr, parts, batch, left_columns, m, k, weight, jitter, PARTS)
        rf, rw, rq = _scales(norms_ptr, parts, batch, right_columns, m, k, weight, jitter, PARTS)
        sums = tl.zeros((BLOCK_K, BLOCK_K), dtype=tl.float64)
        for start in range(part * BLOCK_M, m, splits * BLOCK_M):
            rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            left_inside = (rows[:, None] < m) & (left_columns[None, :] < k)
            right_inside = (rows[:, None] < m) & (right_columns[None, :] < k)
            a = tl.load(left_ptr + rows[:, None] * stride_ym, mask=left_inside, other=0.0)
            b = tl.load(right_ptr + rows[:, None] * stride_ym, mask=right_inside, other=0.0)
            a = _block(a, rows, left_inside, lf, lw, lq, RAW)
            b = _block(b, rows, right_inside, rf, rw, rq, RAW)
            sums = tl.dot(tl.trans(a), b, sums, out_dtype=tl.float64)
        out = out_ptr + ((part.to(tl.int64) * batches + batch) * k + left_columns[:, None]) * k + right_columns[None, :]
        tl.store(out, sums, mask=(left_columns[:, None] < k) & (right_columns[None, :] < k))


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, total, k, splits, BLOCK: tl.constexpr):
    """The lower triangles of out = partial[0] + ... + partial[splits - 1], always in this order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets < total) & (offsets % k <= (offsets // k) % k)
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for split in range(splits):
        sums += tl.load(partial_ptr + split * total + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, sums, mask=inside)


@triton.jit
def _product_kernel(
    y_ptr,
    norms_ptr,
    inverse_ptr,
    out_ptr,
    parts,
    weight,
    jitter,
    m,
    k,
    stride_yb,
    stride_ym,
    stride_yk,
    PARTS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = A · inverseᵀ for lower triangular `inverse`, stored in float32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    batch = tl.program_id(2).to(tl.int64)
    y_ptr += batch * stride_yb + rows[:, None] * stride_ym
    inverse_ptr += batch * k * k + columns[None, :].to(tl.int64) * k
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
    for start in range(0, (tl.program_id(1) + 1) * BLOCK_K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < m) & (inner[None, :] < k)
        y = tl.load(y_ptr + inner[None, :].to(tl.int64) * stride_yk, mask=inside, other=0.0)
        factor, weights, frequency = _scales(norms_ptr, parts, batch, inner, m, k, weight, jitter, PARTS)
        a = _block(y, rows, inside, factor, weights, frequency, RAW)
        lower = (inner[:, None] <= columns[None, :]) & (columns[None, :] < k)
        b = tl.load(inverse_ptr + inner[:, None], mask=lower, other=0.0)
        sums = tl.dot(a, b, sums, out_dtype=tl.float64)
    out = out_ptr + (batch * m + rows[:, None]) * k + columns[None, :]
    tl.store(out, sums.to(tl.float32), mask=(rows[:, None] < m) & (columns[None, :] < k))


def orthonormalize(y: Tensor, refine: bool = True) -> Tensor:
    """See `ops.declared.orthonormalize`: contiguous float32 Q of the shape of y (..., m, k) float32, any strides."""
    if not _FLOAT64_DOT:
        return orthonormalize_reference(y, refine)
    m, k = y.shape[-2:]
    out = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    if out.numel() == 0:
        return out
    block = y[None] if y.dim() == 2 else y.flatten(0, -3)
    norms = _norms(block)
    for index, shift in enumerate(reference.shifts(m, k, refine)):
        raw = index > 0
        inverse = declared.cholesky_inverse(_gram(block, norms, raw), shift)
        block = _product(block, norms, inverse, raw)
    return block.view(out.shape)


def _entries(arch: int) -> dict[int, dict[str, int]]:
    return _CONFIG[80 if arch in (80, 90) else 100]


def _config(arch: int, k: int) -> dict[str, int]:
    table = _entries(arch)
    return table[min((columns for columns in table if columns >= k), default=max(table))]


def _norms(y: Tensor) -> Tensor:
    """Sums of squares of the columns of y (b, m, k) in parts, (b, splits, k) float64."""
    batches, m, k = y.shape
    blocks = triton.cdiv(k, _NORMS["BLOCK_K"])
    splits = min(splits_for(blocks * batches, triton.cdiv(m, _NORMS["BLOCK_M"]), y.device), _PARTS)
    partial = torch.empty(batches, splits, k, dtype=torch.float64, device=y.device)
    _norms_kernel[(blocks, splits, batches)](y, partial, m, k, splits, *y.stride(), **_NORMS)
    return partial


def _gram(y: Tensor, norms: Tensor, raw: bool) -> Tensor:
    """AᵀA (b, k, k) float64 of what `_product` multiplies; only lower triangles are written."""
    batches, m, k = y.shape
    config = _config(arch_of(y.device), k)
    blocks = triton.cdiv(k, config["BLOCK_K"])
    splits = splits_for(blocks * (blocks + 1) // 2 * batches, triton.cdiv(m, config["BLOCK_M"]), y.device)
    partial = torch.empty(splits, batches, k, k, dtype=torch.float64, device=y.device)
    _gram_kernel[(blocks * blocks, splits, batches)](
        y,
        norms,
        partial,
        norms.shape[1],
        (2 / m) ** 0.5,
        reference.JITTER,
        m,
        k,
        blocks,
        splits,
        batches,
        *y.stride(),
        PARTS=_PARTS,
        RAW=raw,
        **config,
    )
    if splits == 1:
        return partial[0]
    out = torch.empty(batches, k, k, dtype=torch.float64, device=y.device)
    _sum_kernel[(triton.cdiv(out.numel(), _SUM),)](partial, out, out.numel(), k, splits, BLOCK=_SUM)
    return out


def _product(y: Tensor, norms: Tensor, inverse: Tensor, raw: bool) -> Tensor:
    """A · inverseᵀ (b, m, k) float32."""
    batches, m, k = y.shape
    config = _config(arch_of(y.device), k)
    out = torch.empty(batches, m, k, dtype=torch.float32, device=y.device)
    _product_kernel[(triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(k, config["BLOCK_K"]), batches)](
        y,
        norms,
        inverse,
        out,
        norms.shape[1],
        (2 / m) ** 0.5,
        reference.JITTER,
        m,
        k,
        *y.stride(),
        PARTS=_PARTS,
        RAW=raw,
        **config,
    )
    return out


def builds(arch: int) -> Iterator[Build]:
    if not _FLOAT64_DOT:
        return
    pointers = {"y_ptr": "*fp32", "norms_ptr": "*fp64"}
    sizes = {"parts": "i32", "weight": "fp32", "jitter": "fp32", "m": "i32", "k": "i32"}
    grid = dict.fromkeys(("blocks", "splits", "batches"), "i32")
    for layout, one in (("rows", "stride_yk"), ("columns", "stride_ym"), ("strided", "")):
        strides = {name: "i64" for name in ("stride_yb", "stride_ym", "stride_yk") if name != one}
        ones = {one: 1} if one else {}
        multiples = ("m", "k", *strides) if one else ()
        norms = {"y_ptr": "*fp32", "partial_ptr": "*fp64", "m": "i32", "k": "i32", "splits": "i32"}
        yield Build(f"norms, {layout}", _norms_kernel, norms | strides, ones, _NORMS, multiples)
        for columns, config in _entries(arch).items():
            for raw in (False, True) if layout == "rows" else (False,):  # what is multiplied again lies in rows
                label = f"{columns}, {layout}{', again' if raw else ''}"
                constants = ones | {"PARTS": _PARTS, "RAW": raw}
                gram = pointers | {"out_ptr": "*fp64"} | sizes | grid | strides
                yield Build(f"gram {label}", _gram_kernel, gram, constants, config, multiples)
                product = pointers | {"inverse_ptr": "*fp64", "out_ptr": "*fp32"} | sizes | strides
                yield Build(f"product {label}", _product_kernel, product, constants, config, multiples)
    total = {"partial_ptr": "*fp64", "out_ptr": "*fp64", "total": "i64", "k": "i32", "splits": "i32"}
    yield Build("gram, sum of parts", _sum_kernel, total, {"BLOCK": _SUM})
