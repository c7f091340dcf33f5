"""The Llamas of the benchmarks, by their sizes."""

from __future__ import annotations

from typing import Any


def config(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Any:
    """transformers' `LlamaConfig`, without a cache of keys and values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
