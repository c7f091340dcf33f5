"""CUDA devices: each op runs its Triton kernel where that was measured to be faster, else plain torch.

Triton and the kernels are imported when a kernel is picked for the first time. Where Triton does not work, plain torch
runs every op.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch

from loraga.kernels import choice
from loraga.ops import reference
from loraga.ops.declared import implement

# op: (file of loraga/kernels, launcher, how many of the first arguments are the large ones)
LAUNCHERS = {
    "test_matrix_": ("random", "fill", 1),
    "commit_": ("commit", "commit", 2),
    "accumulate_": ("accumulate", "accumulate", 3),
    "basis": ("basis", "basis", 1),
    "subspace": ("subspace", "subspace", 1),
}


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launcher_for(op: str, large: tuple[torch.Tensor, ...], arch: int) -> Any:
    """The kernel launcher for these operands on compute capability `arch`, or the reference where that is faster.

    `arch` is 10 · major + minor. The table of measurements is indexed by the bits per number of the last operand: for
    `accumulate_`, whose first operand is the buffer, these are the bits of x and dy.
    """
    if not choice.picks(op, arch, large[-1], choice.work(*large)) or not _works(large[-1].device):
        return getattr(reference, op)
    family, launcher, _ = LAUNCHERS[op]
    return getattr(importlib.import_module(f"loraga.kernels.{family}"), launcher)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton can build and launch a kernel on `device`: it needs a C compiler, for example.

    If not, the first call warns with the reason.
    """
    try:
        from loraga.kernels import random

        random.fill(torch.empty(4, device=device), 0)
    except Exception as error:
        if choice.forced():
            raise
        warnings.warn(
            f"Triton cannot run kernels on {device} ({type(error).__name__}: {error}); loraga takes torch operations "
            "there. LORAGA_TRITON=0 does so without trying, LORAGA_TRITON=1 shows the whole error.",
            stacklevel=2,
        )
        return False
    return True


def _register(op: str) -> None:
    count = LAUNCHERS[op][2]

    @implement(op, "CUDA")
    def run(*args: Any) -> Any:
        device = args[0].device
        with torch.cuda.device(device):  # Triton launches on the current device
            return launcher_for(op, args[:count], _arch(device))(*args)


for _op in LAUNCHERS:
    _register(_op)
