"""Layers PEFT adapts that are not linear: convolutions, embeddings, parameters and experts, from gradient to disk."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers as hf
from layer_kinds import KINDS, OLD_PEFT, STRAIGHT, TOKENS, WIDTH, Experts, R, batches, build, config, loss_of
from memory import LiveBytes
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from tiny import STARTS, assert_plain, assert_same, everything_about
from torch import nn
from torch.nn.functional import cross_entropy

import loraga
from loraga.capture.weight_gradients import WeightGradient
from loraga.config import InitConfig
from loraga.estimators import Dense, LayerSpec
from loraga.integrations import peft as adapters
from loraga.integrations.peft import writing as _writing

DRIFT = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys", "ignore:.*Embedding.*", "ignore:.*ParamWrapper.*")


def started(
    start: str = "mirror",
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    model: nn.Module | None = None,
    **options,
) -> PeftModel:
    """Of a fresh model, or of the one that is given."""
    lora = None if isinstance(model, PeftModel) else lora or config()
    init = InitConfig(start=start, **options)
    with pytest.warns(UserWarning, match=r"straight\.weight\[2\] \(no token reached this expert\)"):
        return loraga.fast_init(
            model or build(dtype), batches(), lora, init=init, loss_fn=loss_of, show_progress_bar=False
        )


def slots(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, adapters.AdapterSlot]:
    return {slot.name: slot for slot in adapters.find_slots(peft_model, adapter_name)[0]}


def deltas(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """s B A of every layer, as PEFT would add it to the weight."""
    return {n: slot.layer.get_delta_weight("default").detach().double() for n, slot in slots(peft_model).items()}


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
@pytest.mark.parametrize("start", STARTS)
def test_the_function_is_unchanged_and_every_layer_is_started(start):
    model, original = started(start), build()
    close(output(model), output(original), 0 if start == "zero-b" else DRIFT)
    assert_plain(model, get_peft_model(build(), config()))
    report = model.loraga_report
    experts = [f"{name}[{e}]" for name in KINDS[-2:] for e in range(4)]
    assert [layer.name for layer in report.layers if layer.name != "head"] == [*KINDS[:-2], *experts]
    assert {layer.name for layer in report.ordinary} == {"straight.weight[2]", "crossed.weight[2]"}
    assert {layer.directions for layer in report.initialised} == {R - 1 if start == "mirror" else R}
    shapes = {layer.name: layer.shape for layer in report.layers}
    assert shapes["table"] == (WIDTH, TOKENS) and shapes["conv2"] == (8, 27)
    assert shapes["straight.weight[0]"] == STRAIGHT and shapes["crossed.weight[3]"] == (14, 16)
    with model.disable_adapter():
        assert torch.equal(output(model), output(original))


@pytest.mark.parametrize("start", STARTS)
def test_one_small_step_goes_along_the_exact_gradient(start):
    """As for linear layers: A and B together step along the best rank-r part of G."""
    model, gradients = started(start, config(r=4)), exact()
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
            wanted = -best(g, 4)
            cosine = (step * wanted).sum() / (step.norm() * wanted.norm())
            assert cosine > 0.999, f"{name}[{e}]: {cosine:.5f}"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_the_start_is_the_recipe_on_the_exact_svd(estimator, start):
    """At the odd rank of 3: a pair (v1, u2) and a row v2 that is alone and twice as long, or three rows."""
    model = started(start, estimator=estimator, buffer_dtype="float32")
    gradients = exact()
    for slot in slots(model).values():
        if slot.name == "head":
            continue
        held = slot.A.detach().double(), slot.B.detach().double()
        stored = matrices(slot.name, gradients[slot.name])
        for g, (A, B) in zip(stored, slot.matrices(*held), strict=True):
            if g.norm() == 0:
                continue
            g = g.T if slot.transposed else g
            size = g.shape[0] ** 0.25 / 2
            sigma = torch.linalg.svdvals(g)
            if start == "mirror":
                assert torch.equal(A[0], A[1]) and torch.equal(B[:, 0], -B[:, 1]) and not B[:, 2].any()
                assert (B[:, 0] @ g).norm() == pytest.approx(float(size / 2 * sigma[1]), rel=1e-3)
                A, B = torch.stack([2 * A[0], A[2]]), B[:, :1] / 2
                torch.testing.assert_close(B.norm(), torch.tensor(size / 4).double(), rtol=1e-5, atol=0)
            else:
                assert not B.any() and len(A) == R
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double() * size**2, rtol=0, atol=1e-5)
            torch.testing.assert_close((g @ A.T).norm(dim=0), size * sigma[: len(A)], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", ["gd", "unit", "weight-svd"])
def test_other_scales(scale):
    model = started(scale=scale)
    close(output(model), output(build()))
    if scale == "weight-svd":
        conv = slots(model)["conv2"]
        size = (torch.linalg.svdvals(build().conv2.weight.flatten(1))[:R] / conv.scaling).sqrt().mean()
        torch.testing.assert_close(conv.A.flatten(1).norm(dim=1), size.expand(R), rtol=1e-4, atol=0)


def test_low_precision_and_channels_last():
    model = started(dtype=torch.bfloat16)
    close(output(model), output(build(torch.bfloat16)))
    laid = build()
    laid.conv2.to(memory_format=torch.channels_last)
    laid, plain = (slots(model)["conv2"] for model in (started(model=laid), started()))
    for one, other in ((laid.A, plain.A), (laid.B, plain.B)):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-4, atol=1e-5)  # up to the sign of singular vectors


# ---------------------------------------------------------------------------------------------------- life of the model
@pytest.mark.parametrize("start", STARTS)
def test_saved_read_merged_exported_and_trained_on(start, tmp_path):
    model = started(start)
    disturb(model)
    trained = output(model)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(build(), tmp_path / "saved", is_trainable=True)
    close(output(plain), trained, 0)
    close(output(copy.deepcopy(model).merge_and_unload()), trained)
    loraga.export_adapter(model, tmp_path / "whole")
    close(output(PeftModel.from_pretrained(build(), tmp_path / "whole")), trained, 1e-4)
    with pytest.warns(UserWarning, match="by more than 10%"):
        errors = loraga.export_adapter(model, tmp_path / "small", rank=R - 1)
    small = PeftModel.from_pretrained(build(), tmp_path / "small")
    for name, delta in deltas(small).items():
        for e, (ours, whole) in enumerate(zip(matrices(name, delta), matrices(name, deltas(model)[name]), strict=True)):
            assert torch.linalg.matrix_rank(ours, rtol=1e-4) <= R - 1
            error = (ours - whole).norm() / whole.norm()
            part = f"{name}[{e}]" if name.endswith("weight") else name
            assert abs(error - errors[part]) < 1e-3
    for one in (model, plain):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.05)
        for batch in batches():
            optimizer.zero_grad()
            loss_of(one, batch).backward()
            optimizer.step()
    close(output(plain), output(model), 1e-6)
    assert (output(model) - trained).norm() > 0.01 * trained.norm()


def test_an_embedding_beside_other_adapters():
    """They share the dictionary that holds A and B."""
    model = started("zero-b")
    disturb(model)
    first = output(model)
    model.add_adapter("second", config(target_parameters=None) if OLD_PEFT else config())
    adapters.write_start(adapters.Adapter.of(model, "second"), starts_of(model, "second"))
    model.set_adapter("second")
    table = model.base_model.model.table
    assert table.lora_embedding_A["second"].requires_grad and not table.lora_embedding_A["default"].requires_grad
    assert (output(model) - output(build())).norm() > 0.01 * first.norm()
    model.set_adapter("default")
    close(output(model), first, 0)
    model.delete_adapter("second")
    close(output(model), first, 0)
    close(output(copy.deepcopy(model)), first, 0)


def starts_of(peft_model: PeftModel, adapter_name: str) -> dict:
    parts = [part for slot in adapters.find_slots(peft_model, adapter_name)[0] for part in slot.parts()]
    return {p.name: (torch.randn(p.rank, p.shape[1]), torch.randn(p.shape[0], p.rank)) for p in parts}


@pytest.mark.parametrize("start", STARTS)
def test_started_again_and_without_memory(start):
    """Bit for bit the same start, whatever was in the adapter before."""
    whole = started(start)
    expected = copy.deepcopy(whole.state_dict())
    disturb(whole)
    empty = get_peft_model(build(), config(), low_cpu_mem_usage=True)
    for model in (whole, empty):
        state = started(start, model=model).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("where", ["the last layer", "another rank"])
def test_a_failing_write_leaves_everything_as_it_was(where, monkeypatch):
    model = started()
    disturb(model)
    starts, before, written = starts_of(model, "default"), everything_about(model), []
    fill = _writing.fill

    def counted(slot, *args, **kwargs):
        fill(slot, *args, **kwargs)
        written.append(slot.name)
        if where == "the last layer" and len(written) == len(slots(model)):
            raise RuntimeError("gone")

    def confirm():
        if where == "another rank":
            raise RuntimeError("gone")

    monkeypatch.setattr(_writing, "fill", counted)
    with pytest.raises(RuntimeError, match="gone"):
        adapters.write_start(adapters.Adapter.of(model, "default"), starts, confirm=confirm)
    assert written == list(slots(model))
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


@pytest.mark.parametrize("start", STARTS)
def test_ranks_above_what_a_layer_has(start):
    """Of conv3's gradient (9, 6) and the experts' there are fewer directions than rows: the others are ordinary."""
    rank, fewest = 18, min(STRAIGHT)
    lora = LoraConfig(r=rank, target_modules=["conv3"], target_parameters=["straight.weight"])
    model = started(start, lora)
    close(output(model), output(build()), 0 if start == "zero-b" else DRIFT)
    directions = {layer.name: layer.directions for layer in model.loraga_report.initialised}
    assert directions == {"conv3": 6} | {f"straight.weight[{e}]": fewest for e in (0, 1, 3)}
    for name, few in (("conv3", 6), ("straight.weight", fewest)):
        slot = slots(model)[name]
        for e, (A, B) in enumerate(slot.matrices(slot.A.detach(), slot.B.detach())):
            pairs = 0 if start == "zero-b" or e == 2 else few // 2
            assert torch.equal(A[:pairs], A[pairs : 2 * pairs])
            assert torch.equal(B[:, :pairs], -B[:, pairs : 2 * pairs]) and not B[:, 2 * pairs :].any()
            assert A.any(dim=1).all()


def test_weights_that_the_model_itself_ties():
    """PEFT knows nothing of it: the embedding alone gets an adapter."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(TOKENS, WIDTH)
            self.head = nn.Linear(WIDTH, TOKENS, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.table(tokens)))

    model, lora = Tied(), LoraConfig(r=R, target_modules=["table"])
    expected = output(model)
    model = loraga.fast_init(model, batches(), lora, loss_fn=loss_of, show_progress_bar=False)
    close(output(model), expected)
    assert model.base_model.model.head.weight is model.base_model.model.table.base_layer.weight


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=24, tie_word_embeddings=True, **sizes)).eval()


