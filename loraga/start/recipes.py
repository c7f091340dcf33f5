"""Which singular directions of a gradient A and B take, and how long they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraga.config import InitConfig
from loraga.factors import Factors
from loraga.linalg import seed_of


def lora_ga(
    top: Factors, pairs: int, direction: str, name: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LoRA-GA's directions (arXiv 2407.05000, as its official code takes them), all of length 1.

    A and B get disjoint slices of the first 2 `pairs` singular vectors. No singular value enters, so the result does
    not depend on the scale of the loss.

    Args:
        top (`Factors`): at least 2 `pairs` triplets of the gradient (m, n).
        pairs (`int`): p, the rank of the recipe.
        direction (`str`): see `InitConfig`.
        name, seed (`str`, `int`): of `direction="random"`. The global generators are not touched.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: A0 (p, n), B0 (m, p), and the right singular vectors that A0 leaves, leading
        ones first, (q - p, n) for q triplets in `top`.
    """
    for_a, for_b = _indices(pairs, direction, name, seed)
    left_over = [index for index in range(top.rank) if index not in set(for_a)]
    return top.Vh[for_a], top.U[:, for_b], top.Vh[left_over]


def lora_one(top: Factors, gamma: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA-One's A and B (arXiv 2502.01235): B A is the best step of that rank along -G over gamma times its norm.

    Raises:
        ValueError: the gradient is zero.
    """
    largest = float(top.S[0])
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(
            f"Layer {name!r}: the largest singular value of the gradient is {largest}, so LoRA-One has no step to "
            "take there; leave the layer out or use other batches."
        )
    root = (top.S / largest).sqrt() / math.sqrt(gamma)
    # -G = (-U) S Vh: the minus sign goes to B, so that B A descends.
    return (root[:, None] * top.Vh).contiguous(), (-top.U * root).contiguous()


def sizes(
    config: InitConfig,
    shape: tuple[int, int],
    rank: int,
    scaling: float,
    growth: float,
    name: str,
    sigma: Tensor | None,
) -> tuple[float | Tensor, float | Tensor]:
    """How long a row of A (and its column of B) is: one that is mirrored, and one whose column of B is zero.

    docs/starts.md derives both from the first step. `"stable"`: with Adam, the step is that of the paper's LoRA-GA at
    half of the rank and the same alpha. `"gd"`: with plain gradient descent, the step is that of full fine-tuning,
    projected on the directions of A and B.

    Args:
        config (`InitConfig`): scale and gamma.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features).
        rank (`int`): r of the adapter.
        scaling (`float`): s, the factor PEFT puts on B A.
        growth (`float`): by how much s grows when the rank is halved and alpha stays: 2, or √2 with rsLoRA.
        name (`str`): of the layer, for messages.
        sigma (`Tensor`, *optional*): the min(r, m, n) largest singular values of the weight, for `"weight-svd"`.

    Raises:
        ValueError: `scaling` is not above 0 where it divides, or `sigma` is missing or has another length.
    """
    if config.scale == "stable":
        single = growth * shape[0] ** 0.25 / math.sqrt(config.stable_gamma)
        return single / 2, single
    if config.scale == "unit":
        return 1.0, 1.0
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(
            f"Layer {name!r}: scale={config.scale!r} divides by PEFT's scaling, which is {scaling}; use a lora_alpha "
            "above 0, or scale='stable'."
        )
    if config.scale == "gd":
        return 1.0 / (math.sqrt(2) * scaling), 1.0 / scaling
    needed = min(rank, *shape)
    if sigma is None or sigma.shape != (needed,):
        given = "none" if sigma is None else f"a tensor of shape {tuple(sigma.shape)}"
        raise ValueError(
            f"Layer {name!r}: scale='weight-svd' needs the {needed} largest singular values of the weight, not {given}."
        )
    size = (sigma.to(torch.float32) / scaling).sqrt().mean()
    return size, size


def _indices(pairs: int, direction: str, name: str, seed: int) -> tuple[list[int], list[int]]:
    """Which of the first 2 `pairs` triplets A and B take; the two are always disjoint."""
    order = list(range(2 * pairs))
    if direction == "A2rBr":
        return order[pairs:], order[:pairs]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "random":
        generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
        order = torch.randperm(2 * pairs, generator=generator, device="cpu").tolist()
    return order[:pairs], order[pairs:]
