"""Adapters that PEFT made on the meta device, because their layer is offloaded or it was asked to."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loraga.integrations.accelerate import home_of, is_offloaded


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
