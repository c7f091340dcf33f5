"""What every kernel file shares: how kernels run here, kinds of devices, flags, and split sums.

With `TRITON_INTERPRET=1` set before Triton is imported, kernels run on the CPU, one program after another. Arithmetic
on bfloat16 values is silently wrong there, so kernels take a constant WIDEN that makes loaded values float32 first.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# float32 operands go through tensor cores as three tf32 products each, whose sum is as good as one float32 product
# (one tf32 product would keep 10 bits); half types ignore this.
PRECISION = "tf32x3"

# For every launch: a multiplication and the addition that follows it become one instruction with one rounding. No
# kernel needs that they do not. Triton's default changes with 3.10, and 3.9 warns those who do not say.
FUSED = {"enable_fp_fusion": True}


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability, such as 90; under the interpreter that of an H200."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors. The interpreter has few, so that small shapes are split as large ones are on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def blocks_of(size: int, block: int) -> int:
    """size / block, rounded up (`triton.cdiv` takes the host five microseconds)."""
    return -(-size // block)


# Operands whose rows are not contiguous, or no multiples of 16 long or apart: loads are then narrow, on every device.
RAGGED = 0


def family_of(*operands: Tensor) -> int:
    """Which entry of a kernel's table of block sizes the operands take: 80, 90, 100, or RAGGED.

    Consumer cards have the 99 KiB of shared memory of 86 and 89, into which the entries of 80 fit.
    """
    if not all(t.stride(-1) == 1 and t.shape[-1] % 16 == 0 and t.stride(-2) % 16 == 0 for t in operands):
        return RAGGED
    arch = arch_of(operands[0].device)
    return 80 if arch < 90 or arch >= 120 else 90 if arch < 100 else 100


def splits_for(programs: int, steps: int, device: torch.device) -> int:
    """Into how many parts to cut a sum of `steps` blocks, so that `programs` x parts keep the device busy.

    A power of two, and at least four blocks in each part, so that the partial sums stay cheap beside the products.
    """
    splits = 1
    while programs * splits < processors(device) and 8 * splits <= steps and splits < 64:
        splits *= 2
    return splits


@triton.jit
def all_set(flags_ptr, count, FLAGS: tl.constexpr):
    """Are all `count` flags, at most FLAGS, one? A bool.

    It enters a mask by `tl.where(bool, size, 0)` in place of a size: the interpreter of Triton 3.9 makes an integer
    of `mask & bool`, and accepts none.
    """
    offsets = tl.arange(0, FLAGS)
    return tl.min(tl.load(flags_ptr + offsets, mask=offsets < count, other=1), axis=0) != 0


@triton.jit
def rounded(value, pointer, WIDEN: tl.constexpr):
    """`value` float32 in the element type of `pointer`, to nearest; to bfloat16 the interpreter only cuts bits off."""
    if WIDEN:
        if pointer.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _sum_splits_kernel(partial_ptr, out_ptr, total, SPLITS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    """out[i] = partial[0, i] + ... + partial[SPLITS - 1, i], always in this order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < total
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    pointers = partial_ptr + offsets
    for _ in range(SPLITS):
        sums += tl.load(pointers, mask=inside, other=0.0)
        pointers += total
    tl.store(out_ptr + offsets, rounded(sums, out_ptr, WIDEN), mask=inside)


_SUM_BLOCK = 1024


def sum_splits(partial: Tensor, out: Tensor) -> Tensor:
    """out = partial.sum(0) for contiguous partial (splits, *out.shape) float32, in fixed order."""
    total = out.numel()
    if total:
        _sum_splits_kernel[(blocks_of(total, _SUM_BLOCK),)](
            partial, out, total, SPLITS=partial.shape[0], BLOCK=_SUM_BLOCK, WIDEN=INTERPRETED, **FUSED
        )
    return out
