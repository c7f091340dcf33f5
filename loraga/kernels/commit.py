"""The end of an update of a batch of layers: each takes over its new state if all of it is finite, else keeps the old.

    finite[i] = all entries of Y_i and Z'_i are finite
    Q_i, Z_i, probed_i  <-  Q'_i, Z'_i, probed_i + Y_i[:, k:]   if finite[i]

Two launches whatever the batch, and no wait for the host: flags per program, then the copy, each program of which reads
all flags of its layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.common import FUSED, all_set, blocks_of
from loraga.ops import reference

commit_reference = reference.commit_

_FLAGS = 256  # at most so many programs look for NaN and Inf in one layer
_BLOCK = 1024


@triton.jit
def _largest(largest, ptr, size, BLOCK: tl.constexpr):
    """Maximum of `largest` (BLOCK,) and those of `size` contiguous numbers, absolute, that this program meets, or NaN.

    The programs of axis 0 share the blocks.
    """
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(ptr + offsets, mask=offsets < size, other=0.0)
        largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def _finite_kernel(left_ptr, z_ptr, flags_ptr, left_size, z_size, stride_lb, BLOCK: tl.constexpr):
    """flags[layer, program] = are its blocks of Y and Z' free of NaN and Inf?"""
    layer = tl.program_id(1).to(tl.int64)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    largest = _largest(largest, left_ptr + layer * stride_lb, left_size, BLOCK)
    largest = _largest(largest, z_ptr + layer * z_size, z_size, BLOCK)
    flag = tl.min((largest < float("inf")).to(tl.int32), axis=0)  # false for NaN, too
    tl.store(flags_ptr + layer * tl.num_programs(0) + tl.program_id(0), flag)


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
    stride_lb,
    stride_lm,
    stride_lk,
    BLOCK: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Q, Z and probed of a layer, contiguous, from Q', Z' and Y; finite[layer] = was it done?"""
    layer = tl.program_id(1).to(tl.int64)
    keep = all_set(flags_ptr + layer * flags, flags, FLAGS)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.where(keep, q_size, 0)
    new_q = tl.load(new_q_ptr + layer * q_size + offsets, mask=inside, other=0.0)
    tl.store(q_ptr + layer * q_size + offsets, new_q, mask=inside)
    inside = offsets < tl.where(keep, z_size, 0)
    new_z = tl.load(new_z_ptr + layer * z_size + offsets, mask=inside, other=0.0)
    tl.store(z_ptr + layer * z_size + offsets, new_z, mask=inside)
    inside = offsets < tl.where(keep, probed_size, 0)
    row = (offsets // probes).to(tl.int64)
    column = (k + offsets % probes).to(tl.int64)
    left = left_ptr + layer * stride_lb + row * stride_lm + column * stride_lk
    probed_ptr += layer * probed_size
    total = tl.load(probed_ptr + offsets, mask=inside, other=0.0) + tl.load(left, mask=inside, other=0.0)
    tl.store(probed_ptr + offsets, total, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(finite_ptr + layer, keep.to(tl.int8))


def commit(q: Tensor, z: Tensor, probed: Tensor, new_q: Tensor, new_z: Tensor, left: Tensor) -> Tensor:
    """See `ops.declared.commit_`: (b,) bool. `left` is copied first unless every layer of it is dense in some order."""
    layers, k, probes = len(q), q.shape[2], probed.shape[2]
    finite = torch.empty(layers, dtype=torch.int8, device=q.device)
    if layers == 0:
        return finite.view(torch.bool)
    if not left[0].is_contiguous() and not left[0].t().is_contiguous():
        left = left.contiguous()
    left_size, q_size, z_size, probed_size = (t.numel() // layers for t in (left, q, z, probed))
    programs = max(1, min(_FLAGS, blocks_of(max(left_size, z_size), _BLOCK)))
    flags = torch.empty(layers, programs, dtype=torch.int32, device=q.device)
    _finite_kernel[(programs, layers)](left, new_z, flags, left_size, z_size, left.stride(0), BLOCK=_BLOCK, **FUSED)
    _commit_kernel[(max(1, blocks_of(max(q_size, z_size, probed_size), _BLOCK)), layers)](
        q,
        z,
        probed,
        new_q,
        new_z,
        left,
        flags,
        finite,
        programs,
        q_size,
        z_size,
        probed_size,
        k,
        max(probes, 1),
        *left.stride(),
        BLOCK=_BLOCK,
        FLAGS=_FLAGS,
        **FUSED,
    )
    return finite.view(torch.bool)
