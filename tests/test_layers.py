"""Layers PEFT adapts that are not linear: convolutions, embeddings, parameters and experts, from gradient to disk."""

from __future__ import annotations

import copy
import inspect
import json
import re

import pytest
import torch
import transformers as hf
from memory import LiveBytes
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import cross_entropy
from zoo import assert_same, everything_about

import loraga
from loraga.config import InitConfig
from loraga.estimators import Dense, LayerSpec
from loraga.halves import HalvedDict, join, split
from loraga.integrations import peft as adapters
from loraga.offsets import AnchoredConv2d, TwoHalves
from loraga.sink import WholeWeight

OFFSETS = ("anchor", "subtract", "zero-b")
R, TOKENS, WIDTH = 3, 31, 12
DRIFT = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys", "ignore:.*Embedding.*", "ignore:.*ParamWrapper.*")


# Older PEFT takes all experts to be stored as (n, m), and allows `target_parameters` to one adapter only.
OLD_PEFT = "is_transposed" not in inspect.getsource(ParamWrapper)
STRAIGHT = (10, 16) if OLD_PEFT else (16, 10)  # (m, n) of the experts stored as (m, n)


class Experts(nn.Module):
    """Fused experts: token t goes to the expert that its id names; `order` says how each matrix lies."""

    def __init__(self, count: int, m: int, n: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((count, n, m) if transposed else (count, m, n)) / n**0.5)
        self.is_transposed = transposed

    def forward(self, h: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        weight = self.weight[expert]  # (..., n, m) or (..., m, n)
        return torch.einsum("btn,btnm->btm" if self.is_transposed else "btn,btmn->btm", h, weight)


class Zoo(nn.Module):
    """One layer of every kind; expert 2 of 4 sees no token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.conv1 = nn.Conv1d(WIDTH, 18, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1, stride=(1, 2), bias=False)
        self.conv3 = nn.Conv3d(2, 9, (1, 3, 1), padding=(0, 1, 0))
        self.point = nn.Conv2d(8, 14, 1)
        self.straight = Experts(4, 16, 10, transposed=False)
        self.crossed = Experts(4, 14, 16, transposed=True)
        self.head = nn.Linear(14, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.conv1(self.table(tokens).mT))  # (B, 18, T)
        flat = torch.tanh(self.conv2(h.unflatten(1, (3, 6)).mT).flatten(2)).mean(-1)  # (B, 8)
        deep = torch.tanh(self.conv3(h.unflatten(1, (2, 3, 3)))).flatten(2).mean(-1)  # (B, 9)
        flat = self.point(flat[..., None, None]).flatten(1)
        expert = (tokens % 3) + (tokens % 3 == 2)  # 0, 1, 3
        h = torch.tanh(self.straight(h.mT[..., :10] + flat[:, None, :10], expert))
        h = self.crossed(h + nn.functional.pad(deep, (0, 7))[:, None], expert)
        return self.head(torch.tanh(h))


KINDS = ["table", "conv1", "conv2", "conv3", "point", "straight.weight", "crossed.weight"]


def build(dtype: torch.dtype = torch.float32) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype)


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, TOKENS, (16, 9), generator=g) for _ in range(count)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(batch).flatten(0, 1).float(), batch.roll(-1, 1).flatten())


def config(**options) -> LoraConfig:
    names = [name for name in KINDS if "." not in name]
    parameters = [name for name in KINDS if "." in name]
    return LoraConfig(
        **{"r": R, "lora_alpha": 6, "target_modules": [*names, "head"], "target_parameters": parameters, **options}
    )


def started(offset: str = "anchor", lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    with pytest.warns(UserWarning, match=r"straight\.weight\[2\] \(no token reached this expert\)"):
        return loraga.fast_init(
            build(dtype),
            batches(),
            lora or config(),
            init=InitConfig(offset=offset),
            loss_fn=loss_of,
            show_progress_bar=False,
        )


def deltas(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """s B A of every layer, as PEFT would add it to the weight."""
    found = {}
    for slot in adapters.find_slots(peft_model, "default")[0]:
        found[slot.name] = slot.layer.get_delta_weight("default").detach().double()
    return found


def exact() -> dict[str, torch.Tensor]:
    """The mean gradients in float64, as the weights are stored."""
    model = build().double()
    weights = [model.get_parameter(name if name.endswith("weight") else f"{name}.weight") for name in KINDS]
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches():
        loss = cross_entropy(model(batch).flatten(0, 1), batch.roll(-1, 1).flatten())
        sums = [s + g / 2 for s, g in zip(sums, torch.autograd.grad(loss, weights), strict=True)]
    return dict(zip(KINDS, sums, strict=True))


def matrices(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor) if name.endswith("weight") else [tensor.flatten(1)]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def disturb(peft_model: PeftModel, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1)[0]).double()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = DRIFT) -> None:
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


# --------------------------------------------------------------------------------------------------------- at the start
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_function_is_unchanged_and_every_layer_is_started(offset):
    model = started(offset)
    close(output(model), output(build()))
    report = model.loraga_report
    experts = [f"{name}[{e}]" for name in KINDS[-2:] for e in range(4)]
    assert [layer.name for layer in report.layers if layer.name != "head"] == [*KINDS[:-2], *experts]
    assert {layer.name for layer in report.ordinary} == {"straight.weight[2]", "crossed.weight[2]"}
    shapes = {layer.name: layer.shape for layer in report.layers}
    assert shapes["table"] == (WIDTH, TOKENS) and shapes["conv2"] == (8, 27)
    assert shapes["straight.weight[0]"] == STRAIGHT and shapes["crossed.weight[3]"] == (14, 16)
    original = build()
    for name, weight in original.named_parameters():
        owner, _, last = name.rpartition(".")
        now = model.base_model.model.get_submodule(owner)
        now = getattr(now.get_base_layer() if hasattr(now, "get_base_layer") else now, last)
        assert offset == "subtract" or torch.equal(now, weight), name
    if offset != "subtract":
        with model.disable_adapter():
            assert torch.equal(output(model), output(original))


@pytest.mark.parametrize(("offset", "rank"), [("anchor", 2 * R), ("zero-b", R)])
def test_one_small_step_goes_along_the_exact_gradient(offset, rank):
    """As for linear layers: A and B together step along the best rank-2r part of G, or rank-r with B = 0."""
    model, gradients = started(offset), exact()
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = deltas(model)
    loss = sum(loss_of(model, batch) for batch in batches()) / 2
    with torch.no_grad():
        for parameter, grad in zip(trainable, torch.autograd.grad(loss, trainable), strict=True):
            parameter -= 1e-3 * grad
    after = deltas(model)
    for name, gradient in gradients.items():
        for e, (step, g) in enumerate(
            zip(matrices(name, after[name] - before[name]), matrices(name, gradient), strict=True)
        ):
            if g.norm() == 0:
                assert e == 2 and step.norm() == 0
                continue
            wanted = -best(g, rank)
            cosine = (step * wanted).sum() / (step.norm() * wanted.norm())
            assert cosine > 0.999, f"{name}[{e}]: {cosine:.5f}"


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_the_start_is_the_recipe_on_the_exact_svd(estimator):
    lora = config()
    with pytest.warns(UserWarning, match="no token"):
        model = loraga.fast_init(
            build(),
            batches(),
            lora,
            init=InitConfig(offset="zero-b", estimator=estimator, buffer_dtype="float32"),
            loss_fn=loss_of,
            show_progress_bar=False,
        )
    gradients = exact()
    for slot in adapters.find_slots(model, "default")[0]:
        if slot.name == "head":
            continue
        held = [p.detach().double() for p in (_parameter(slot.lora_A, slot.key), _parameter(slot.lora_B, slot.key))]
        stored = matrices(slot.name, gradients[slot.name])
        for g, (A, B) in zip(stored, slot.matrices(*held), strict=True):
            if g.norm() == 0:
                continue
            g = g.T if slot.transposed else g
            m = g.shape[0]
            assert not B.any() and A.shape == (R, g.shape[1])
            torch.testing.assert_close(A @ A.T, torch.eye(R).double() * m**0.5 / 16, rtol=0, atol=1e-5)
            share = (g @ A.T).square().sum() / (m**0.5 / 16) / torch.linalg.svdvals(g)[:R].square().sum()
            assert share > 0.9999, slot.name


def _parameter(holder: nn.Module, key: str) -> nn.Parameter:
    return holder._parameters[key]


@pytest.mark.parametrize("scale", ["gd", "unit", "weight-svd"])
def test_other_scales(scale):
    with pytest.warns(UserWarning, match="no token"):
        init = InitConfig(scale=scale)
        model = loraga.fast_init(build(), batches(), config(), init=init, loss_fn=loss_of, show_progress_bar=False)
    close(output(model), output(build()))
    if scale == "weight-svd":
        conv = next(slot for slot in adapters.find_slots(model, "default")[0] if slot.name == "conv2")
        size = (torch.linalg.svdvals(build().conv2.weight.flatten(1))[:R] / conv.scaling).sqrt().mean()
        torch.testing.assert_close(conv.lora_A.trained.flatten(1).norm(dim=1), size.expand(R), rtol=1e-4, atol=0)


def test_low_precision_and_channels_last():
    model = started(dtype=torch.bfloat16)
    close(output(model), output(build(torch.bfloat16)))
    laid = build()
    laid.conv2.to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="no token"):
        laid = loraga.fast_init(laid, batches(), config(), loss_fn=loss_of, show_progress_bar=False)
    torch.testing.assert_close(deltas_of_half(laid, "conv2"), deltas_of_half(started(), "conv2"), rtol=1e-4, atol=1e-6)


def deltas_of_half(peft_model: PeftModel, name: str) -> torch.Tensor:
    layer = peft_model.base_model.model.get_submodule(name)
    A, B = layer.lora_A["default"].trained, layer.lora_B["default"].trained
    return (B.flatten(1) @ A.flatten(1)).detach()


# ---------------------------------------------------------------------------------------------------- life of the model
@pytest.mark.parametrize("offset", OFFSETS)
def test_saved_read_merged_exported_and_trained_on(offset, tmp_path):
    model = started(offset)
    disturb(model)
    trained = output(model)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(build(), tmp_path / "saved", is_trainable=True)
    close(output(plain), trained)
    close(output(copy.deepcopy(model).merge_and_unload()), trained)
    loraga.export_adapter(model, tmp_path / "large", rank=2 * R)
    close(output(PeftModel.from_pretrained(build(), tmp_path / "large")), trained, 1e-4)
    errors = loraga.export_adapter(model, tmp_path / "small")
    small = PeftModel.from_pretrained(build(), tmp_path / "small")
    for name, delta in deltas(small).items():
        if offset == "subtract":
            continue  # what the live adapter adds is not what is saved
        for e, (ours, whole) in enumerate(zip(matrices(name, delta), matrices(name, deltas(model)[name]), strict=True)):
            assert torch.linalg.matrix_rank(ours, rtol=1e-4) <= R
            error = (ours - whole).norm() / whole.norm()
            part = f"{name}[{e}]" if name.endswith("weight") else name
            assert abs(error - errors[part]) < 1e-3
    if offset == "zero-b":
        return
    with open(tmp_path / "saved" / "loraga.json") as file:
        assert set(json.load(file)["trainable_rank"]) == {*KINDS, "head"}
    loraga.attach_anchor(plain, tmp_path / "saved")
    close(output(plain), trained)
    if offset == "subtract":
        loraga.restore_base(model)
        for name, weight in build().named_parameters():
            if name == "crossed.weight":
                torch.testing.assert_close(model.base_model.model.crossed.get_param(), weight, rtol=0, atol=1e-5)
    for one in (model, plain):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.05)
        for batch in batches():
            optimizer.zero_grad()
            loss_of(one, batch).backward()
            optimizer.step()
    close(output(plain), output(model), 1e-4)


@pytest.mark.parametrize("offset", ["anchor", "subtract"])
def test_state_dicts_speak_of_whole_adapters(offset, tmp_path):
    model = started(offset)
    disturb(model)
    state, expected = copy.deepcopy(model.state_dict()), output(model)
    assert state["base_model.model.table.lora_embedding_A.default"].shape == (2 * R, TOKENS)
    assert state["base_model.model.crossed.lora_A.default.weight"].shape == (4 * 2 * R, 16)
    assert len(list(model.parameters())) == len(list(started("zero-b").parameters()))
    disturb(model, 0.5)
    model.load_state_dict(state)
    close(output(model), expected, 1e-6)
    short = {k: v[: len(v) // 2] if "embedding_A" in k else v for k, v in state.items()}
    with pytest.raises(RuntimeError, match="no frozen half"):
        model.load_state_dict(short)
    del short["base_model.model.table.lora_embedding_A.default"]
    with pytest.raises(RuntimeError, match=r"Missing key.*table\.lora_embedding_A\.default"):
        model.load_state_dict(short)
    if offset == "subtract":
        other = {k: v + 1 if "embedding_A" in k else v for k, v in state.items()}
        with pytest.raises(RuntimeError, match="started elsewhere"):
            model.load_state_dict(other)


def test_an_embedding_beside_other_adapters():
    """They share the dictionary that changes its class."""
    model = started("zero-b")
    first = output(model)
    model.add_adapter("second", config(target_parameters=None) if OLD_PEFT else config())
    adapters.write_start(model, "second", starts_of(model, "second"), "anchor")
    model.set_adapter("second")
    close(output(model), output(build()))
    table = model.base_model.model.table
    assert isinstance(table.lora_embedding_A, HalvedDict)
    assert table.lora_embedding_A["second"].shape == (2 * R, TOKENS)
    assert table.lora_embedding_A["default"].shape == (R, TOKENS)
    assert table.lora_embedding_A.trained("second").requires_grad
    assert not table.lora_embedding_A["default"].requires_grad
    model.set_adapter("default")
    torch.testing.assert_close(output(model), first)
    model.delete_adapter("second")
    assert not list(table.lora_embedding_A.buffers())
    torch.testing.assert_close(output(model), first)
    close(output(copy.deepcopy(model)), first, 1e-12)


def starts_of(peft_model: PeftModel, adapter_name: str) -> dict:
    parts = [part for slot in adapters.find_slots(peft_model, adapter_name)[0] for part in slot.parts()]
    return {p.name: (torch.randn(p.rank, p.shape[1]), torch.randn(p.shape[0], p.rank)) for p in parts}


@pytest.mark.parametrize("offset", OFFSETS)
def test_started_again_and_without_memory(offset):
    whole = started(offset)
    empty = get_peft_model(build(), config(), low_cpu_mem_usage=True)
    with pytest.warns(UserWarning, match="no token"):
        init = InitConfig(offset=offset)
        loraga.fast_init(empty, batches(), init=init, loss_fn=loss_of, show_progress_bar=False)
    assert not any(p.is_meta for p in empty.parameters())
    close(output(empty), output(build()))
    if offset == "subtract":
        with pytest.raises(ValueError, match="restore_base"):
            loraga.fast_init(whole, batches(), loss_fn=loss_of, show_progress_bar=False)
        return
    before = {name: p.shape for name, p in whole.named_parameters()}
    with pytest.warns(UserWarning, match="no token"):
        loraga.fast_init(whole, batches(), init=init, loss_fn=loss_of, show_progress_bar=False)
    assert before == {name: p.shape for name, p in whole.named_parameters()}
    close(output(whole), output(build()))


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_failing_write_leaves_everything_as_it_was(offset, monkeypatch):
    model = started("anchor") if offset != "subtract" else get_peft_model(build(), config())
    starts, before = starts_of(model, "default"), everything_about(model)
    writer, calls = adapters.write_start.__globals__["_WRITERS"][offset], []

    def failing(slot, A0, B0):
        calls.append(slot.name)
        writer(slot, A0, B0)
        if slot.name == "crossed.weight":
            raise RuntimeError("gone")

    monkeypatch.setitem(adapters.write_start.__globals__["_WRITERS"], offset, failing)
    with pytest.raises(RuntimeError, match="gone"):
        adapters.write_start(model, "default", starts, offset)
    assert len(calls) >= 6
    assert_same(everything_about(model), before)


# -------------------------------------------------------------------------------------------------- what cannot be done
def test_what_cannot_work_keeps_an_ordinary_start_and_says_why():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(TOKENS, WIDTH, max_norm=1.0)
            self.grouped = nn.Conv1d(WIDTH, 12, 3, padding=1, groups=3)
            self.dilated = nn.Conv1d(12, 12, 3, padding="same", dilation=2)
            self.round = nn.Conv1d(12, 12, 3, padding=1, padding_mode="circular")
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 12, 1))
            self.head = nn.Linear(12, TOKENS)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            h = self.table(tokens).mT
            return self.head(self.normed(self.round(self.dilated(self.grouped(h)))).mT)

    names = ["table", "grouped", "dilated", "round", "head"]
    with pytest.warns(UserWarning, match="ordinary LoRA start"):
        model = loraga.fast_init(
            Odd(), batches(), LoraConfig(r=R, target_modules=names), loss_fn=loss_of, show_progress_bar=False
        )
    reasons = {layer.name: layer.reason for layer in model.loraga_report.ordinary}
    assert set(reasons) == set(names) - {"head"}
    for name, word in [("table", "max_norm"), ("grouped", "groups=3"), ("dilated", "dilation"), ("round", "circular")]:
        assert word in reasons[name]


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_subtract_refuses_what_peft_saves_with_the_adapter(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=24, **sizes))
    before = everything_about(model)
    batch = {"input_ids": torch.arange(24)[None], "labels": torch.arange(24)[None]}
    lora = LoraConfig(r=R, target_modules=["q_proj", name])
    with pytest.raises(ValueError, match=rf"'subtract' does not go with '.*{name}'.*'anchor' or 'zero-b'"):
        init = InitConfig(offset="subtract")
        loraga.fast_init(model, [batch], lora, init=init, show_progress_bar=False)
    assert_same(everything_about(model), before)


def test_too_large_a_rank_and_a_tied_embedding_are_named():
    shape = re.escape(str(STRAIGHT))
    with pytest.raises(ValueError, match=rf"'straight\.weight'.*= {shape} is too small for r=6.*largest.* 5"):
        loraga.fast_init(
            build(),
            batches(),
            LoraConfig(r=6, target_parameters=["straight.weight"], target_modules=[]),
            loss_fn=loss_of,
            show_progress_bar=False,
        )

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(TOKENS, WIDTH)
            self.head = nn.Linear(WIDTH, TOKENS, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.table(tokens)))

    lora = LoraConfig(r=R, target_modules=["table"])
    model = Tied()
    with pytest.raises(ValueError, match="'table' alone: 'head' shares it"):
        init = InitConfig(offset="subtract")
        loraga.fast_init(model, batches(), lora, init=init, loss_fn=loss_of, show_progress_bar=False)
    expected = output(model)
    close(output(loraga.fast_init(model, batches(), lora, loss_fn=loss_of, show_progress_bar=False)), expected)


# ----------------------------------------------------------------------------------------------------- a model of today
@pytest.mark.parametrize("offset", OFFSETS)
def test_fused_experts_of_a_transformers_model(offset, tmp_path):
    """Two parameters of one module: PEFT nests its wrappers."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}

    def moe() -> nn.Module:
        torch.manual_seed(0)
        return hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(vocab_size=64, num_hidden_layers=2, use_cache=False, **sizes, **heads)
        ).eval()

    model = moe()
    if not isinstance(getattr(model.model.layers[0].mlp.experts, "down_proj", None), nn.Parameter):
        pytest.skip("this transformers keeps experts as separate linear layers")
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"] if offset == "subtract" else ["q_proj", "embed_tokens"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    expected = model(ids).logits
    model = loraga.fast_init(
        model, [{"input_ids": ids, "labels": ids}], lora, init=InitConfig(offset=offset), show_progress_bar=False
    )
    close(model(ids).logits, expected)
    names = {layer.name for layer in model.loraga_report.initialised}
    assert {"model.layers.0.mlp.experts.gate_up_proj[0]", "model.layers.1.mlp.experts.down_proj[3]"} <= names
    assert len(names) == (2 if offset == "subtract" else 3) + 2 * 2 * 4
    disturb(model)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(moe(), tmp_path)(ids).logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------------- piece by piece
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_halves_are_joined_within_each_block(blocks, dim):
    trained, frozen = torch.randn(8, 12), torch.randn(8, 12)
    whole = join(trained, frozen, dim, blocks)
    assert whole.shape[dim] == 2 * trained.shape[dim]
    for part, half in zip(split(whole, dim, blocks), (trained, frozen), strict=True):
        assert torch.equal(part, half)
    size = trained.shape[dim] // blocks
    assert torch.equal(whole.narrow(dim, size, size), frozen.narrow(dim, 0, size))


def test_classes_are_those_of_the_layers():
    model = started().base_model.model
    for name in ("conv1", "conv2", "conv3"):
        layer = model.get_submodule(name)
        adapter = layer.lora_A["default"]
        assert isinstance(adapter, type(layer.get_base_layer())) and isinstance(adapter, TwoHalves)
        assert adapter.out_channels == 2 * R
    assert isinstance(model.conv2.lora_B["default"], AnchoredConv2d)


def test_summing_a_stack_of_transposed_experts_needs_no_copy_of_it():
    whole = WholeWeight(Experts(8, 256, 512, transposed=True), "weight", stacked=True, transposed=True)
    gradient = torch.randn_like(whole.value)
    specs = [LayerSpec(name, *whole.shape, R, 0, torch.device("cpu")) for name in whole.parts("experts")]
    sums = [Dense(spec) for spec in specs]
    with LiveBytes() as live:
        for buffer, matrix in zip(sums, whole.matrices(gradient), strict=True):
            buffer.add(matrix)
    assert live.peak < 0.75 * gradient.numel() * 4 / 2  # what the reference widens at a time, of one expert
    for buffer, matrix in zip(sums, gradient, strict=True):
        assert torch.equal(buffer._g, matrix.T)
