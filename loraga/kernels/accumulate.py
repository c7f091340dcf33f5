"""One micro-batch onto a dense buffer: G += scale · dYᵀ X, unless x or dy holds a NaN or Inf.

cuBLAS can add onto a buffer too; what it cannot do is leave the buffer alone when an operand is poisoned without a copy
of it or a wait for the host. Two launches: `_finite_kernel` reads x and dy once and leaves a flag per program;
`_accumulate_kernel` reads the flags, forms a block of the product with float32 sums, adds the block of G and rounds to
nearest once. Nothing m x n exists besides G. Where m x n is too small to fill the device the sum over tokens is cut
into parts (float32, added in fixed order by a third launch; no atomics), which are small for the same reason. The last
launch is the only one that writes to G, and says whether it did.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.common import (
    FUSED,
    INTERPRETED,
    PRECISION,
    RAGGED,
    all_set,
    blocks_of,
    family_of,
    rounded,
    splits_for,
)
from loraga.ops import reference

accumulate_reference = reference.accumulate_

_FLAGS = 1024  # at most so many programs look for NaN and Inf
_SCAN = {"ROWS": 16, "COLUMNS": 128}
_ADD_BLOCK = 1024

# Block sizes by bits of an operand and family of devices.
_CONFIG = {
    (16, 80): {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 32, "GROUP": 8, "num_warps": 8, "num_stages": 4},
    (16, 90): {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
    (16, 100): {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
    (16, RAGGED): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2},
    (32, 80): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3},
    (32, 90): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3},
    (32, 100): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    (32, RAGGED): {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_T": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def _largest(largest, ptr, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Maximum of `largest` (ROWS, COLUMNS) and the absolute entries of a matrix that this program meets, or NaN.

    The programs of axis 0 share the blocks of rows.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inner = row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    step = tl.cast(stride_column, tl.int64) * COLUMNS
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        pointers = ptr + tl.cast(start, tl.int64) * stride_row + inner
        for first in range(0, columns, COLUMNS):
            inside = (row < rows - start) & (column < columns - first)
            value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
            pointers += step
    return largest


@triton.jit
def _finite_kernel(
    x_ptr,
    dy_ptr,
    flags_ptr,
    T,
    m,
    n,
    stride_xt,
    stride_xn,
    stride_dt,
    stride_dm,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """flags[program] = are its rows of x and dy free of NaN and Inf?"""
    largest = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    largest = _largest(largest, x_ptr, T, n, stride_xt, stride_xn, ROWS, COLUMNS)
    largest = _largest(largest, dy_ptr, T, m, stride_dt, stride_dm, ROWS, COLUMNS)
    finite = (largest < float("inf")).to(tl.int32)  # false for NaN, too
    tl.store(flags_ptr + tl.program_id(0), tl.min(tl.min(finite, axis=1), axis=0))


@triton.jit
def _block_of(program, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of a program's block. Programs take GROUP rows of blocks at a time, column by column, so that
    they find their operands in L2."""
    group = program // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    return group * GROUP + (program % (GROUP * blocks_n)) % height, (program % (GROUP * blocks_n)) // height


