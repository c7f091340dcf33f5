"""The recipes: which singular directions of a gradient the rows of A and the columns of B take, and their lengths."""

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
    """The directions of LoRA-GA (arXiv 2407.05000, as in its official code), all of length 1.

    A0 and B0 take disjoint sets of the first 2 p triplets, with p = `pairs`. Singular values are not used, so the
    result does not depend on the scale of the loss.

    Args:
        top (`Factors`): q >= 2 p triplets of the gradient (m, n).
        pairs (`int`): p, the rank of the paper's recipe.
        direction (`str`): see `InitConfig`.
        name (`str`), seed (`int`): they decide the draw of `direction="random"`. The global random generators are not
            used.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: A0 (p, n), B0 (m, p), and the right singular vectors that A0 does not take,
        (q - p, n), in the order of their singular values.
    """
    for_a, for_b = _indices(pairs, direction, name, seed)
    left_over = [index for index in range(top.rank) if index not in set(for_a)]
    return top.Vh[for_a], top.U[:, for_b], top.Vh[left_over]


def lora_one(top: Factors, gamma: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of LoRA-One (arXiv 2502.01235): B A is the best approximation of -G / (gamma |G|) of that rank.

    |G| is the largest singular value of G.

    Args:
        top (`Factors`): r triplets of the gradient G (m, n).
        gamma (`float`): see `InitConfig.lora_one_gamma`.
        name (`str`): of the layer, for the message.

    Returns:
        `tuple[Tensor, Tensor]`: A (r, n) and B (m, r).

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
    """Two lengths: that of a mirrored row of A and its column of B, and that of a row of A whose column of B is zero.

    docs/starts.md derives both from the first step of training. With `"stable"` and Adam, that step is the one of the
    paper's LoRA-GA at half of the rank and the same alpha. With `"gd"` and plain gradient descent, it is the one of
    full fine-tuning, projected on the directions of A and B.

    Args:
        config (`InitConfig`): scale and gamma.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features).
        rank (`int`): r of the adapter.
        scaling (`float`): s, the factor PEFT puts on B A.
        growth (`float`): the factor by which s grows when the rank is halved and alpha stays: 2, or √2 with rsLoRA.
        name (`str`): of the layer, for messages.
        sigma (`Tensor`, *optional*): the min(r, m, n) largest singular values of the weight, for `"weight-svd"`.

    Returns:
        `tuple`: the two lengths, as numbers, or with `"weight-svd"` as tensors without dimensions.

    Raises:
        ValueError: a scale that divides by `scaling` finds it not above 0, or `sigma` is missing or has another length.
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
    """Which of the first 2 `pairs` triplets A0 and B0 take, as two disjoint lists of indices."""
    order = list(range(2 * pairs))
    if direction == "A2rBr":
        return order[pairs:], order[:pairs]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "random":
        generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
        order = torch.randperm(2 * pairs, generator=generator, device="cpu").tolist()
    return order[:pairs], order[pairs:]
