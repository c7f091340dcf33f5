"""PEFT's description of an adapter whose second half of the rank is frozen."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from loraga.whole_files import files_whole

SIDE_FILE = "loraga.json"


class TwoHalvesConfig(LoraConfig):
    """A `LoraConfig` of rank 2r that writes `loraga.json` beside itself, wherever PEFT or a trainer saves it.

    Its fields, and so `adapter_config.json`, are those of `LoraConfig`. What else it knows are attributes, which
    `dataclasses.replace` does not hand on to a config made from it.

    Attributes:
        plain (`LoraConfig`): the same adapter at its trainable rank.
        offset (`str`): `"anchor"` or `"subtract"`.
        ranks (`dict[str, int]`): trainable rank by layer.
    """

    plain: LoraConfig
    offset: str
    ranks: dict[str, int]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` and `loraga.json`, each whole or not at all and never the first alone."""
        with files_whole(save_directory, last=CONFIG_NAME) as folder:
            super().save_pretrained(os.fspath(folder), **kwargs)
            if hasattr(self, "ranks"):
                write_side_file(folder, {"offset": self.offset, "frozen_half": "second", "trainable_rank": self.ranks})


def write_side_file(directory: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write `loraga.json` into an adapter directory."""
    with open(os.path.join(directory, SIDE_FILE), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def read_side_file(directory: str | os.PathLike) -> dict[str, Any]:
    """`loraga.json` of an adapter directory.

    Raises:
        ValueError: there is none, or it is not about frozen halves.
    """
    path = os.path.join(directory, SIDE_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: this adapter has no frozen half, or was not saved by a model that had one "
            "attached. A plain LoRA needs no attach_anchor."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Take it from another copy of the adapter, or "
            "save the adapter again."
        ) from error
    ranks = content.get("trainable_rank") if isinstance(content, dict) else None
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank > 0 for rank in ranks.values()):
        raise ValueError(
            f"{path} does not say which half of the adapter is frozen; was it written by loraga's export_adapter, or "
            "by something else? Save the adapter again from the model that was trained."
        )
    return content


def plain_start(config: LoraConfig) -> LoraConfig:
    """A copy of `config` at the trainable rank, whose saved form says nothing of how the adapter was started."""
    plain = copy.copy(getattr(config, "plain", config))
    plain.init_lora_weights = True
    for option in ("lora_ga_config", "eva_config", "corda_config"):
        if getattr(plain, option, None) is not None:
            setattr(plain, option, None)
    return plain


def double_rank(
    plain: LoraConfig, offset: str, ranks: dict[str, int], kept: Mapping[str, tuple[int, float]]
) -> TwoHalvesConfig:
    """The config of rank 2r with every layer's scaling unchanged; layers in `kept` keep their (rank, alpha)."""
    factor = alpha_factor(plain)
    config = TwoHalvesConfig.__new__(TwoHalvesConfig)
    config.__dict__.update(plain.__dict__)
    config.r = 2 * plain.r
    config.lora_alpha = factor * plain.lora_alpha
    # PEFT takes the first pattern that matches
    own_ranks = {exactly(name): rank for name, (rank, _) in kept.items()}
    own_alphas = {exactly(name): alpha for name, (_, alpha) in kept.items()}
    config.rank_pattern = own_ranks | {key: 2 * rank for key, rank in (plain.rank_pattern or {}).items()}
    config.alpha_pattern = own_alphas | {key: factor * alpha for key, alpha in (plain.alpha_pattern or {}).items()}
    config.plain, config.offset, config.ranks = plain, offset, ranks
    return config


def halve_rank(config: LoraConfig) -> LoraConfig:
    """The inverse of `double_rank`, for a config read from disk."""
    factor = alpha_factor(config)
    plain = copy.copy(config)
    plain.r = config.r // 2
    plain.lora_alpha = config.lora_alpha / factor
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    plain.rank_pattern = {key: rank // 2 for key, rank in ranks.items() if not key.startswith("^")}
    plain.alpha_pattern = {key: alpha / factor for key, alpha in alphas.items() if not key.startswith("^")}
    return plain


def exactly(name: str) -> str:
    """A key for `rank_pattern` that matches this module only; PEFT's patterns else match the end of a name."""
    return f"^{re.escape(name)}"


def alpha_factor(config: LoraConfig) -> float:
    """What alpha is multiplied by when the rank doubles, so that PEFT's scaling stays."""
    return math.sqrt(2) if config.use_rslora else 2
