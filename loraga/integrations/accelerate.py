"""Layers whose weights accelerate keeps in host memory or on disk and loads for the time of their forward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
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


def without_storage(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether PEFT made this adapter, or a part of it, on the meta device."""
    return any(p.is_meta for name, p in layer.named_parameters() if adapter_name in name.split("."))


def lost_to_offload(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether PEFT made this adapter without storage because its layer is offloaded, and we can mend that."""
    return (
        is_offloaded(layer.get_base_layer())
        and without_storage(layer, adapter_name)
        and adapter_name in layer.lora_A
        and type(layer.lora_A[adapter_name]) is nn.Linear
        and adapter_name not in layer.lora_magnitude_vector
    )


def give_storage(layer: LoraLayer, adapter_name: str) -> None:
    """An ordinary start where the layer computes, for an adapter that PEFT made on the meta device."""
    device = home_of(layer.get_base_layer())
    if adapter_name in layer.lora_embedding_A:
        for held in (layer.lora_embedding_A, layer.lora_embedding_B):
            bare = held[adapter_name]
            held[adapter_name] = nn.Parameter(torch.empty_like(bare, device=device), bare.requires_grad)
    else:
        for holder in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            holder.to_empty(device=device)
    layer.reset_lora_parameters(adapter_name, True)
