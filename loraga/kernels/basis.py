"""Bases of batches of tall blocks in float32: CholeskyQR twice, of a scaled, jittered block that is never stored.

    A = Y D + N W             D: columns to unit norm; N: columns of the DCT; W: JITTER, or 1 for a zero column of Y
    then in each pass:
    L Lᵀ = AᵀA + 1e-7 trace(AᵀA) I        `cholesky_inverse`, k x k
    A <- A L⁻ᵀ

(Shifted CholeskyQR, Fukaya et al. 2020; docs/numerics.md says what a float32 Gram matrix can promise.) A is made anew
from Y, its norms and the index of the entry in each of the two kernels of the first pass. The second pass reads the
result of the first as it is. One launch works on all blocks of the batch.

Y comes as Zᵀ, or as a slice of a product whose columns are contiguous: any strides, and loads are wide where rows or
columns are contiguous. Blocks of columns are powers of two: 80 are one block of 64 and one of 16 beside it, so that
80, 96, 128 and multiples of 128 (or of 64: 160 are padded to 192) are not padded.

Launches: 7 with two passes and 4 with one (norms; Gram, factor and product in each pass), and one more for each Gram
matrix whose sum is cut into parts, so at most 9 whatever the batch. Parts are added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.common import FUSED, PRECISION, blocks_of, splits_for, sum_splits
from loraga.ops import declared, reference

basis_reference = reference.basis

# Most columns of a block.
_WIDEST = 128
# Most parts that norms are summed in: the programs of the Gram kernel read all of them. A power of two.
_PARTS = 32

# Block sizes by columns of a block (MAIN + REST, up to).
_GRAM = {
    48: {"BLOCK_M": 16, "num_warps": 2, "num_stages": 2},
    80: {"BLOCK_M": 16, "num_warps": 4, "num_stages": 3},
    128: {"BLOCK_M": 16, "num_warps": 8, "num_stages": 2},
}
_PRODUCT = {
    96: {"BLOCK_M": 64, "BLOCK_I": 16, "num_warps": 4, "num_stages": 3},
    128: {"BLOCK_M": 64, "BLOCK_I": 32, "num_warps": 8, "num_stages": 2},
}
_NORMS = {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def _norms_kernel(
    y_ptr, partial_ptr, m, k, splits, stride_yb, stride_ym, stride_yk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """partial[batch, split, j] = sum of y[i, j]² over the rows of the split, float64: nothing overflows or vanishes."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    pointers = y_ptr + batch * stride_yb + (part * BLOCK_M + rows[:, None]).to(tl.int64) * stride_ym
    pointers += columns[None, :].to(tl.int64) * stride_yk
    step = tl.cast(splits, tl.int64) * BLOCK_M * stride_ym
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float64)
    for start in range(part * BLOCK_M, m, splits * BLOCK_M):
        inside = (start + rows < m)[:, None] & (columns < k)[None, :]
        y = tl.load(pointers, mask=inside, other=0.0).to(tl.float64)
        sums += y * y
        pointers += step
    tl.store(partial_ptr + (batch * splits + part) * k + columns, tl.sum(sums, axis=0), mask=columns < k)


