"""Layers that accelerate offloads: it keeps their weights in host memory or on disk, and loads them for each forward.

The library itself is never imported: its hooks are recognised by their attributes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _loader(module: nn.Module) -> Any:
    """The hook of accelerate that loads the weights of this module itself, or None."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # dispatch_model may combine several hooks in one
        if getattr(part, "offload", False):
            return part
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of `module` are on the meta device, and a hook loads them for its forward."""
    return _loader(module) is not None


def compute_device(module: nn.Module) -> torch.device:
    """The device on which a layer computes, which is where its adapter must be."""
    hook = _loader(module)
    if hook is not None:
        return torch.device(hook.execution_device)
    return next(itertools.chain(module.parameters(), module.buffers())).device


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Context manager: the weights of `module` are in memory and can be read. What is written to them is lost."""
    hook = _loader(module)
    if hook is None:
        yield
        return
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)
