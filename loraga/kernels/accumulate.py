"""One micro-batch onto a dense buffer: G += scale · dYᵀ X, unless x or dy holds a NaN or Inf.

cuBLAS can add onto a buffer too; what it cannot do is leave the buffer alone when an operand is poisoned without a copy
of it or a wait for the host. Two launches: `_finite_kernel` reads x and dy once and leaves a flag per program;
`_accumulate_kernel` reads the flags, forms a block of the product with float32 sums, adds the block of G and rounds to
nearest once. Nothing m x n exists besides G. Where m x n is too small to fill the device the sum over tokens is cut
into parts (float32, added in fixed order by a third launch; no atomics), which are small for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels import tuning
from loraga.kernels.common import DTYPES, INTERPRETED, PRECISION, Build, arch_of, is_aligned, rounded, splits_for
from loraga.ops import reference

accumulate_reference = reference.accumulate_

_FLAGS = 1024  # at most so many programs look for NaN and Inf


@triton.jit
def all_set(flags_ptr, count, FLAGS: tl.constexpr):
    """Are all `count` flags one?"""
    offsets = tl.arange(0, FLAGS)
    return tl.min(tl.load(flags_ptr + offsets, mask=offsets < count, other=1), axis=0) != 0


@triton.jit
def _all_finite(ptr, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 where every entry this program meets is finite, else 0; the programs of axis 0 share the blocks of rows."""
    finite = tl.full((ROWS, COLUMNS), 1, dtype=tl.int32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for first in range(0, columns, COLUMNS):
            column = (first + tl.arange(0, COLUMNS).to(tl.int64))[None, :]
            value = tl.load(
                ptr + row * stride_row + column * stride_column, mask=(row < rows) & (column < columns), other=0.0
            ).to(tl.float32)
            finite = tl.where(tl.abs(value) < float("inf"), finite, 0)  # false for NaN too
    return tl.min(tl.min(finite, axis=1), axis=0)


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
    flag = _all_finite(x_ptr, T, n, stride_xt, stride_xn, ROWS, COLUMNS)
    flag = tl.minimum(flag, _all_finite(dy_ptr, T, m, stride_dt, stride_dm, ROWS, COLUMNS))
    tl.store(flags_ptr + tl.program_id(0), flag)


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
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(part * BLOCK_T, T, splits * BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = tokens[:, None] < T
        dy = tl.load(
            dy_ptr + tokens[:, None] * stride_dt + rows[None, :] * stride_dm,
            mask=inside & (rows[None, :] < m),
            other=0.0,
        )
        x = tl.load(
            x_ptr + tokens[:, None] * stride_xt + columns[None, :] * stride_xn,
            mask=inside & (columns[None, :] < n),
            other=0.0,
        )
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(tl.trans(dy), x, sums, input_precision=PRECISION)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if SPLIT:
        partial = partial_ptr + part.to(tl.int64) * m * n + rows[:, None] * n + columns[None, :]
        tl.store(partial, sums, mask=inside)
    else:
        keep = inside & all_set(flags_ptr, flags, FLAGS)
        g = g_ptr + rows[:, None] * stride_gm + columns[None, :] * stride_gn
        total = tl.load(g, mask=keep, other=0.0).to(tl.float32) + scale * sums
        tl.store(g, rounded(total, g_ptr, WIDEN), mask=keep)


@triton.jit
def _add_splits_kernel(
    g_ptr,
    partial_ptr,
    flags_ptr,
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
    keep = (offsets < total) & all_set(flags_ptr, flags, FLAGS)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        sums += tl.load(partial_ptr + split * total + offsets, mask=keep, other=0.0)
    g = g_ptr + (offsets // n) * stride_gm + (offsets % n) * stride_gn
    value = tl.load(g, mask=keep, other=0.0).to(tl.float32) + scale * sums
    tl.store(g, rounded(value, g_ptr, WIDEN), mask=keep)


_SCAN = {"ROWS": 16, "COLUMNS": 128}
_ADD_BLOCK = 1024


def accumulate(g: Tensor, x: Tensor, dy: Tensor, scale: float = 1.0) -> Tensor:
    """G += scale · dYᵀ X in place for finite x (T, n), dy (T, m) of one dtype, any strides; a 0-dim bool: was it added?

    g (m, n) is float32 or bfloat16, any strides.
    """
    tokens, n = x.shape
    m = dy.shape[1]
    if not tokens or not g.numel():
        return torch.ones((), dtype=torch.bool, device=g.device)
    scans = min(_FLAGS, triton.cdiv(tokens, _SCAN["ROWS"]))
    flags = torch.empty(scans, dtype=torch.int32, device=g.device)
    _finite_kernel[(scans,)](x, dy, flags, tokens, m, n, *x.stride(), *dy.stride(), **_SCAN)
    config = tuning.config("accumulate", x.dtype, arch_of(g.device) if is_aligned(g, x, dy) else None)
    programs = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    splits = splits_for(programs, triton.cdiv(tokens, config["BLOCK_T"]), g.device)
    partial = torch.empty(splits, m, n, dtype=torch.float32, device=g.device) if splits > 1 else g
    _accumulate_kernel[(programs, splits)](
        g,
        x,
        dy,
        partial,
        flags,
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
    )
    if splits > 1:
        _add_splits_kernel[(triton.cdiv(g.numel(), _ADD_BLOCK),)](
            g,
            partial,
            flags,
            scans,
            scale,
            m,
            n,
            splits,
            *g.stride(),
            BLOCK=_ADD_BLOCK,
            FLAGS=_FLAGS,
            WIDEN=INTERPRETED,
        )
    return flags.amin() > 0


def builds(arch: int) -> Iterator[Build]:
    sizes = dict.fromkeys(("T", "m", "n"), "i32")
    strides = dict.fromkeys(("stride_xt", "stride_xn", "stride_dt", "stride_dm"), "i64")
    ones = {"stride_xn": 1, "stride_dm": 1}
    multiples = ("m", "n", "stride_xt", "stride_dt", "stride_gm")
    for name in ("bf16", "fp32"):
        operands = {"x_ptr": f"*{name}", "dy_ptr": f"*{name}", "flags_ptr": "*i32"} | sizes | strides
        yield Build(f"finite {name}", _finite_kernel, operands, _SCAN | ones, multiples=multiples)
        yield Build(f"finite {name}, ragged", _finite_kernel, operands, dict(_SCAN))
        for table in (arch, None):
            for _, config in tuning.entries("accumulate", DTYPES[name], table):
                for split, buffer in ((False, "fp32"), (False, "bf16"), (True, "bf16")):
                    label = f"accumulate {name} -> {'parts' if split else buffer}"
                    yield Build(
                        label if table else f"{label}, ragged",
                        _accumulate_kernel,
                        operands
                        | {"g_ptr": f"*{buffer}", "partial_ptr": "*fp32" if split else f"*{buffer}", "flags": "i32"}
                        | {"scale": "fp32", "splits": "i32", "stride_gm": "i64", "stride_gn": "i64"},
                        (ones | {"stride_gn": 1} if table else {})
                        | {"FLAGS": _FLAGS, "SPLIT": split, "WIDEN": False, "PRECISION": PRECISION},
                        config,
                        multiples if table else (),
                    )
    for buffer in ("fp32", "bf16"):
        yield Build(
            f"add_splits -> {buffer}",
            _add_splits_kernel,
            {"g_ptr": f"*{buffer}", "partial_ptr": "*fp32", "flags_ptr": "*i32", "flags": "i32", "scale": "fp32"}
            | {"m": "i32", "n": "i32", "splits": "i32", "stride_gm": "i64", "stride_gn": "i64"},
            {"BLOCK": _ADD_BLOCK, "FLAGS": _FLAGS, "WIDEN": False},
        )
