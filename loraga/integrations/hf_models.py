"""Language models of transformers: what task one is for, loading it, and building one without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D as Conv1D
from transformers.utils import logging

from loraga._messages import one_line

# transformers' class for each task
_FAMILIES = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"}
# name: vocabulary, hidden size, intermediate size, layers, heads, key-value heads, largest number of positions, as in
# the config.json files of these models
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
        ValueError: `model` is none of these, or cannot be read.
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
        raise ValueError(f"there is no file or folder {model!r}.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"folder {model!r} holds no config.json.")
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if path.exists():
            raise ValueError(f"cannot read the configuration in {model!r}: {one_line(error)}") from error
        raise ValueError(
            f"{model!r} is no named shape ({', '.join(NAMES)}), no folder or config.json, and not in the local cache "
            "of downloaded models."
        ) from error


def family_of(config: Any) -> str:
    """The name of the class of transformers that loads a language model, such as "AutoModelForCausalLM"."""
    return _FAMILIES[task_of(config)]


def without_weights(config: PretrainedConfig, family: str, dtype: torch.dtype) -> nn.Module:
    """The model of `config` on the meta device, made by the class `family` of transformers, see `family_of`.

    Raises:
        ValueError: transformers has no such model for this configuration.
    """
    try:
        with torch.device("meta"):
            model = getattr(transformers, family).from_config(config, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot build a model of type {config.model_type!r}: {one_line(error)}") from error
    model.config.use_cache = False
    return cast(nn.Module, model)


def silence() -> None:
    """Let transformers print errors only."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def task_of(config: Any) -> str:
    """The task of a language model: "causal", "seq2seq" or "masked".

    An encoder such as BERT counts as "masked", unless its configuration says that it was built as a decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    decodes = getattr(config, "is_decoder", False) or any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()
    )
    return "masked" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes else "causal"


def positions_of(config: Any) -> int | None:
    """The largest number of tokens in a row, or None for no limit, as in T5, which has no table of positions."""
    return None if task_of(config) == "seq2seq" else getattr(config, "max_position_embeddings", None)


def load_config_and_tokenizer(model: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration and the tokenizer of a local folder or a hub id.

    Raises:
        ValueError: there is no such model, or it cannot be read.
    """
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"cannot load MODEL {model!r}: no such folder.")
    with _loading(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    return config, tokenizer


def load_model(model: str, config: Any, dtype: str, seed: int, trust_remote_code: bool) -> nn.Module:
    """The language model with its weights on the CPU, in `dtype` ("auto": that of the checkpoint).

    Raises:
        ValueError: it cannot be read.
    """
    family = getattr(transformers, family_of(config))
    # transformers draws weights that the checkpoint lacks (a new head) from the global generator
    torch.manual_seed(seed)
    with _loading(model):
        loaded = family.from_pretrained(
            model,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
    loaded.config.use_cache = False  # keys and values for generation would only take memory here
    return cast(nn.Module, loaded)


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot load MODEL {model!r}: {one_line(error)}") from error
