"""Models without weights: from a configuration, found by name, with every parameter on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from loraga.cli.rows import InputError

# name: vocabulary, hidden, intermediate, layers, heads, key-value heads, longest row (their config.json files)
_LLAMAS = {
    "llama-2-7b": (32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": (32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3-70b": (128256, 8192, 28672, 80, 64, 8, 8192),
    "llama-3.1-405b": (128256, 16384, 53248, 126, 128, 8, 131072),
}
NAMES = tuple(_LLAMAS)


def config_of(model: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a named shape, of a folder, of a config.json, or of a model in the local cache.

    Nothing is downloaded.

    Raises:
        InputError: there is no such thing, or it cannot be read.
    """
    if model.lower() in _LLAMAS and not Path(model).exists():
        vocabulary, hidden, intermediate, layers, heads, kv_heads, longest = _LLAMAS[model.lower()]
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=longest,
            architectures=["LlamaForCausalLM"],
        )
    path = Path(model)
    if not path.exists() and (path.suffix == ".json" or model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise InputError(f"there is no file or folder {model!r}.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"folder {model!r} holds no config.json.")
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if path.exists():
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(f"cannot read the configuration in {model!r}: {said}") from error
        raise InputError(
            f"{model!r} is no named shape ({', '.join(NAMES)}), no folder or config.json, and not in the local cache "
            "of downloaded models."
        ) from error


def without_weights(config: PretrainedConfig, family: str, dtype: torch.dtype) -> nn.Module:
    """The model of `config` on the meta device, made by transformers' class `family`, such as AutoModelForCausalLM.

    Raises:
        InputError: transformers has no such model for this configuration.
    """
    try:
        with torch.device("meta"):
            model = getattr(transformers, family).from_config(config, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot build a model of type {config.model_type!r}: {said}") from error
    model.config.use_cache = False
    return model
