"""CUDA devices: each op goes to its Triton kernel where that was measured to win, else to plain torch.

Triton and the kernels are imported when the first CUDA tensor comes; without Triton plain torch does all of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from loraga._ops import implement
from loraga.backends import default

# op: (file of loraga/kernels, launcher, how many of the first arguments are the large ones)
LAUNCHERS = {
    "test_matrix_": ("random", "fill", 1),
    "left_product": ("streaming", "left_product", 2),
    "right_product": ("streaming", "right_product", 2),
    "commit_": ("commit", "commit", 2),
    "accumulate_": ("accumulate", "accumulate", 3),
    "orthonormalize": ("orthonormalize", "orthonormalize", 1),
    "subspace": ("subspace", "subspace", 1),
}


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launcher_for(op: str, large: tuple[torch.Tensor, ...], arch: int) -> Any:
    """The kernel launcher for these operands on compute capability `arch`, or the reference where no kernel wins."""
    if importlib.util.find_spec("triton") is None:
        return getattr(default, op)
    from loraga.kernels import choice

    if not choice.picks(op, arch, large[0], choice.work(*large)):
        return getattr(default, op)
    family, launcher, _ = LAUNCHERS[op]
    return getattr(importlib.import_module(f"loraga.kernels.{family}"), launcher)


def _register(op: str) -> None:
    count = LAUNCHERS[op][2]

    @implement(op, "CUDA")
    def run(*args: Any) -> Any:
        return launcher_for(op, args[:count], _arch(args[0].device))(*args)


for _op in LAUNCHERS:
    _register(_op)
