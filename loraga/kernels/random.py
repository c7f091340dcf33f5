"""Uniform numbers from a counter-based stream: `loraga.ops.declared.test_matrix_`, filled or drawn where they are used.

Number i of stream `seed` is word i mod 4 of Philox4x32-10 (Salmon et al., SC 2011) at counter i div 4: it depends on
its position only, so block sizes and devices play no part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraga.kernels.common import FUSED, blocks_of
from loraga.ops import reference

test_matrix_reference = reference.test_matrix_
test_matrix_reference.__test__ = False  # type: ignore[attr-defined]


@triton.jit
def _uniform(words):
    """[-1, 1): the upper 24 bits are exact in float32."""
    return (words.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0


@triton.jit
def uniform_block(seed, rows, first, k, COLUMNS: tl.constexpr):
    """Numbers rows[j]·k + first + c of the stream, c < COLUMNS; k, first and COLUMNS are multiples of 4."""
    counters = rows[:, None] * (k // 4) + first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.randint4x(seed, counters.to(tl.uint32))
    return _uniform(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit(do_not_specialize=["seed"])
def _fill_kernel(out_ptr, seed, total, BLOCK: tl.constexpr):
    """out[i] = number i of the stream."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    a, b, c, d = tl.randint4x(seed, (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32))
    offsets = start + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, _uniform(tl.interleave(tl.interleave(a, c), tl.interleave(b, d))), mask=offsets < total)


_BLOCK = 1024


def fill(out: Tensor, seed: int) -> None:
    """Fill contiguous float32 `out` with the stream `seed`."""
    if out.numel():
        _fill_kernel[(blocks_of(out.numel(), _BLOCK),)](out, seed, out.numel(), BLOCK=_BLOCK, **FUSED)
