"""Products of a large matrix with a thin one: A B and Aᵀ P, batched, A read once.

    project:  out (T, k) = A (T, n) · B (n, k)                    P = X V,  R = dY Q,  Y = G V
    fold:     out (m, k) = scale · A (T, m)ᵀ · P (T, k) + L · M    Y = dYᵀ P + Q (Z V),  Zᵀ = Xᵀ R + Z_oldᵀ Cᵀ,  Gᵀ Q

They are the streaming update (docs/architecture.md) and, with A = G, the passes of randomized subspace iteration
(Halko, Martinsson, Tropp 2011, algorithm 4.4). What cuBLAS cannot do in the same launch: B drawn from the counter-based
stream as it is used (the first product of the range finder needs no test matrix in memory), the sum so far added and
the scale applied while the result is in registers, half operands with float32 results, and a long sum cut into parts
that are added in a fixed order (no atomics: the same bits in every run). A program holds 128 or 256 columns of the thin
operand, so A is read once for every so many of them, at the speed of memory.

Operands are of one dtype, products are exact in float32 (float32 operands: three tf32 products), sums are float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels import tuning
from loraga.kernels.common import (
    DTYPES,
    INTERPRETED,
    PRECISION,
    Build,
    arch_of,
    is_aligned,
    rounded,
    splits_for,
    sum_splits,
)
from loraga.kernels.random import uniform_block


@triton.jit
def _project_kernel(
    a_ptr,
    b_ptr,
    seeds_ptr,
    out_ptr,
    T,
    n,
    k,
    splits,
    stride_ab,
    stride_at,
    stride_an,
    stride_bb,
    stride_bn,
    stride_bk,
    stride_os,
    stride_ob,
    stride_ot,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DRAW: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split] = A[:, part of split] · B[part of split, :]; with DRAW, B[j, c] is number j·k + c of the stream."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1) % splits
    columns = (tl.program_id(1) // splits) * BLOCK_K + tl.arange(0, BLOCK_K)
    batch = tl.program_id(2).to(tl.int64)
    a_ptr += batch * stride_ab + rows[:, None] * stride_at
    b_ptr += batch * stride_bb + columns[None, :] * stride_bk
    inside_rows = rows[:, None] < T
    inside_columns = columns[None, :] < k
    if DRAW:
        seed = tl.load(seeds_ptr + batch)
    sums = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    # every split takes each `splits`-th block: nearly the same work for all, whatever n is
    for start in range(part * BLOCK_N, n, splits * BLOCK_N):
        inner = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        a = tl.load(a_ptr + inner[None, :] * stride_an, mask=inside_rows & (inner[None, :] < n), other=0.0)
        inside = (inner[:, None] < n) & inside_columns
        if DRAW:
            drawn = uniform_block(seed, inner, tl.program_id(1) // splits * BLOCK_K, k, BLOCK_K)
            b = tl.where(inside, drawn, 0.0)
            if not WIDEN:
                b = b.to(a_ptr.dtype.element_ty)
        else:
            b = tl.load(b_ptr + inner[:, None] * stride_bn, mask=inside, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    out_ptr += part.to(tl.int64) * stride_os + batch * stride_ob
    out = out_ptr + rows[:, None] * stride_ot + columns[None, :]
    tl.store(out, rounded(sums, out_ptr, WIDEN), mask=inside_rows & inside_columns)


@triton.jit
def _add_product(
    sums,
    left_rows,
    inside_rows,
    stride_li,
    right_columns,
    inside_columns,
    stride_ri,
    inner_size,
    BLOCK_I: tl.constexpr,
):
    """sums + L · M for the rows of L and columns of M that the pointers name, with inner_size terms each."""
    for start in range(0, inner_size, BLOCK_I):
        inner = (start + tl.arange(0, BLOCK_I)).to(tl.int64)
        left = tl.load(
            left_rows + inner[None, :] * stride_li, mask=inside_rows & (inner[None, :] < inner_size), other=0.0
        )
        right = tl.load(
            right_columns + inner[:, None] * stride_ri, mask=(inner[:, None] < inner_size) & inside_columns, other=0.0
        )
        sums = tl.dot(left, right, sums, input_precision="tf32x3")
    return sums


@triton.jit
def _fold_kernel(
    a_ptr,
    p_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    scale,
    T,
    m,
    k,
    inner_size,
    splits,
    stride_ab,
    stride_at,
    stride_am,
    stride_pb,
    stride_pt,
    stride_lm,
    stride_li,
    stride_ri,
    stride_rk,
    stride_os,
    stride_ob,
    stride_om,
    stride_ok,
    k_right,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ONTO: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split] = scale · A[part of split, :]ᵀ · P[part of split, :], and L · M besides in the first split (ONTO).

    L (m, inner_size) and M (inner_size, k_right), k_right <= k: columns beyond k_right get nothing from it.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1) % splits
    columns = (tl.program_id(1) // splits) * BLOCK_K + tl.arange(0, BLOCK_K)
    batch = tl.program_id(2).to(tl.int64)
    a_ptr += batch * stride_ab + rows[None, :] * stride_am
    p_ptr += batch * stride_pb + columns[None, :]
    inside_columns = columns[None, :] < k
    sums = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(part * BLOCK_T, T, splits * BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = tokens[:, None] < T
        a = tl.load(a_ptr + tokens[:, None] * stride_at, mask=inside & (rows[None, :] < m), other=0.0)
        p = tl.load(p_ptr + tokens[:, None] * stride_pt, mask=inside & inside_columns, other=0.0)
        if WIDEN:
            a, p = a.to(tl.float32), p.to(tl.float32)
        sums = tl.dot(tl.trans(a), p, sums, input_precision=PRECISION)
    sums *= scale
    if ONTO:
        if part == 0:
            sums = _add_product(
                sums,
                left_ptr + rows[:, None] * stride_lm,
                rows[:, None] < m,
                stride_li,
                right_ptr + columns[None, :] * stride_rk,
                columns[None, :] < k_right,
                stride_ri,
                inner_size,
                BLOCK_I,
            )
    out_ptr += part.to(tl.int64) * stride_os + batch * stride_ob
    out = out_ptr + rows[:, None] * stride_om + columns[None, :].to(tl.int64) * stride_ok
    tl.store(out, rounded(sums, out_ptr, WIDEN), mask=(rows[:, None] < m) & inside_columns)


def project(
    a: Tensor,
    b: Tensor | None,
    *,
    out_dtype: torch.dtype = torch.float32,
    seeds: Sequence[int] = (),
    k: int = 0,
) -> Tensor:
    """A B: (b, T, k) of `out_dtype` for a (b, T, n) with any strides and b (b, n, k) of a's dtype.

    With b None the thin operand is drawn: entry (j, c) for matrix i is number j·k + c of the stream `seeds[i]`
    (`loraga.ops.declared.test_matrix_`), rounded to a's dtype; k must then be a multiple of 4.
    """
    batches, tokens, n = a.shape
    k = b.shape[2] if b is not None else k
    if b is None and (k % 4 or n * k > 2**32 or len(seeds) != batches):
        raise ValueError(f"drawing needs k a multiple of 4, at most 2**32 numbers and a seed each, not {k=}, {n=}")
    operands = (a,) if b is None else (a, b)
    arch = arch_of(a.device) if is_aligned(*operands) else None
    config = tuning.config("draw" if b is None else "project", a.dtype, arch, columns=k)
    programs, blocks = triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(k, config["BLOCK_K"])
    splits = splits_for(programs * blocks * batches, triton.cdiv(n, config["BLOCK_N"]), a.device)
    out = torch.empty(batches, tokens, k, dtype=out_dtype, device=a.device)
    partial = torch.empty(splits, batches, tokens, k, device=a.device) if splits > 1 else out[None]
    drawn = torch.tensor(seeds, dtype=torch.int64, device=a.device) if b is None else a
    thin = a if b is None else b
    if out.numel():
        _project_kernel[(programs, splits * blocks, batches)](
            a,
            thin,
            drawn,
            partial,
            tokens,
            n,
            k,
            splits,
            *a.stride(),
            *thin.stride(),
            *partial.stride()[:3],
            DRAW=b is None,
            WIDEN=INTERPRETED,
            PRECISION=PRECISION,
            **config,
        )
    return sum_splits(partial, out) if splits > 1 else out


def fold(
    a: Tensor,
    p: Tensor,
    *,
    scale: float = 1.0,
    onto: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Tensor:
    """scale · Aᵀ P + L M: (b, m, k) float32, or (b, k, m) if `transposed`.

    a (b, T, m) with any strides, p (b, T, k) of a's dtype with rows contiguous; `onto` = (L (m, i), M (i, k')) float32
    with any strides, k' <= k, for one matrix (b = 1).
    """
    batches, tokens, m = a.shape
    k = p.shape[2]
    p = p if p.stride(2) == 1 else p.contiguous()
    config = tuning.config("fold", a.dtype, arch_of(a.device) if is_aligned(a, p) else None, columns=k)
    programs, blocks = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(k, config["BLOCK_K"])
    splits = splits_for(programs * blocks * batches, triton.cdiv(tokens, config["BLOCK_T"]), a.device)
    shape = (batches, k, m) if transposed else (batches, m, k)
    out = torch.empty(shape, dtype=torch.float32, device=a.device)
    partial = torch.empty(splits, *shape, device=a.device) if splits > 1 else out[None]
    stride_os, stride_ob, stride_om, stride_ok = partial.stride()
    if transposed:
        stride_om, stride_ok = stride_ok, stride_om
    left, right = onto if onto is not None else (partial.view(1, -1), partial.view(1, -1))
    if out.numel():
        _fold_kernel[(programs, splits * blocks, batches)](
            a,
            p,
            left,
            right,
            partial,
            scale,
            tokens,
            m,
            k,
            left.shape[1],
            splits,
            *a.stride(),
            p.stride(0),
            p.stride(1),
            *left.stride(),
            *right.stride(),
            stride_os,
            stride_ob,
            stride_om,
            stride_ok,
            right.shape[1],
            ONTO=onto is not None,
            WIDEN=INTERPRETED,
            PRECISION=PRECISION,
            **config,
        )
    return sum_splits(partial, out) if splits > 1 else out


def project_reference(a: Tensor, b: Tensor) -> Tensor:
    """A B in float64."""
    return a.double() @ b.double()


def fold_reference(a: Tensor, p: Tensor, scale: float = 1.0, onto: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """scale · Aᵀ P + L M in float64."""
    out = scale * (a.double().mT @ p.double())
    if onto is not None:
        out[..., : onto[1].shape[1]] += onto[0].double() @ onto[1].double()
    return out


def builds(arch: int) -> Iterator[Build]:
    for name in ("bf16", "fp32"):
        dtype = DTYPES[name]
        for table in (arch, None):
            for kernel, outs in (("draw", ["fp32"]), ("project", sorted({name, "fp32"}))):
                for columns, config in tuning.entries(kernel, dtype, table):
                    for out in outs:
                        label = f"{kernel} {columns} {name} -> {out}"
                        yield _project_build(label, name, out, kernel == "draw", config, table is not None)
            for columns, config in tuning.entries("fold", dtype, table):
                for onto in (False, True):
                    label = f"fold {columns} {name}{' onto a sum' if onto else ''}"
                    yield _fold_build(label, name, onto, config, table is not None)


def _project_build(label: str, name: str, out: str, draw: bool, config: dict[str, int], aligned: bool) -> Build:
    strides = tuple(f"stride_{s}" for s in ["ab", "at", "an", "bb", "bn", "bk", "os", "ob", "ot"])
    ones = {"stride_an": 1, "stride_bk": 1} if aligned else {}
    return Build(
        label if aligned else f"{label}, ragged",
        _project_kernel,
        {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "seeds_ptr": "*i64", "out_ptr": f"*{out}"}
        | dict.fromkeys(("T", "n", "k", "splits"), "i32")
        | dict.fromkeys(strides, "i64"),
        ones | {"DRAW": draw, "WIDEN": False, "PRECISION": PRECISION},
        config,
        ("n", "k", *strides) if aligned else (),
    )


def _fold_build(label: str, name: str, onto: bool, config: dict[str, int], aligned: bool) -> Build:
    strides = tuple(
        f"stride_{s}" for s in ["ab", "at", "am", "pb", "pt", "lm", "li", "ri", "rk", "os", "ob", "om", "ok"]
    )
    return Build(
        label if aligned else f"{label}, ragged",
        _fold_kernel,
        {"a_ptr": f"*{name}", "p_ptr": f"*{name}", "left_ptr": "*fp32", "right_ptr": "*fp32", "out_ptr": "*fp32"}
        | {"scale": "fp32"}
        | dict.fromkeys(("T", "m", "k", "inner_size", "splits", "k_right"), "i32")
        | dict.fromkeys(strides, "i64"),
        ({"stride_am": 1} if aligned else {}) | {"ONTO": onto, "WIDEN": False, "PRECISION": PRECISION},
        config,
        ("m", "k", "inner_size", "k_right", *strides) if aligned else (),
    )
