"""One long sequence, a large vocabulary: gradient checkpointing, and a loss whose logits never exist whole.

    python examples/long_sequences.py [tokens] [vocabulary]

The output layer of a 128k vocabulary makes 512 kB of float32 logits per token: for 32k tokens 16 GB, and as much again
for their gradient. `chunked_loss` makes those of a few hundred tokens at a time, and makes them anew in backward. The
same function serves `fast_init` and training. Prints the peak memory of this process after each step.
"""

from __future__ import annotations

import resource
import sys

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import loraga

CHUNK = 256


def chunked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of the next token; of the logits no more than CHUNK rows exist at a time."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()

    def part(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(base.lm_head(h).float(), y, reduction="sum", ignore_index=-100)

    pairs = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    total = sum(checkpoint(part, h, y, use_reentrant=False) for h, y in pairs)
    return total / (labels != -100).sum()


def whole_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss, for comparison."""
    return model(**batch).loss


def build(vocabulary: int) -> nn.Module:
    """A small Llama that checkpoints its activations."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, use_cache=False, **sizes))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def peak() -> str:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kilobytes / 1e6:.2f} GB"


def main(tokens: int = 4096, vocabulary: int = 48000) -> None:
    """Initialise and train a step by chunks, then initialise with the model's own loss."""
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    model = build(vocabulary)
    print(f"{tokens} tokens, vocabulary {vocabulary}: all logits would be {tokens * vocabulary * 4 / 1e9:.2f} GB")
    print(f"model in memory:                  peak {peak()}")
    model = loraga.fast_init(model, [batch], loss_fn=chunked_loss, show_progress_bar=False)
    print(f"fast_init, loss by chunks:        peak {peak()}")
    model.train()
    chunked_loss(model, batch).backward()
    print(f"a training step, loss by chunks:  peak {peak()}")
    loraga.fast_init(build(vocabulary), [batch], loss_fn=whole_loss, show_progress_bar=False)
    print(f"fast_init, the model's own loss:  peak {peak()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
