"""One small training loop for every method, so that they differ in nothing but what is trained and how it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 40
EVALUATION_BATCH = 32

Rows = Sequence[tuple[str, int]]
Batch = dict[str, Tensor]


@dataclass
class Run:
    """One training: held-out accuracy and loss after `steps` steps each."""

    method: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)  # after the last step, one entry per held-out text
    seconds: float = 0.0  # of training, without the evaluations


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """One batch as the model takes it."""
    tokens = tokenizer(
        [text for text, _ in rows],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    return {**tokens, "labels": torch.tensor([label for _, label in rows])}


def training_batches(rows: Rows, tokenizer: PreTrainedTokenizerBase, size: int, count: int, seed: int) -> list[Batch]:
    """`count` batches in an order drawn from `seed`; within one pass over `rows` no text comes twice."""
    generator = torch.Generator().manual_seed(seed)
    per_pass = len(rows) // size
    chosen: list[list[int]] = []
    while len(chosen) < count:
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen += [order[i * size : (i + 1) * size] for i in range(per_pass)]
    return [encode([rows[i] for i in indices], tokenizer) for indices in chosen[:count]]


def evaluation_batches(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """All rows, the short ones first."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    return [encode(rows[i : i + EVALUATION_BATCH], tokenizer) for i in range(0, len(rows), EVALUATION_BATCH)]


@torch.no_grad()
def logits_of(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(texts, classes) in float32."""
    model.eval()
    return torch.cat([model(**batch).logits.float() for batch in batches])


def labels_of(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([batch["labels"] for batch in batches])


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    run: Run,
    evaluate_at: Sequence[int],
) -> Run:
    """AdamW on whatever requires a gradient, at a constant learning rate, one step per batch; fills and returns `run`.

    Weight decay is off and nothing is clipped: the plainest setting that all the methods can share.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.lr, weight_decay=0.0)
    labels = labels_of(held_out)

    def evaluate(step: int) -> None:
        logits = logits_of(model, held_out)
        run.right = (logits.argmax(-1) == labels).tolist()
        run.steps.append(step)
        run.accuracy.append(sum(run.right) / len(run.right))
        run.loss.append(nn.functional.cross_entropy(logits, labels).item())
        print(f"  {step}: {run.accuracy[-1]:.2f}", end="", flush=True)

    print(f"  seed {run.seed}  lr {run.lr:.0e}  {run.method:<16} accuracy after steps", end="", flush=True)
    for step, batch in enumerate(batches, start=1):
        began = time.perf_counter()
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.seconds += time.perf_counter() - began
        if step in evaluate_at:
            evaluate(step)
    print(f"   ({run.seconds:.0f} s)", flush=True)
    return run
