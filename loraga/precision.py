"""Keeping the caller's autocast out of our own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which operations on `device` keep the dtype of their operands."""
    if not torch.amp.is_autocast_available(device.type):  # torch refuses to switch off what there is not
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