@triton.jit
def _scales(norms_ptr, parts, batch, columns, m, k, weight, jitter, smallest, PARTS: tl.constexpr):
    """What A is made of, by column: factor of y, weight and frequency of the DCT column. All zero beyond column k."""
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (columns < k)[None, :]
    squares = tl.load(norms_ptr + (batch * parts + part[:, None]) * k + columns[None, :], mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    known = norm > smallest
    factor = tl.where(known, 1.0 / tl.where(known, norm, 1.0), 0.0).to(tl.float32)
    weights = tl.where(columns < k, tl.where(known, weight * jitter, weight), 0.0)
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
def _tall(y, rows, m, factor, weights, frequency):
    """Entries of A from loaded ones of Y, a row for each of `rows`; zero beyond row m."""
    made = y * factor[None, :] + weights[None, :] * _cosine((2 * rows + 1)[:, None] * frequency[None, :])
    return tl.where((rows < m)[:, None], made, 0.0)


@triton.jit
def _wide(y, rows, m, factor, weights, frequency):
    """`_tall` for a block that was loaded transposed: a column for each of `rows`."""
    made = y * factor[:, None] + weights[:, None] * _cosine(frequency[:, None] * (2 * rows + 1)[None, :])
    return tl.where((rows < m)[None, :], made, 0.0)


@triton.jit
def _gram_kernel(
    y_ptr,
    norms_ptr,
    scales_ptr,
    frequency_ptr,
    out_ptr,
    parts,
    weight,
    jitter,
    smallest,
    m,
    k,
    blocks,
    splits,
    stride_yb,
    stride_ym,
    stride_yk,
    stride_os,
    RAW: tl.constexpr,
    ONE: tl.constexpr,
    PARTS: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split, batch] = AᵀA over the rows of the split, the blocks of MAIN columns on and below the diagonal.

    ONE: all columns are in one block, and REST more columns beside it are multiplied with it and with themselves. A is
    then made once for both operands; what is RAW is loaded twice, straight into the layout of each. Unless RAW the
    programs of the diagonal also leave what A is made of: scales[batch] (2, k) and frequency (k,).
    """
    left = tl.program_id(0) // blocks
    right = tl.program_id(0) % blocks
    part = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if right <= left:
        rows = tl.arange(0, BLOCK_M)
        at = (part * BLOCK_M + rows).to(tl.int64)
        step = tl.cast(splits, tl.int64) * BLOCK_M * stride_ym
        tall_ptr = y_ptr + batch * stride_yb + at[:, None] * stride_ym
        wide_ptr = y_ptr + batch * stride_yb + at[None, :] * stride_ym

        a = right * MAIN + tl.arange(0, MAIN)
        c = left * MAIN + tl.arange(0, MAIN)
        a_ptr = tall_ptr + a[None, :].to(tl.int64) * stride_yk
        c_ptr = wide_ptr + c[:, None].to(tl.int64) * stride_yk
        sums = tl.zeros((MAIN, MAIN), dtype=tl.float32)
        if REST:
            b = MAIN + tl.arange(0, REST)
            b_ptr = tall_ptr + b[None, :].to(tl.int64) * stride_yk
            d_ptr = wide_ptr + b[:, None].to(tl.int64) * stride_yk
            beside = tl.zeros((MAIN, REST), dtype=tl.float32)
            corner = tl.zeros((REST, REST), dtype=tl.float32)
        if not RAW:
            af, aw, aq = _scales(norms_ptr, parts, batch, a, m, k, weight, jitter, smallest, PARTS)
            scales_ptr += batch * 2 * k
            if (part == 0) & (left == right):
                tl.store(scales_ptr + a, af, mask=a < k)
                tl.store(scales_ptr + k + a, aw, mask=a < k)
                if batch == 0:
                    tl.store(frequency_ptr + a, aq, mask=a < k)
            if not ONE:
                cf, cw, cq = _scales(norms_ptr, parts, batch, c, m, k, weight, jitter, smallest, PARTS)
            if REST:
                bf, bw, bq = _scales(norms_ptr, parts, batch, b, m, k, weight, jitter, smallest, PARTS)
                if part == 0:
                    tl.store(scales_ptr + b, bf, mask=b < k)
                    tl.store(scales_ptr + k + b, bw, mask=b < k)
                    if batch == 0:
                        tl.store(frequency_ptr + b, bq, mask=b < k)

        for start in range(part * BLOCK_M, m, splits * BLOCK_M):
            row = start + rows
            tall = tl.load(a_ptr, mask=(row < m)[:, None] & (a < k)[None, :], other=0.0)
            if RAW or not ONE:
                wide = tl.load(c_ptr, mask=(c < k)[:, None] & (row < m)[None, :], other=0.0)
            if not RAW:
                tall = _tall(tall, row, m, af, aw, aq)
                wide = tl.trans(tall) if ONE else _wide(wide, row, m, cf, cw, cq)
            sums = tl.dot(wide, tall, sums, input_precision=PRECISION)
            if REST:
                rest = tl.load(b_ptr, mask=(row < m)[:, None] & (b < k)[None, :], other=0.0)
                if RAW:
                    transposed = tl.load(d_ptr, mask=(b < k)[:, None] & (row < m)[None, :], other=0.0)
                else:
                    rest = _tall(rest, row, m, bf, bw, bq)
                    transposed = tl.trans(rest)
                beside = tl.dot(wide, rest, beside, input_precision=PRECISION)
                corner = tl.dot(transposed, rest, corner, input_precision=PRECISION)
                b_ptr += step
                d_ptr += step
            a_ptr += step
            c_ptr += step

        out_ptr += part.to(tl.int64) * stride_os + batch * k * k
        tl.store(out_ptr + c[:, None] * k + a[None, :], sums, mask=(c < k)[:, None] & (a < k)[None, :])
        if REST:
            # the programs of a block share rows of `beside`, of which there are more; it goes where its transpose is
            tl.store(out_ptr + b[None, :] * k + a[:, None], beside, mask=(a < k)[:, None] & (b < k)[None, :])
            tl.store(out_ptr + b[:, None] * k + b[None, :], corner, mask=(b < k)[:, None] & (b < k)[None, :])


@triton.jit
def _product_kernel(
    y_ptr,
    scales_ptr,
    frequency_ptr,
    inverse_ptr,
    out_ptr,
    m,
    k,
    stride_yb,
    stride_ym,
    stride_yk,
    RAW: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = A · inverseᵀ for lower triangular `inverse`, zero above its diagonal; a block of MAIN + REST columns."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * (MAIN + REST)
    batch = tl.program_id(2).to(tl.int64)
    steps = tl.arange(0, BLOCK_I)
    y_ptr += batch * stride_yb
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_ym + steps[None, :].to(tl.int64) * stride_yk
    y_step = tl.cast(stride_yk, tl.int64) * BLOCK_I
    scales_ptr += batch * 2 * k
    inverse_ptr += batch * k * k
    a = first + tl.arange(0, MAIN)
    a_ptrs = inverse_ptr + a[None, :].to(tl.int64) * k + steps[:, None]
    a_sums = tl.zeros((BLOCK_M, MAIN), dtype=tl.float32)
    if REST:
        b = first + MAIN + tl.arange(0, REST)
        b_ptrs = inverse_ptr + b[None, :].to(tl.int64) * k + steps[:, None]
        b_sums = tl.zeros((BLOCK_M, REST), dtype=tl.float32)
    for start in range(0, tl.minimum(first + MAIN + REST, k), BLOCK_I):
        inner = start + steps
        block = tl.load(y_ptrs, mask=(rows < m)[:, None] & (inner < k)[None, :], other=0.0)
        if not RAW:
            factor = tl.load(scales_ptr + inner, mask=inner < k, other=0.0)
            weights = tl.load(scales_ptr + k + inner, mask=inner < k, other=0.0)
            frequency = tl.load(frequency_ptr + inner, mask=inner < k, other=0)
            block = _tall(block, rows, m, factor, weights, frequency)
        inverse = tl.load(a_ptrs, mask=(inner < k)[:, None] & (a < k)[None, :], other=0.0)
        a_sums = tl.dot(block, inverse, a_sums, input_precision=PRECISION)
        if REST:
            inverse = tl.load(b_ptrs, mask=(inner < k)[:, None] & (b < k)[None, :], other=0.0)
            b_sums = tl.dot(block, inverse, b_sums, input_precision=PRECISION)
            b_ptrs += BLOCK_I
        y_ptrs += y_step
        a_ptrs += BLOCK_I
    out_ptr += (batch * m + rows[:, None]) * k
    tl.store(out_ptr + a[None, :], a_sums, mask=(rows < m)[:, None] & (a < k)[None, :])
    if REST:
        tl.store(out_ptr + b[None, :], b_sums, mask=(rows < m)[:, None] & (b < k)[None, :])


def blocks_of_columns(k: int) -> tuple[int, int, int]:
    """(blocks, main, rest): k columns as blocks of `main`, and `rest` more beside a single one, powers of two or 0."""
    if k > _WIDEST:
        main = min(_WIDEST, _WIDEST // 2, key=lambda width: blocks_of(k, width) * width)
        return blocks_of(k, main), main, 0
    columns = 16 * blocks_of(k, 16)
    main = 1 << (columns.bit_length() - 1)
    rest = 0 if columns == main else 1 << (columns - main - 1).bit_length()
    return (1, 2 * main, 0) if rest == main else (1, main, rest)


def _config(table: dict[int, dict[str, int]], columns: int) -> dict[str, int]:
    return next(config for most, config in table.items() if columns <= most)


def basis(y: Tensor, passes: int = 2) -> Tensor:
    """See `ops.declared.basis`: contiguous float32 Q of the shape of y (..., m, k) float32, any strides, m >= k."""
    if y.numel() == 0:
        return torch.empty(y.shape, dtype=torch.float32, device=y.device)
    block = y[None] if y.dim() == 2 else y.flatten(0, -3)
    norms = _norms(block)
    k = y.shape[-1]
    scales = torch.empty(len(block), 2, k, dtype=torch.float32, device=y.device)
    frequency = torch.empty(k, dtype=torch.int32, device=y.device)
    for raw in (False, True)[:passes]:
        gram = _gram(block, norms, scales, frequency, raw)
        inverse = declared.cholesky_inverse(gram, reference.BASIS_SHIFT)
        block = _product(block, scales, frequency, inverse, raw)
    return block.view(y.shape)


def _norms(y: Tensor) -> Tensor:
    """Sums of squares of the columns of y (b, m, k) in parts, (b, splits, k) float64."""
    batches, m, k = y.shape
    blocks = blocks_of(k, _NORMS["BLOCK_K"])
    splits = min(splits_for(blocks * batches, blocks_of(m, _NORMS["BLOCK_M"]), y.device), _PARTS)
    partial = torch.empty(batches, splits, k, dtype=torch.float64, device=y.device)
    _norms_kernel[(blocks, splits, batches)](y, partial, m, k, splits, *y.stride(), **_NORMS, **FUSED)
    return partial


def _gram(y: Tensor, norms: Tensor, scales: Tensor, frequency: Tensor, raw: bool) -> Tensor:
    """AᵀA (b, k, k) of what `_product` multiplies, lower triangles; `scales` and `frequency` are filled unless raw."""
    batches, m, k = y.shape
    blocks, main, rest = blocks_of_columns(k)
    config = _config(_GRAM, main + rest)
    splits = splits_for(blocks * (blocks + 1) // 2 * batches, blocks_of(m, config["BLOCK_M"]), y.device)
    partial = torch.empty(splits, batches, k, k, dtype=torch.float32, device=y.device)
    _gram_kernel[(blocks * blocks, splits, batches)](
        y,
        norms,
        scales,
        frequency,
        partial,
        norms.shape[1],
        (2 / m) ** 0.5,
        reference.JITTER,
        reference.SMALLEST_NORM,
        m,
        k,
        blocks,
        splits,
        *y.stride(),
        partial.stride(0),
        RAW=raw,
        ONE=blocks == 1,
        PARTS=_PARTS,
        MAIN=main,
        REST=rest,
        PRECISION=PRECISION,
        **config,
        **FUSED,
    )
    return partial[0] if splits == 1 else sum_splits(partial, torch.empty_like(partial[0]))


def _product(y: Tensor, scales: Tensor, frequency: Tensor, inverse: Tensor, raw: bool) -> Tensor:
    """A · inverseᵀ (b, m, k)."""
    batches, m, k = y.shape
    blocks, main, rest = blocks_of_columns(k)
    config = _config(_PRODUCT, main + rest)
    out = torch.empty(batches, m, k, dtype=torch.float32, device=y.device)
    _product_kernel[(blocks_of(m, config["BLOCK_M"]), blocks, batches)](
        y,
        scales,
        frequency,
        inverse,
        out,
        m,
        k,
        *y.stride(),
        RAW=raw,
        MAIN=main,
        REST=rest,
        PRECISION=PRECISION,
        **config,
        **FUSED,
    )
    return out
