"""What every kernel file shares: how kernels run here, what is compiled ahead of time, and split sums.

With `TRITON_INTERPRET=1` set before Triton is imported, kernels run on the CPU, one program after another. Arithmetic
on bfloat16 values is silently wrong there, so kernels take a constant WIDEN that makes loaded values float32 first.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# float32 operands go through tensor cores as three tf32 products each, whose sum is as good as one float32 product
# (one tf32 product would keep 10 bits); half types ignore this.
PRECISION = "tf32x3"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Build:
    """One kernel as the launcher may call it, to be compiled ahead of time.

    `signature` names the type of every argument that is no constant; `config` is an entry of the tuning table: block
    sizes, num_warps and num_stages. Triton compiles anew where integers are multiples of 16; `multiples` names those
    that are, as in nearly all models.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: dict[str, int] = field(default_factory=dict)
    multiples: tuple[str, ...] = ()


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


def is_aligned(*operands: Tensor) -> bool:
    """Are rows contiguous, multiples of 16 long and apart? Loads are then wide and run ahead of their use."""
    return all(t.stride(-1) == 1 and t.shape[-1] % 16 == 0 and t.stride(-2) % 16 == 0 for t in operands)


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
    """Are all `count` flags, at most FLAGS, one? A bool."""
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
    for split in range(SPLITS):
        sums += tl.load(partial_ptr + split * total + offsets, mask=inside, other=0.0)
    tl.store(out_ptr + offsets, rounded(sums, out_ptr, WIDEN), mask=inside)


_SUM_BLOCK = 1024


def sum_splits(partial: Tensor, out: Tensor) -> Tensor:
    """out = partial.sum(0) for contiguous partial (splits, *out.shape) float32, in fixed order."""
    total = out.numel()
    if total:
        _sum_splits_kernel[(triton.cdiv(total, _SUM_BLOCK),)](
            partial, out, total, SPLITS=partial.shape[0], BLOCK=_SUM_BLOCK, WIDEN=INTERPRETED
        )
    return out


def sum_builds() -> list[Build]:
    return [
        Build(
            f"sum_splits {splits} {out}",
            _sum_splits_kernel,
            {"partial_ptr": "*fp32", "out_ptr": f"*{out}", "total": "i64"},
            {"SPLITS": splits, "BLOCK": _SUM_BLOCK, "WIDEN": False},
        )
        for splits in (2, 64)
        for out in ("fp32", "bf16")
    ]
