"""How tests of PEFT's own calls look at a model: its base weights as stored, its output, as if it were trained."""

from __future__ import annotations

import torch
from torch import nn


def trained(model: nn.Module) -> nn.Module:
    """As if its adapters were trained for a while."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def output(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights as they are stored, under their names in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters(remove_duplicate=False)
        if ".lora_" not in name
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