@pytest.mark.skipif("target_modules_to_tie" not in inspect.getsource(LoraModel), reason="this PEFT ties no adapters")
@pytest.mark.parametrize("start", STARTS)
def test_adapters_that_peft_ties(start, tmp_path):
    """`ensure_weight_tying`: the head's A and B are the embedding's B and A, transposed, and one start serves both."""
    ids = torch.arange(24)[None]
    lora = LoraConfig(r=R, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*lm_head")  # it is not left without a start
        model = tied_llama()
        expected = model(ids).logits
        model = loraga.fast_init(
            model, [{"input_ids": ids, "labels": ids}], lora, init=InitConfig(start=start), show_progress_bar=False
        )
        assert_plain(model, get_peft_model(tied_llama(), lora))
        close(model(ids).logits, expected, 0 if start == "zero-b" else DRIFT)
        by_name = {layer.name: layer for layer in model.loraga_report.layers}
        assert by_name["model.embed_tokens"].initialised and "the embedding's" in by_name["lm_head"].reason
        disturb(model)
        trained = model(ids).logits
        assert (trained - expected).norm() > 0.1 * expected.norm()
        model.save_pretrained(tmp_path)
        close(PeftModel.from_pretrained(tied_llama(), tmp_path)(ids).logits, trained, 1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_a_weight_that_is_computed(start, tmp_path):
    """Under weight norm the layer's weight is a product made anew in every forward; nothing is written to its parts."""

    last = nn.utils.parametrizations.weight_norm(nn.Linear(60, 40))
    base = nn.Sequential(OrderedDict(first=nn.Linear(40, 60), bend=nn.ReLU(), last=last))
    x, lora = torch.randn(16, 40), LoraConfig(r=4, target_modules=["first", "last"])
    expected = base(x)
    model = loraga.fast_init(
        copy.deepcopy(base),
        [x],
        lora,
        init=InitConfig(start=start),
        loss_fn=lambda model, batch: model(batch).square().mean(),
        show_progress_bar=False,
    )
    assert [layer.name for layer in model.loraga_report.initialised] == ["first", "last"]
    assert_plain(model, get_peft_model(copy.deepcopy(base), lora))
    close(model(x), expected, 0 if start == "zero-b" else DRIFT)
    disturb(model)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(base, tmp_path)(x), model(x), 1e-6)
    assert (model(x) - expected).norm() > 0.1 * expected.norm()


# ----------------------------------------------------------------------------------------------------- a model of today
@pytest.mark.parametrize("start", STARTS)
def test_fused_experts_of_a_transformers_model(start, tmp_path):
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
        target_modules=["q_proj", "embed_tokens"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    expected = model(ids).logits
    model = loraga.fast_init(
        model, [{"input_ids": ids, "labels": ids}], lora, init=InitConfig(start=start), show_progress_bar=False
    )
    close(model(ids).logits, expected, 0 if start == "zero-b" else DRIFT)
    assert_plain(model, get_peft_model(moe(), lora))
    names = {layer.name for layer in model.loraga_report.initialised}
    assert {"model.layers.0.mlp.experts.gate_up_proj[0]", "model.layers.1.mlp.experts.down_proj[3]"} <= names
    assert len(names) == 3 + 2 * 2 * 4
    disturb(model)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(moe(), tmp_path)(ids).logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------------- piece by piece
def test_summing_a_stack_of_transposed_experts_needs_no_copy_of_it():
    whole = WeightGradient(Experts(8, 256, 512, transposed=True), "weight", stacked=True, transposed=True)
    gradient = torch.randn_like(whole.value)
    specs = [LayerSpec(name, *whole.shape, R, 0, torch.device("cpu")) for name in whole.parts("experts")]
    sums = [Dense(spec) for spec in specs]
    with LiveBytes() as live:
        for buffer, matrix in zip(sums, whole.matrices(gradient), strict=True):
            buffer.add(matrix)
    assert live.peak < 0.75 * gradient.numel() * 4 / 2  # what the reference widens at a time, of one expert
    for buffer, matrix in zip(sums, gradient, strict=True):
        assert torch.equal(buffer._g, matrix.T)
