"""A model with one layer of every kind that PEFT adapts and that is not linear, and what trains it."""

from __future__ import annotations

import inspect

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import cross_entropy

R, TOKENS, WIDTH = 3, 31, 12


# Older PEFT takes all experts to be stored as (n, m), and allows `target_parameters` to one adapter only.
OLD_PEFT = "is_transposed" not in inspect.getsource(ParamWrapper)


STRAIGHT = (10, 16) if OLD_PEFT else (16, 10)  # (m, n) of the experts stored as (m, n)


class Experts(nn.Module):
    """Fused experts: token t goes to the expert that its id names; `order` says how each matrix lies."""

    def __init__(self, count: int, m: int, n: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((count, n, m) if transposed else (count, m, n)) / n**0.5)
        self.is_transposed = transposed

    def forward(self, h: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        weight = self.weight[expert]  # (..., n, m) or (..., m, n)
        return torch.einsum("btn,btnm->btm" if self.is_transposed else "btn,btmn->btm", h, weight)


class EveryKind(nn.Module):
    """One layer of every kind; expert 2 of 4 sees no token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.conv1 = nn.Conv1d(WIDTH, 18, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1, stride=(1, 2), bias=False)
        self.conv3 = nn.Conv3d(2, 9, (1, 3, 1), padding=(0, 1, 0))
        self.point = nn.Conv2d(8, 14, 1)
        self.straight = Experts(4, 16, 10, transposed=False)
        self.crossed = Experts(4, 14, 16, transposed=True)
        self.head = nn.Linear(14, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.conv1(self.table(tokens).mT))  # (B, 18, T)
        flat = torch.tanh(self.conv2(h.unflatten(1, (3, 6)).mT).flatten(2)).mean(-1)  # (B, 8)
        deep = torch.tanh(self.conv3(h.unflatten(1, (2, 3, 3)))).flatten(2).mean(-1)  # (B, 9)
        flat = self.point(flat[..., None, None]).flatten(1)
        expert = (tokens % 3) + (tokens % 3 == 2)  # 0, 1, 3
        h = torch.tanh(self.straight(h.mT[..., :10] + flat[:, None, :10], expert))
        h = self.crossed(h + nn.functional.pad(deep, (0, 7))[:, None], expert)
        return self.head(torch.tanh(h))


KINDS = ["table", "conv1", "conv2", "conv3", "point", "straight.weight", "crossed.weight"]


def build(dtype: torch.dtype = torch.float32) -> EveryKind:
    torch.manual_seed(0)
    return EveryKind().to(dtype)


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, TOKENS, (16, 9), generator=g) for _ in range(count)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(batch).flatten(0, 1).float(), batch.roll(-1, 1).flatten())


def config(**options) -> LoraConfig:
    names = [name for name in KINDS if "." not in name]
    parameters = [name for name in KINDS if "." in name]
    return LoraConfig(
        **{"r": R, "lora_alpha": 6, "target_modules": [*names, "head"], "target_parameters": parameters, **options}
    )
