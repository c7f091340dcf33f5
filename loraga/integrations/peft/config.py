"""What loraga writes into PEFT's description of an adapter."""

from __future__ import annotations

import copy

from peft import LoraConfig

# starts that need no word in a saved adapter: reading it does nothing but make room for what is in the file
ORDINARY_STARTS = (True, False, "gaussian")
# what else says how an adapter was started
_START_OPTIONS = ("lora_ga_config", "eva_config", "corda_config")


def plain_start(config: LoraConfig) -> LoraConfig:
    """`config`, or a copy of it that says nothing of how the adapter was started, where PEFT would start it again."""
    if config.init_lora_weights in ORDINARY_STARTS:
        return config
    plain = copy.copy(config)
    plain.init_lora_weights = True
    for option in _START_OPTIONS:
        if getattr(plain, option, None) is not None:
            setattr(plain, option, None)
    return plain
