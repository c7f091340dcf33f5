"""Long sequences and large vocabularies: the peak is a training step's plus the sketches, logits never exist whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import LiveBytes, _tensors
from peft import LoraConfig, get_peft_model
from tiny import captured, exact_gradients

import loraga

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import long_sequences as example

pytestmark = pytest.mark.slow

TOKENS, VOCABULARY = 1536, 6000
WHOLE = TOKENS * VOCABULARY * 4
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"]


class Largest(LiveBytes):
    """Also the largest tensor that any op made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.largest = max([self.largest, *(t.numel() * t.element_size() for t in _tensors(out) if not t._is_view())])
        return out


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")


def measured(call: Any) -> Largest:
    with Largest() as live:
        call()
    return live


def initialise(batch: dict, loss_fn: Any) -> tuple[Largest, int]:
    """What was alive, and the part of it that is the estimators' state, which does not grow with the tokens."""
    model, made = example.build(VOCABULARY), []
    options = {"loss_fn": loss_fn, "show_progress_bar": False}
    live = measured(lambda: made.append(loraga.fast_init(model, [batch], config(), **options)))
    return live, made[0].loraga_report.state_bytes


@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_the_peak_is_that_of_the_training_step(batch):
    trained = get_peft_model(example.build(VOCABULARY), config()).train()
    step = measured(lambda: example.chunked_loss(trained, batch).backward())
    ours, state = initialise(batch, example.chunked_loss)
    assert ours.peak - state <= 1.03 * step.peak, f"{(ours.peak - state) / step.peak:.2f} of the step's peak"
    assert state < 0.3 * step.peak
    assert max(ours.largest, step.largest) < WHOLE / 2
    # the check of the check: the model's own loss makes them whole, and pays for it
    whole, _ = initialise(batch, example.whole_loss)
    assert whole.largest >= WHOLE * (TOKENS - 1) // TOKENS and whole.peak > ours.peak + WHOLE


@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_chunks_give_the_gradient_of_the_whole(batch):
    model = example.build(VOCABULARY)
    exact = exact_gradients(model, NAMES, [batch])
    found = loraga.estimate_factors(model, [batch], NAMES, 8, loss_fn=example.chunked_loss)
    for name, gradient in exact.items():
        assert captured(gradient, found[name]) > 0.99
        torch.testing.assert_close(found[name].S[:2], torch.linalg.svdvals(gradient)[:2].float(), rtol=1e-3, atol=1e-7)
