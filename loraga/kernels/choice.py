"""Which implementation a CUDA device gets: a kernel only where it was measured to win.

wins.json maps an op, a compute capability and the bits of its operands to ranges of work (bytes moved) in which the
kernel beat the best composition of torch and cuBLAS; `benchmarks/roofline.py` measures and writes it. What was not
measured is not picked. LORAGA_TRITON=1 picks the kernels always, LORAGA_TRITON=0 never.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

TABLE = Path(__file__).with_name("wins.json")


@functools.cache
def wins() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def forced() -> bool | None:
    """What LORAGA_TRITON says; None where it is unset.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("LORAGA_TRITON", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LORAGA_TRITON={value!r} is not known; set it to 0 or 1, or leave it unset.")
    return None if value == "" else value == "1"


def work(*operands: Tensor) -> int:
    """Bytes that an op has to move at least."""
    return sum(t.numel() * t.element_size() for t in operands)


def picks(op: str, arch: int, operand: Tensor, moved: int) -> bool:
    """Is the kernel for `op` to be used on compute capability `arch`, for operands as `operand` and `moved` bytes?"""
    choice = forced()
    if choice is not None:
        return choice
    ranges = wins().get(op, {}).get(str(arch), {}).get(str(8 * operand.element_size()), [])
    return any(low <= moved <= high for low, high in ranges)
