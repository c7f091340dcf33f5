"""The start of an adapter: the numbers that A and B begin with. The adapter is an ordinary LoRA with every start.

| start        | A                   | B          | function at the start |
|--------------|---------------------|------------|-----------------------|
| `mirror`     | [A0; A0]            | [B0, -B0]  | the base's            |
| `zero-b`     | leading directions  | 0          | the base's, bit for bit |
| of LoRA-One  | A0                  | B0         | one step downhill     |
"""

from __future__ import annotations

import torch

from loraga.config import InitConfig
from loraga.factors import Factors
from loraga.start import recipes

Start = tuple[torch.Tensor, torch.Tensor]


def triplets(config: InitConfig, rank: int, shape: tuple[int, int]) -> int:
    """The number of singular triplets of a gradient of `shape` (m, n) that the start of an adapter of `rank` needs.

    Raises:
        ValueError: `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    mirrored = config.method == "lora-ga" and config.start == "mirror"
    return min(max(2 * (rank // 2), 1) if mirrored else rank, *shape)


def start(
    factors: Factors,
    rank: int,
    config: InitConfig,
    *,
    scaling: float,
    growth: float,
    name: str,
    seed: int,
    weight_sigma: torch.Tensor | None = None,
) -> Start:
    """The start of one layer's adapter: its first k rows, k <= `rank`.

    A layer that has fewer singular triplets than the start would take gets as many pairs as it has triplets for, then
    single rows, whose column of B is zero. The start does not decide the other rows of the adapter.

    Args:
        factors (`Factors`): of the mean gradient G (m, n), at least `triplets(config, rank, (m, n))` of them.
        rank (`int`): r of the adapter.
        config (`InitConfig`): method, start, direction, scale, gammas.
        scaling (`float`): s, the factor PEFT puts on B A.
        growth (`float`): the factor by which s grows when the rank is halved and alpha stays: 2, or √2 with rsLoRA.
        name (`str`): of the layer, for messages and, with `seed`, for the draw of `direction="random"`.
        seed (`int`): of `direction="random"`. The global random generators are not used.
        weight_sigma (`torch.Tensor`, *optional*): the min(r, m, n) largest singular values of the layer's weight;
            needed by `scale="weight-svd"` only.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A (k, n) and B (m, k), float32, on the device of `factors`.

    Raises:
        ValueError: `factors` has too few triplets, or `rank` is below 1; also as `recipes.sizes`, `recipes.lora_one`.
    """
    needed = triplets(config, rank, factors.shape)
    if factors.rank < needed:
        raise ValueError(
            f"Layer {name!r}: the start of an adapter with r={rank} needs {needed} singular triplets, the factors "
            f"hold {factors.rank}; estimate them with rank={needed} or more."
        )
    top = factors.truncated(needed).to(torch.float32)
    if config.method == "lora-one":
        return recipes.lora_one(top, config.lora_one_gamma, name)
    pairs = min(rank, needed) // 2 if config.start == "mirror" else 0
    mirrored, single = recipes.sizes(
        config, factors.shape, rank, scaling=scaling, growth=growth, name=name, sigma=weight_sigma
    )
    A0, B0, others = recipes.lora_ga(top, pairs, config.direction, name, seed)
    others = others[: rank - 2 * pairs]
    A = torch.cat([mirrored * A0, mirrored * A0, single * others])
    B = torch.cat([mirrored * B0, -mirrored * B0, top.U.new_zeros(top.U.shape[0], len(others))], dim=1)
    return A, B
