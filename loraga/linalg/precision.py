"""Contexts in which the caller's precision settings (autocast, TF32) do not change loraga's own products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_callers = ""
# torch >= 2.9 has an old and a new interface to the TF32 setting. It raises for code that mixes them, and never for
# code that uses the new one only. Before 2.9, `get_float32_matmul_precision` is the one that can return "medium", too.
_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
_EXACT = "ieee" if _NEW else "highest"
# They let cuBLAS add the parts of a product of half-precision numbers in half precision.
_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
_reductions: list[Any] = []


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Context in which products on `device` keep the dtype of their operands, and float32 products use all 24 bits.

    The caller's autocast is off inside, and so is TF32. It changes nothing where they are off already.
    """
    with _without_autocast(device), without_tf32() if device.type == "cuda" else nullcontext():
        yield


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    # torch raises for a device type without autocast
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _read() -> str:
    return torch.backends.cuda.matmul.fp32_precision if _NEW else torch.get_float32_matmul_precision()


def _write(precision: str) -> None:
    if _NEW:
        torch.backends.cuda.matmul.fp32_precision = precision
    else:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context in which CUDA devices multiply float32 as float32, and sum products of half precision in float32.

    The setting belongs to the process, and backward runs one thread per device. Therefore the first thread that enters
    stores the caller's setting, and the last thread that leaves restores it.
    """
    global _inside, _callers, _reductions
    with _lock:
        if _inside == 0:
            _callers = _read()
            if _callers != _EXACT:
                _write(_EXACT)
            _reductions = [getattr(torch.backends.cuda.matmul, name) for name in _REDUCTIONS]
            for name in _REDUCTIONS:
                setattr(torch.backends.cuda.matmul, name, False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                if _callers != _EXACT:
                    _write(_callers)
                for name, value in zip(_REDUCTIONS, _reductions, strict=True):
                    setattr(torch.backends.cuda.matmul, name, value)
