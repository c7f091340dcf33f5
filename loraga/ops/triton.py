"""CUDA devices: each op runs its Triton kernel, unless `selection` says that torch runs it.

Triton and the kernels are imported when a kernel is used for the first time.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from loraga.ops import first_use, reference
from loraga.ops.calibration import stored
from loraga.ops.declared import implement
from loraga.ops.device_facts import facts_of
from loraga.ops.selection import TORCH, Selection

# op: (file of loraga/kernels, launcher)
LAUNCHERS = {
    "test_matrix_": ("random", "fill"),
    "basis": ("basis", "basis"),
    "commit_": ("commit", "commit"),
    "accumulate_": ("accumulate", "accumulate"),
    "subspace": ("subspace", "subspace"),
}


def launcher(op: str) -> Any:
    """The function that launches the kernels of `op`."""
    family, name = LAUNCHERS[op]
    return getattr(importlib.import_module(f"loraga.kernels.{family}"), name)


def _problem(op: str, device: torch.device) -> str:
    with torch.cuda.device(device):
        return first_use.problem(op, lambda *args: launcher(op)(*args), device)


selection = Selection(LAUNCHERS, _problem, facts_of, stored)


def run(op: str, device: torch.device, *args: Any) -> Any:
    """The result of `op` by its kernel, or by torch where that is chosen or the kernel cannot be launched.

    A launcher writes to its operands in its last launch only, and the errors that are caught come before the start of
    a launch. So the operands are untouched when torch takes over.
    """
    if selection.chosen(op, device).runs == TORCH:
        return getattr(reference, op)(*args)
    try:
        return launcher(op)(*args)
    except Exception as error:
        if not _before_the_start(error) or not selection.gives_up(op, device, error):
            raise
    return getattr(reference, op)(*args)


def _before_the_start(error: Exception) -> bool:
    try:
        from loraga.kernels.launch_errors import BEFORE_THE_START
    except ImportError:  # there is no Triton, which is what `error` says
        return False
    return isinstance(error, BEFORE_THE_START)


def _register(op: str) -> None:
    @implement(op, "CUDA")
    def on_cuda(*args: Any) -> Any:
        device = args[0].device
        with torch.cuda.device(device):  # Triton launches on the current device
            return run(op, device, *args)


for _op in LAUNCHERS:
    _register(_op)
