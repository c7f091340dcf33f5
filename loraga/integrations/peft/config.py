"""The config of a saved adapter: PEFT must not repeat a start when it reads the adapter."""

from __future__ import annotations

import copy

from peft import LoraConfig

# values of init_lora_weights that may stay in a saved adapter: on reading it, PEFT makes A and B in an ordinary way,
# and then takes their numbers from the file
ORDINARY_STARTS = (True, False, "gaussian")
# the other options of a start
_START_OPTIONS = ("lora_ga_config", "eva_config", "corda_config")


def plain_start(config: LoraConfig) -> LoraConfig:
    """`config` itself, or a copy with an ordinary start, if PEFT would repeat the start of `config` on reading it."""
    if config.init_lora_weights in ORDINARY_STARTS:
        return config
    plain = copy.copy(config)
    plain.init_lora_weights = True
    for option in _START_OPTIONS:
        if getattr(plain, option, None) is not None:
            setattr(plain, option, None)
    return plain
