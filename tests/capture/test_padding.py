"""Padding, masks and packed sequences: tokens without a gradient change nothing."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny import objective_excess
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import loraga

VOCABULARY, RANK = 53, 6
LENGTHS = (23, 9, 17, 30)
NAMES = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]


def llama(attention: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=VOCABULARY, use_cache=False, attn_implementation=attention, **sizes)
    return hf.LlamaForCausalLM(config).eval()


def sequences() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (length,), generator=g) for length in LENGTHS]


def losses(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Sum of the loss of the next token, where it is one of the same sequence."""
    each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * kept.flatten()).sum() / sum(LENGTHS)


def alone(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return sum(losses(model(ids[None]).logits, ids[None], torch.ones(len(ids) - 1)) for ids in batch)


def padded(side: str) -> dict[str, Tensor]:
    longest = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), longest, dtype=torch.long), torch.zeros(len(LENGTHS), longest)
    for row, sequence in enumerate(sequences()):
        place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), None)
        ids[row, place], mask[row, place] = sequence, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0).long()
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions}


def packed() -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat(sequences())[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }


def together(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "attention_mask" in batch:
        kept = batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]
    else:
        kept = batch["position_ids"][:, 1:] != 0
    return losses(model(**batch).logits, batch["input_ids"], kept)


def exact(model: nn.Module) -> dict[str, Tensor]:
    weights = [model.get_parameter(f"{name}.weight") for name in NAMES]
    grads = torch.autograd.grad(alone(model, sequences()), weights)
    return {name: g.double() for name, g in zip(NAMES, grads, strict=True)}


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["right", "left", "packed"])
def test_padded_and_packed_sequences_give_what_they_give_alone(form, attention, estimator):
    model = llama(attention)
    batch = packed() if form == "packed" else padded(form)
    options = {"estimator": estimator}
    ours = loraga.estimate_factors(model, [batch], NAMES, RANK, loss_fn=together, **options)
    theirs = loraga.estimate_factors(model, [sequences()], NAMES, RANK, loss_fn=alone, **options)
    for name, gradient in exact(model).items():
        sigma = torch.linalg.svdvals(gradient)[:RANK].float()
        torch.testing.assert_close(ours[name].S, sigma, rtol=5e-3, atol=1e-8)
        # how far apart the subspaces are: what a padded batch finds is as good as what single sequences find
        assert objective_excess(gradient, ours[name], RANK // 2) < 0.02
        overlap = (ours[name].U[:, :2].T @ theirs[name].U[:, :2]).square().sum() / 2
        assert overlap > 0.999, f"{name}: {overlap:.5f}"


def test_the_loss_would_tell_if_packed_sequences_saw_each_other():
    """The check of the check: without positions the gradient is another one."""
    model = llama("sdpa")
    ids = packed()["input_ids"]
    seen = loraga.estimate_factors(
        model, [ids], NAMES, RANK, loss_fn=lambda m, b: losses(m(b).logits, b, packed()["position_ids"][:, 1:] != 0)
    )
    gradient = exact(model)[NAMES[0]]
    assert not torch.allclose(seen[NAMES[0]].S, torch.linalg.svdvals(gradient)[:RANK].float(), rtol=0.05)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_a_masked_prompt_adds_nothing(share):
    """Rows of dY that are zero, up to all of a batch, leave the factors what the other rows make of them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20))
    x, y = torch.randn(200, 40), torch.randint(0, 20, (200,))
    masked = int(share * 200)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cross_entropy(model(batch[0])[batch[2]], batch[1][batch[2]], reduction="sum") / 200

    kept = torch.arange(200) >= masked
    rest = (x[kept], y[kept], torch.ones(200 - masked, dtype=torch.bool))
    other = torch.randn(50, 40), torch.randint(0, 20, (50,)), torch.ones(50, dtype=torch.bool)
    ours = loraga.estimate_factors(model, [(x, y, kept), other], ["0"], 4, loss_fn=loss)["0"]
    theirs = loraga.estimate_factors(model, [rest, other], ["0"], 4, loss_fn=loss)["0"]
    torch.testing.assert_close(ours.S, theirs.S, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.Vh @ theirs.Vh.T, torch.eye(4), rtol=0, atol=1e-3)