@triton.jit
def _accumulate_kernel(
    g_ptr,
    x_ptr,
    dy_ptr,
    partial_ptr,
    flags_ptr,
    added_ptr,
    flags,
    scale,
    T,
    m,
    n,
    splits,
    stride_gm,
    stride_gn,
    stride_xt,
    stride_xn,
    stride_dt,
    stride_dm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    FLAGS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G += scale · dYᵀ X block by block; with SPLIT, partial[split] = the sum over every splits-th block of tokens."""
    block_m, block_n = _block_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    part = tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_T)
    at = (part * BLOCK_T + tokens).to(tl.int64)
    # dY is loaded as the transpose that is multiplied, so that it can go to shared memory as it is
    dy_ptrs = dy_ptr + rows[:, None].to(tl.int64) * stride_dm + at[None, :] * stride_dt
    x_ptrs = x_ptr + at[:, None] * stride_xt + columns[None, :].to(tl.int64) * stride_xn
    dy_step = tl.cast(splits, tl.int64) * BLOCK_T * stride_dt
    x_step = tl.cast(splits, tl.int64) * BLOCK_T * stride_xt
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(part * BLOCK_T, T, splits * BLOCK_T):
        inside = tokens < T - start
        dy = tl.load(dy_ptrs, mask=(rows < m)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None] & (columns < n)[None, :], other=0.0)
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(dy, x, sums, input_precision=PRECISION)
        dy_ptrs += dy_step
        x_ptrs += x_step
    wide_rows = rows[:, None].to(tl.int64)
    if SPLIT:
        partial_ptr += part * tl.cast(m, tl.int64) * n
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        tl.store(partial_ptr + wide_rows * n + columns[None, :], sums, mask=inside)
    else:
        added = all_set(flags_ptr, flags, FLAGS)
        keep = (rows < tl.where(added, m, 0))[:, None] & (columns < n)[None, :]
        g = g_ptr + wide_rows * stride_gm + columns[None, :].to(tl.int64) * stride_gn
        total = tl.load(g, mask=keep, other=0.0).to(tl.float32) + scale * sums
        tl.store(g, rounded(total, g_ptr, WIDEN), mask=keep)
        if tl.program_id(0) == 0:
            tl.store(added_ptr, added.to(tl.int8))


@triton.jit
def _add_splits_kernel(
    g_ptr,
    partial_ptr,
    flags_ptr,
    added_ptr,
    flags,
    scale,
    m,
    n,
    splits,
    stride_gm,
    stride_gn,
    BLOCK: tl.constexpr,
    FLAGS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """G += scale · (partial[0] + ... + partial[splits - 1]), in this order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.cast(m, tl.int64) * n  # Triton makes an m of 1 a constant, which has no `.to`
    added = all_set(flags_ptr, flags, FLAGS)
    keep = offsets < tl.where(added, total, 0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    pointers = partial_ptr + offsets
    for _ in range(splits):
        sums += tl.load(pointers, mask=keep, other=0.0)
        pointers += total
    g = g_ptr + (offsets // n) * stride_gm + (offsets % n) * stride_gn
    value = tl.load(g, mask=keep, other=0.0).to(tl.float32) + scale * sums
    tl.store(g, rounded(value, g_ptr, WIDEN), mask=keep)
    if tl.program_id(0) == 0:
        tl.store(added_ptr, added.to(tl.int8))


def accumulate(g: Tensor, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
    """G += scale · dYᵀ X in place for finite x (T, n), dy (T, m) of one dtype, any strides; a 0-dim bool: was it added?

    g (m, n) is float32 or bfloat16, any strides.
    """
    tokens, n = x.shape
    m = dy.shape[1]
    if not tokens or not g.numel():
        return torch.ones((), dtype=torch.bool, device=g.device)
    scans = min(_FLAGS, blocks_of(tokens, _SCAN["ROWS"]))
    flags = torch.empty(scans, dtype=torch.int32, device=g.device)
    added = torch.empty((), dtype=torch.int8, device=g.device)
    _finite_kernel[(scans,)](x, dy, flags, tokens, m, n, *x.stride(), *dy.stride(), **_SCAN, **FUSED)
    config = _CONFIG[8 * x.element_size(), family_of(g, x, dy)]
    programs = blocks_of(m, config["BLOCK_M"]) * blocks_of(n, config["BLOCK_N"])
    splits = splits_for(programs, blocks_of(tokens, config["BLOCK_T"]), g.device)
    partial = torch.empty(splits, m, n, dtype=torch.float32, device=g.device) if splits > 1 else g
    _accumulate_kernel[(programs, splits)](
        g,
        x,
        dy,
        partial,
        flags,
        added,
        scans,
        scale,
        tokens,
        m,
        n,
        splits,
        *g.stride(),
        *x.stride(),
        *dy.stride(),
        FLAGS=_FLAGS,
        SPLIT=splits > 1,
        WIDEN=INTERPRETED,
        PRECISION=PRECISION,
        **config,
        **FUSED,
    )
    if splits > 1:
        _add_splits_kernel[(blocks_of(g.numel(), _ADD_BLOCK),)](
            g,
            partial,
            flags,
            added,
            scans,
            scale,
            m,
            n,
            splits,
            *g.stride(),
            BLOCK=_ADD_BLOCK,
            FLAGS=_FLAGS,
            WIDEN=INTERPRETED,
            **FUSED,
        )
    return added.view(torch.bool)
