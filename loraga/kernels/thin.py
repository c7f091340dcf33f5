"""Products of a large matrix with a thin one: A B and Aᵀ P, batched, A read once.

    project:  out (m, k) = A (m, n) · B (n, k)         Y = G Ω,  Y = G V
    fold:     out (n, k) = A (m, n)ᵀ · P (m, k)        Gᵀ Q

They are the passes of randomized subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4). What cuBLAS cannot
do in the same launch: B drawn from the counter-based stream as it is used (the first product needs no test matrix in
memory), half operands with float32 results, and a long sum cut into parts that are added in a fixed order (no atomics:
the same bits in every run). A program holds up to 128 or 256 columns of the thin operand, so A is read once for every
so many of them.

Operands are of one dtype, products are exact in float32 (float32 operands: three tf32 products), sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.common import (
    FUSED,
    INTERPRETED,
    PRECISION,
    RAGGED,
    blocks_of,
    family_of,
    rounded,
    splits_for,
    sum_splits,
)
from loraga.kernels.random import uniform_block

# Block sizes by bits of an operand and family of devices, then by columns of the thin operand (up to; the last entry
# takes more of them, too).
_Table = dict[tuple[int, int], dict[int, dict[str, int]]]


def _blocks(*sizes: int) -> dict[str, int]:
    names = ("BLOCK_OUT", "BLOCK_IN", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, sizes, strict=True))


_PROJECT: _Table = {
    (16, 80): {64: _blocks(128, 64, 64, 8, 3), 128: _blocks(128, 64, 128, 8, 3), 256: _blocks(64, 32, 256, 8, 3)},
    (16, 90): {64: _blocks(128, 64, 64, 8, 4), 128: _blocks(128, 64, 128, 8, 4), 256: _blocks(64, 64, 256, 8, 4)},
    (16, 100): {64: _blocks(128, 64, 64, 4, 3), 128: _blocks(128, 64, 128, 8, 4), 256: _blocks(64, 64, 256, 8, 4)},
    (16, RAGGED): {64: _blocks(64, 32, 64, 4, 2), 128: _blocks(64, 32, 128, 8, 2)},
    (32, 80): {64: _blocks(64, 16, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, 90): {64: _blocks(64, 32, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, 100): {64: _blocks(64, 32, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, RAGGED): {64: _blocks(64, 16, 64, 4, 2), 128: _blocks(32, 32, 128, 8, 2)},
}
_DRAW: _Table = {
    (16, 80): {64: _blocks(128, 64, 64, 8, 3), 128: _blocks(128, 64, 128, 8, 3), 256: _blocks(64, 32, 256, 8, 3)},
    (16, 90): {64: _blocks(128, 64, 64, 8, 3), 128: _blocks(128, 64, 128, 8, 3), 256: _blocks(64, 32, 256, 8, 3)},
    (16, 100): {64: _blocks(128, 32, 64, 8, 3), 128: _blocks(128, 64, 128, 8, 3), 256: _blocks(64, 32, 256, 8, 3)},
    (16, RAGGED): {64: _blocks(64, 16, 64, 8, 2), 128: _blocks(64, 16, 128, 8, 2)},
    (32, 80): {64: _blocks(32, 32, 64, 4, 3), 128: _blocks(64, 16, 128, 8, 3), 256: _blocks(32, 16, 256, 8, 2)},
    (32, 90): {64: _blocks(32, 32, 64, 4, 3), 128: _blocks(64, 16, 128, 8, 3), 256: _blocks(32, 16, 256, 8, 2)},
    (32, 100): {64: _blocks(32, 32, 64, 4, 3), 128: _blocks(64, 16, 128, 8, 3), 256: _blocks(32, 16, 256, 8, 2)},
    (32, RAGGED): {64: _blocks(64, 16, 64, 8, 2), 128: _blocks(64, 16, 128, 8, 2)},
}
_FOLD: _Table = {
    (16, 80): {64: _blocks(128, 64, 64, 8, 3), 128: _blocks(128, 32, 128, 8, 3)},
    (16, 90): {64: _blocks(128, 64, 64, 8, 4), 128: _blocks(128, 64, 128, 8, 4)},
    (16, 100): {64: _blocks(128, 64, 64, 4, 4), 128: _blocks(128, 64, 128, 8, 4)},
    (16, RAGGED): {64: _blocks(64, 32, 64, 4, 2), 128: _blocks(32, 32, 128, 4, 2)},
    (32, 80): {64: _blocks(64, 16, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, 90): {64: _blocks(64, 32, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, 100): {64: _blocks(64, 32, 64, 4, 3), 128: _blocks(64, 32, 128, 8, 3), 256: _blocks(32, 32, 256, 8, 2)},
    (32, RAGGED): {64: _blocks(64, 32, 64, 8, 2), 128: _blocks(32, 32, 128, 8, 2)},
}


def _config(table: _Table, k: int, *operands: Tensor) -> dict[str, int]:
    entries = table[8 * operands[0].element_size(), family_of(*operands)]
    return entries[min((columns for columns in entries if columns >= k), default=max(entries))]


@triton.jit
def _thin_kernel(
    a_ptr,
    b_ptr,
    seeds_ptr,
    partial_ptr,
    rows,
    inner_size,
    k,
    splits,
    stride_ab,
    stride_ao,
    stride_ai,
    stride_bb,
    stride_bi,
    stride_bk,
    stride_ps,
    stride_pb,
    stride_po,
    stride_pk,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DRAW: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split] = A[:, part of split] · B[part of split, :], A (rows, inner_size) with any strides.

    DRAW: B[j, c] is number j·k + c of the stream.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(1) % splits
    first = tl.program_id(1) // splits * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    batch = tl.program_id(2).to(tl.int64)
    inner = tl.arange(0, BLOCK_IN)
    at = (part * BLOCK_IN + inner).to(tl.int64)
    a_ptrs = a_ptr + batch * stride_ab + out[:, None].to(tl.int64) * stride_ao + at[None, :] * stride_ai
    a_step = tl.cast(splits, tl.int64) * BLOCK_IN * stride_ai
    if DRAW:
        seed = tl.load(seeds_ptr + batch)
    else:
        b_ptrs = b_ptr + batch * stride_bb + at[:, None] * stride_bi + columns[None, :].to(tl.int64) * stride_bk
        b_step = tl.cast(splits, tl.int64) * BLOCK_IN * stride_bi
    sums = tl.zeros((BLOCK_OUT, BLOCK_K), dtype=tl.float32)
    # every split takes each `splits`-th block: nearly the same work for all, whatever the size is
    for start in range(part * BLOCK_IN, inner_size, splits * BLOCK_IN):
        inside = inner < inner_size - start
        a = tl.load(a_ptrs, mask=(out < rows)[:, None] & inside[None, :], other=0.0)
        a_ptrs += a_step
        if DRAW:
            b = uniform_block(seed, start + inner, first, k, BLOCK_K)
            b = rounded(tl.where(inside[:, None] & (columns < k)[None, :], b, 0.0), a_ptr, WIDEN)
        else:
            b = tl.load(b_ptrs, mask=inside[:, None] & (columns < k)[None, :], other=0.0)
            b_ptrs += b_step
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    partial_ptr += part.to(tl.int64) * stride_ps + batch * stride_pb
    pointers = partial_ptr + out[:, None].to(tl.int64) * stride_po + columns[None, :].to(tl.int64) * stride_pk
    tl.store(pointers, sums, mask=(out < rows)[:, None] & (columns < k)[None, :])


def project(a: Tensor, b: Tensor | None, *, seeds: Sequence[int] = (), k: int = 0) -> Tensor:
    """A B: (b, m, k) float32 for a (b, m, n) with any strides and b (b, n, k) of a's dtype.

    With b None the thin operand is drawn: entry (j, c) for matrix i is number j·k + c of the stream `seeds[i]`
    (`loraga.ops.declared.test_matrix_`), rounded to a's dtype; k must then be a multiple of 4.

    Raises:
        ValueError: the thin operand cannot be drawn.
    """
    if b is not None:
        return _product(_config(_PROJECT, b.shape[2], a, b), a, b, b, b.shape[2])
    n = a.shape[2]
    if k % 4 or n * k > 2**32 or len(seeds) != len(a):
        raise ValueError(f"drawing needs k a multiple of 4, at most 2**32 numbers and a seed each, not {k=}, {n=}")
    # not `torch.tensor(..., device=...)`, which waits for everything that is queued on the device
    drawn = torch.tensor(seeds, dtype=torch.int64).to(a.device, non_blocking=True)
    return _product(_config(_DRAW, k, a), a, None, drawn, k)


def fold(a: Tensor, p: Tensor, *, transposed: bool = False) -> Tensor:
    """Aᵀ P: (b, n, k) float32, or (b, k, n) if `transposed`, for a (b, m, n), p (b, m, k) of one dtype, any strides."""
    return _product(_config(_FOLD, p.shape[2], a, p), a.mT, p, p, p.shape[2], transposed=transposed)


def _product(
    config: dict[str, int], a: Tensor, b: Tensor | None, seeds: Tensor, k: int, *, transposed: bool = False
) -> Tensor:
    """A B (b, rows, k) float32 in one launch, or two where the sum is cut; in memory (b, k, rows) if `transposed`."""
    batches, rows, inner_size = a.shape
    programs, blocks = blocks_of(rows, config["BLOCK_OUT"]), blocks_of(k, config["BLOCK_K"])
    splits = splits_for(programs * blocks * batches, blocks_of(inner_size, config["BLOCK_IN"]), a.device)
    shape = (batches, k, rows) if transposed else (batches, rows, k)
    out = torch.empty(shape, dtype=torch.float32, device=a.device)
    if out.numel() == 0:
        return out
    partial = torch.empty(splits, *shape, dtype=torch.float32, device=a.device) if splits > 1 else out[None]
    strides = partial.stride()
    thin = a if b is None else b
    _thin_kernel[(programs, splits * blocks, batches)](
        a,
        thin,
        seeds,
        partial,
        rows,
        inner_size,
        k,
        splits,
        *a.stride(),
        *thin.stride(),
        *((strides[0], strides[1], strides[3], strides[2]) if transposed else strides),
        DRAW=b is None,
        WIDEN=INTERPRETED,
        PRECISION=PRECISION,
        **config,
        **FUSED,
    )
    return sum_splits(partial, out) if splits > 1 else out


def project_reference(a: Tensor, b: Tensor) -> Tensor:
    """A B in float64."""
    return a.double() @ b.double()


def fold_reference(a: Tensor, p: Tensor) -> Tensor:
    """Aᵀ P in float64."""
    return a.double().mT @ p.double()
