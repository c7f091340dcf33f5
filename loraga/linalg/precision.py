"""Keeping the caller's precision settings out of our own arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_lock = threading.Lock()
_inside = 0
_callers = ""
# torch >= 2.9 raises where its two ways to the setting are mixed, but not for one who only uses the new one. Before it,
# only one of the old ways knows the third value, "medium".
_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Context in which products on `device` keep the dtype of their operands, and float32 ones all of its digits.

    Whatever autocast the caller is in, and whether TF32 is allowed.
    """
    with _without_autocast(device), without_tf32() if device.type == "cuda" else nullcontext():
        yield


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):  # torch refuses to switch off what there is not
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
    """Context in which CUDA devices multiply float32 as float32.

    The setting is the process's, and backward runs a thread per device: the first thread to come keeps what the caller
    had, the last one to go puts it back.
    """
    global _inside, _callers
    with _lock:
        if _inside == 0:
            _callers = _read()
            _write("ieee" if _NEW else "highest")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _write(_callers)
