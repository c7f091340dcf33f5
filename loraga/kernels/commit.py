"""The end of a streaming update: take over the new state if all of it is finite, keep the old one otherwise.

    finite = all entries of Y and Z' are finite
    Q, Z, probed  <-  Q', Z', probed + Y[:, k:]   if finite

Two launches and no wait for the host: flags per program, then the copy, each program of which reads all flags.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.accumulate import all_set
from loraga.kernels.common import Build
from loraga.ops import reference

commit_reference = reference.commit_

_FLAGS = 1024
_BLOCK = 1024


@triton.jit
def _finite_kernel(left_ptr, z_ptr, flags_ptr, left_size, z_size, BLOCK: tl.constexpr):
    """flags[program] = are its blocks of two contiguous arrays free of NaN and Inf?"""
    finite = tl.full((BLOCK,), 1, dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, left_size, tl.num_programs(0) * BLOCK):
        offsets = (start + tl.arange(0, BLOCK)).to(tl.int64)
        value = tl.load(left_ptr + offsets, mask=offsets < left_size, other=0.0)
        finite = tl.where(tl.abs(value) < float("inf"), finite, 0)  # false for NaN too
    for start in range(tl.program_id(0) * BLOCK, z_size, tl.num_programs(0) * BLOCK):
        offsets = (start + tl.arange(0, BLOCK)).to(tl.int64)
        value = tl.load(z_ptr + offsets, mask=offsets < z_size, other=0.0)
        finite = tl.where(tl.abs(value) < float("inf"), finite, 0)
    tl.store(flags_ptr + tl.program_id(0), tl.min(finite, axis=0))


@triton.jit
def _commit_kernel(
    q_ptr,
    z_ptr,
    probed_ptr,
    new_q_ptr,
    new_z_ptr,
    left_ptr,
    flags_ptr,
    finite_ptr,
    flags,
    q_size,
    z_size,
    probed_size,
    k,
    probes,
    stride_lm,
    stride_lk,
    BLOCK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    keep = all_set(flags_ptr, flags, FLAGS)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets < q_size) & keep
    tl.store(q_ptr + offsets, tl.load(new_q_ptr + offsets, mask=inside, other=0.0), mask=inside)
    inside = (offsets < z_size) & keep
    tl.store(z_ptr + offsets, tl.load(new_z_ptr + offsets, mask=inside, other=0.0), mask=inside)
    inside = (offsets < probed_size) & keep
    left = left_ptr + (offsets // probes) * stride_lm + (k + offsets % probes) * stride_lk
    total = tl.load(probed_ptr + offsets, mask=inside, other=0.0) + tl.load(left, mask=inside, other=0.0)
    tl.store(probed_ptr + offsets, total, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(finite_ptr, keep.to(tl.int8))


def commit(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    """See `ops.declared.commit_`. All float32; q, z, probed, new_q and new_z contiguous, left dense in either order."""
    if not left.is_contiguous() and not left.t().is_contiguous():
        left = left.contiguous()
    largest = max(left.numel(), new_z.numel())
    programs = max(1, min(_FLAGS, triton.cdiv(largest, _BLOCK)))
    flags = torch.empty(programs, dtype=torch.int32, device=q.device)
    finite = torch.empty((), dtype=torch.int8, device=q.device)
    _finite_kernel[(programs,)](left, new_z, flags, left.numel(), new_z.numel(), BLOCK=_BLOCK)
    k, probes = q.shape[1], probed.shape[1]
    blocks = triton.cdiv(max(q.numel(), z.numel(), probed.numel(), 1), _BLOCK)
    _commit_kernel[(blocks,)](
        q,
        z,
        probed,
        new_q,
        new_z,
        left,
        flags,
        finite,
        programs,
        q.numel(),
        z.numel(),
        probed.numel(),
        k,
        max(probes, 1),
        *left.stride(),
        BLOCK=_BLOCK,
        FLAGS=_FLAGS,
    )
    return finite.view(torch.bool)


def builds(arch: int) -> Iterator[Build]:
    yield Build(
        "commit: finite",
        _finite_kernel,
        {"left_ptr": "*fp32", "z_ptr": "*fp32", "flags_ptr": "*i32", "left_size": "i32", "z_size": "i32"},
        {"BLOCK": _BLOCK},
    )
    arrays = ["q_ptr", "z_ptr", "probed_ptr", "new_q_ptr", "new_z_ptr", "left_ptr"]
    sizes = ["flags", "q_size", "z_size", "probed_size", "k", "probes"]
    yield Build(
        "commit",
        _commit_kernel,
        dict.fromkeys(arrays, "*fp32")
        | {"flags_ptr": "*i32", "finite_ptr": "*i8"}
        | dict.fromkeys(sizes, "i32")
        | {"stride_lm": "i64", "stride_lk": "i64"},
        {"BLOCK": _BLOCK, "FLAGS": _FLAGS},
    )
