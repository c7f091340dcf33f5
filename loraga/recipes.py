"""Factors of a gradient become the start (A0, B0) of an adapter."""

from __future__ import annotations

import hashlib
import math

import torch

from loraga.config import InitConfig
from loraga.factors import Factors


def check_rank(name: str, shape: tuple[int, int], rank: int, config: InitConfig) -> None:
    """Raise unless a layer is large enough for an adapter of `rank`.

    Args:
        name (`str`): of the layer, for the message.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features).
        rank (`int`): r of the adapter.
        config (`InitConfig`): LoRA-GA needs 2r singular triplets, LoRA-One r.

    Raises:
        ValueError: r is below 1, or the layer has fewer singular triplets than the recipe needs.
    """
    if rank < 1:
        raise ValueError(f"Layer {name!r}: rank r={rank} must be at least 1.")
    m, n = shape
    needed = config.triplets(rank)
    if needed > min(m, n):
        largest = min(m, n) // config.triplets(1)
        needs = f"{needed} singular directions of the gradient"
        remedy = (
            f"the largest usable r here is {largest}: lower r, set it for this layer in rank_pattern, or leave the "
            "layer out with exclude_modules"
            if largest
            else "no r is small enough: leave the layer out with exclude_modules"
        )
        raise ValueError(
            f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) is too small for r={rank}: "
            f"method={config.method!r} needs {needs}, the layer has {min(m, n)}; {remedy}."
        )


def start(
    factors: Factors,
    rank: int,
    config: InitConfig,
    *,
    scaling: float,
    name: str,
    seed: int,
    weight_sigma: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The start (A0, B0) of one layer's adapter.

    LoRA-GA (arXiv 2407.05000, as its official code does it): A0 and B0 are orthonormal slices of the first 2r
    right and left singular vectors, times one number. No singular value of G enters, so the result does not
    depend on the scale of the loss. LoRA-One (arXiv 2502.01235): B0 A0 is the best rank-r step along -G,
    divided by gamma times its largest singular value.

    Args:
        factors (`Factors`): of the mean gradient G (m, n), at least `config.triplets(rank)` triplets.
        rank (`int`): r of the adapter.
        config (`InitConfig`): method, direction, scale, gammas.
        scaling (`float`): s, the factor PEFT puts on B A.
        name (`str`): of the layer: for messages and, with `seed`, for `direction="random"`.
        seed (`int`): of `direction="random"`. The global generators are not touched.
        weight_sigma (`torch.Tensor`, *optional*): the r largest singular values of the layer's weight; needed by
            `scale="weight-svd"` only.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A0 (r, n) and B0 (m, r), float32, on the device of `factors`.

    Raises:
        ValueError: the layer is too small, `factors` holds too few triplets, `scaling` is not above 0 where it
            divides, `weight_sigma` is missing or has another length, or LoRA-One gets a zero gradient.
    """
    check_rank(name, factors.shape, rank, config)
    needed = config.triplets(rank)
    if factors.rank < needed:
        raise ValueError(
            f"Layer {name!r}: method={config.method!r} with r={rank} needs {needed} singular triplets, the factors "
            f"hold {factors.rank}; estimate them with rank={needed} or more."
        )
    top = factors.truncated(needed).to(torch.float32)
    if config.method == "lora-one":
        return _lora_one(top, config.lora_one_gamma, name)
    for_a, for_b = _directions(rank, config.direction, name, seed)
    size = _scale(factors.shape[0], rank, config, scaling, name, weight_sigma)
    device = top.U.device
    return (top.Vh[for_a.to(device)] * size).contiguous(), (top.U[:, for_b.to(device)] * size).contiguous()


def _lora_one(top: Factors, gamma: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    largest = float(top.S[0])
    if not (math.isfinite(largest) and largest > 0):
        raise ValueError(
            f"Layer {name!r}: the largest singular value of the gradient is {largest}, so LoRA-One has no step to "
            "take there; leave the layer out or use other batches."
        )
    root = (top.S / largest).sqrt() / math.sqrt(gamma)
    # -G = (-U) S Vh: the minus sign goes to B, so that B A descends.
    return (root[:, None] * top.Vh).contiguous(), (-top.U * root).contiguous()


def _directions(rank: int, direction: str, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the first 2r triplets A and B take; the two are always disjoint."""
    order = torch.arange(2 * rank, device="cpu")  # whatever the caller's default device is
    if direction == "ArB2r":
        return order[:rank], order[rank:]
    if direction == "A2rBr":
        return order[rank:], order[:rank]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    # A digest, not hash(): the same in every process whatever PYTHONHASHSEED says.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    order = torch.randperm(2 * rank, generator=generator, device="cpu")
    return order[:rank], order[rank:]


def _scale(
    out_features: int, rank: int, config: InitConfig, scaling: float, name: str, weight_sigma: torch.Tensor | None
) -> float | torch.Tensor:
    """The one number that multiplies both A and B."""
    if config.scale == "stable":
        return out_features**0.25 / math.sqrt(config.stable_gamma)
    if config.scale == "unit":
        return 1.0
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(
            f"Layer {name!r}: scale={config.scale!r} divides by PEFT's scaling, which is {scaling}; use a lora_alpha "
            "above 0, or scale='stable'."
        )
    if config.scale == "gd":
        return 1.0 / scaling
    if weight_sigma is None or weight_sigma.shape != (rank,):
        given = "none" if weight_sigma is None else f"a tensor of shape {tuple(weight_sigma.shape)}"
        raise ValueError(
            f"Layer {name!r}: scale='weight-svd' needs the {rank} largest singular values of the weight, not {given}."
        )
    return (weight_sigma.to(torch.float32) / scaling).sqrt().mean()
