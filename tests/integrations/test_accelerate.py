"""Models whose weights accelerate keeps in host memory or on disk and loads layer by layer: all is as in memory.

Outside of their forward such weights are on the meta device, and so is the adapter that PEFT makes beside them.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from tiny import (
    MLP,
    STARTS,
    batches,
    build,
    captured,
    config,
    described,
    exact_gradients,
    init,
    matrices,
    mlp_batches,
)
from torch import Tensor, nn

import loraga

KINDS = ("cpu", "disk", "map", "map-in-memory")
OFFLOADED = ("cpu", "disk", "map")
NAME = "model.layers.0.self_attn.q_proj"  # offloaded in all of them


def offloaded(kind, folder, model=None) -> nn.Module:
    model = build("llama") if model is None else model
    if kind == "cpu":
        return cpu_offload(model, execution_device="cpu")
    if kind == "disk":
        return disk_offload(model, str(folder / "weights"), execution_device="cpu")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers"], "cpu")
    del places["model.layers"]
    places |= {"model.layers.0": "disk" if kind == "map" else "cpu", "model.layers.1": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "weights"), force_hooks=True)


@pytest.fixture(scope="module")
def data():
    return batches("llama", count=2, rows=3)


@pytest.fixture(scope="module")
def in_memory(data):
    """Losses and adapter of the model in memory, started with these options and trained."""

    def made(**options):
        key = tuple(options.items())
        if key not in results:
            model = init(build("llama"), data, init=loraga.InitConfig(**options))
            start = {name: value.clone() for name, value in adapter(model).items()}
            results[key] = start, train(model, data), adapter(model)
        return results[key]

    results: dict = {}
    return made


@pytest.fixture(scope="module")
def expected(data):
    """Factors of the model in memory."""
    return loraga.estimate_factors(build("llama"), data, rank=8)


def flags(model) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def places(model) -> dict[str, torch.device]:
    return {name: parameter.device for name, parameter in model.named_parameters() if ".lora_" not in name}


def train(model, data) -> Tensor:
    """Losses of a few steps."""
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def adapter(model) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items() if ".lora_" in name}


def same_adapter(model, expected) -> None:
    found = adapter(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind, checkpointing", [*((kind, False) for kind in KINDS), ("disk", True)])
def test_factors_are_those_of_the_model_in_memory(kind, checkpointing, data, expected, tmp_path):
    """Backward needs weights that are gone from their layers by then; autograd, or the recomputation, has them."""
    model = offloaded(kind, tmp_path)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.lm_head.weight.requires_grad_(False)
    before = flags(model), places(model)
    assert (model.get_submodule(NAME).weight.is_meta) == (kind in OFFLOADED)
    found = loraga.estimate_factors(model, data, rank=8)
    assert found.keys() == expected.keys()
    for name, factors in found.items():
        for part in ("U", "S", "Vh"):
            assert torch.equal(getattr(factors, part), getattr(expected[name], part)), name
    assert (flags(model), places(model)) == before


def test_the_gradient_is_exact(data, expected):
    """So that what the others are compared with is right itself."""
    for name, gradient in exact_gradients(build("llama"), list(expected), data).items():
        assert captured(gradient, expected[name]) > 0.95, name


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_start_and_training_are_those_of_the_model_in_memory(kind, start, data, in_memory, tmp_path):
    model = offloaded(kind, tmp_path)
    before, reference = places(model), model(**data[0]).logits.detach()
    peft_model = init(model, data, init=loraga.InitConfig(start=start))
    assert all(layer.initialised for layer in peft_model.loraga_report.layers)
    assert list(places(peft_model).values()) == list(before.values())
    assert {value.device.type for value in adapter(peft_model).values()} == {"cpu"}
    assert described(peft_model) == described(get_peft_model(offloaded(kind, tmp_path), config()))
    with peft_model.disable_adapter():
        assert torch.equal(peft_model(**data[0]).logits, reference)
    if start == "zero-b":
        assert torch.equal(peft_model(**data[0]).logits, reference)
    else:
        torch.testing.assert_close(peft_model(**data[0]).logits, reference, atol=5e-6, rtol=0)

    expected, losses, trained = in_memory(start=start)
    same_adapter(peft_model, expected)
    assert torch.equal(train(peft_model, data), losses) and losses.isfinite().all()
    same_adapter(peft_model, trained)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    torch.testing.assert_close(again(**data[0]).logits, peft_model.eval()(**data[0]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_peft_made_without_storage(low_cpu_mem_usage, data, in_memory, tmp_path):
    """`get_peft_model` on an offloaded model, then `fast_init`."""
    peft_model = get_peft_model(offloaded("cpu", tmp_path), config(), low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(value.is_meta for value in adapter(peft_model).values())
    loraga.fast_init(peft_model, data, show_progress_bar=False)
    same_adapter(peft_model, in_memory(start="mirror")[0])


def test_layers_without_a_gradient_start_as_ordinary_ones(tmp_path):
    """Their random start, which PEFT lost on the meta device, is drawn again, the same for the same seed."""
    starts = []
    for _ in range(2):
        torch.rand(1)  # wherever the global generator is
        model = MLP()
        model.unused = nn.Linear(8, 8)
        with pytest.warns(UserWarning, match="ordinary LoRA start: unused"):
            peft_model = init(offloaded("cpu", tmp_path, model), mlp_batches())
        A, B = matrices(peft_model, "unused")
        starts.append(A)
        assert not B.any()
    assert torch.equal(*starts) and starts[0].std() > 0


@pytest.mark.parametrize("kind", OFFLOADED)
def test_weight_svd_reads_an_offloaded_weight(kind, data, tmp_path):
    # an orthonormal basis times a scale; the scale is the weight's
    lora, options = config(target_modules=["q_proj"]), loraga.InitConfig(scale="weight-svd")
    peft_model = init(offloaded(kind, tmp_path), data, lora, init=options)
    same_adapter(peft_model, adapter(init(build("llama"), data, lora, init=options)))
    assert peft_model.base_model.model.get_submodule(NAME).base_layer.weight.is_meta


REFUSED = {
    "dora": ({"use_dora": True}, rf"'{NAME}' is offloaded, and PEFT's DoRA needs it in memory"),
    "embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        r"'model\.embed_tokens' is offloaded, and .* only those of linear layers can be mended. Exclude it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(case, data, tmp_path):
    options, message = REFUSED[case]
    model = offloaded("cpu", tmp_path)
    kinds, before = [type(module) for module in model.modules()], flags(model)
    with pytest.raises(ValueError, match=message):
        init(model, data, config(**options))
    assert kinds == [type(module) for module in model.modules()] and before == flags(model)


def test_the_model_is_as_before_when_the_loader_fails(data, tmp_path):
    model = offloaded("disk", tmp_path)
    reference = model(**data[0]).logits.detach()
    before = flags(model), places(model), [type(module) for module in model.modules()]

    def loader():
        yield data[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        init(model, loader())
    assert before == (flags(model), places(model), [type(module) for module in model.modules()])
    assert torch.equal(model(**data[0]).logits, reference)
