"""Layers whose weights accelerate keeps in host memory or on disk and loads for the time of their forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _loader(module: nn.Module) -> Any:
    """accelerate's hook that loads the weights of this very module, or None."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # dispatch_model may put several into one
        if getattr(part, "offload", False):
            return part
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of `module` are on the meta device outside of its forward, and will be loaded for it."""
    return _loader(module) is not None


def home_of(module: nn.Module) -> torch.device:
    """Where a layer computes, and so where what is added to it belongs."""
    hook = _loader(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """The weights of `module` in memory for the time of the context, to be read; what is written to them is lost."""
    hook = _loader(module)
    if hook is None:
        yield
        return
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
