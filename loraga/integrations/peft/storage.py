"""Adapters that PEFT made without memory, on the meta device: for an offloaded layer, or with `low_cpu_mem_usage`."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loraga.integrations.accelerate import compute_device, is_offloaded


def without_storage(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether this adapter, or a part of it, is on the meta device."""
    return any(p.is_meta for name, p in layer.named_parameters() if adapter_name in name.split("."))


def lost_to_offload(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether this adapter is on the meta device because its layer is offloaded, and `give_storage` can change that."""
    return (
        is_offloaded(layer.get_base_layer())
        and without_storage(layer, adapter_name)
        and adapter_name in layer.lora_A
        and type(layer.lora_A[adapter_name]) is nn.Linear
        and adapter_name not in layer.lora_magnitude_vector
    )


def give_storage(layer: LoraLayer, adapter_name: str) -> None:
    """Give an adapter on the meta device memory on the device where its layer computes, and an ordinary start."""
    device = compute_device(layer.get_base_layer())
    if adapter_name in layer.lora_embedding_A:
        for parameters in (layer.lora_embedding_A, layer.lora_embedding_B):
            old = parameters[adapter_name]
            parameters[adapter_name] = nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
    else:
        for holder in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            holder.to_empty(device=device)
    layer.reset_lora_parameters(adapter_name, True)
