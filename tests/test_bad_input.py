"""Every wrong input: one clear error, and everything as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    MLP,
    STARTS,
    assert_same,
    batches,
    build,
    captured,
    config,
    everything_about,
    exact_gradients,
    init,
    mlp_batches,
)
from torch import nn

import loraga
from loraga import InitConfig


class Interrupted:
    """A loader that fails at batch `at`."""

    def __init__(self, loader, at: int, error: BaseException):
        self.loader, self.at, self.error = loader, at, error

    def __iter__(self):
        for i, batch in enumerate(self.loader):
            if i == self.at:
                raise self.error
            yield batch


def no_labels(loader):
    return [{"input_ids": b["input_ids"]} for b in loader]


def raising(error, at: int):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return model(**batch).loss

    return loss_fn


def raising_in_backward(model, batch):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise MemoryError("in backward")

    return Explode.apply(model(**batch).loss)


def backward_of_its_own(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss


CASES = {
    "loss_fn runs backward": (lambda b: (b, {"loss_fn": backward_of_its_own}), ValueError, "ran backward itself"),
    "empty loader": (lambda b: ([], {}), ValueError, "no batch"),
    "no loss": (lambda b: (no_labels(b), {}), ValueError, "no loss.*labels.*input_ids"),
    "not a mapping": (lambda b: ([x["input_ids"] for x in b], {}), TypeError, "Tensor, not a mapping.*loss_fn"),
    "loss is a vector": (
        lambda b: (b, {"loss_fn": lambda m, x: m(**x).logits.mean((1, 2))}),
        ValueError,
        r"shape \(6,\).*one number",
    ),
    "loss is a float": (lambda b: (b, {"loss_fn": lambda m, x: 1.0}), ValueError, "a float"),
    "loss needs no grad": (
        lambda b: (b, {"loss_fn": lambda m, x: m(**x).loss.detach()}),
        ValueError,
        "needs no gradient",
    ),
    "loss under no_grad": (
        lambda b: (b, {"loss_fn": torch.no_grad()(lambda m, x: m(**x).loss)}),
        ValueError,
        "needs no gradient",
    ),
    "loss of something else": (
        lambda b: (b, {"loss_fn": lambda m, x: torch.ones(1, requires_grad=True).sum()}),
        ValueError,
        "None of the 14 target layers saw a gradient.*never|none was called",
    ),
    "nan everywhere": (
        lambda b: (b, {"loss_fn": lambda m, x: m(**x).loss * float("nan")}),
        ValueError,
        "All 4 micro-batches gave NaN or Inf",
    ),
    "inf everywhere": (
        lambda b: (b, {"loss_fn": lambda m, x: m(**x).loss * float("inf")}),
        ValueError,
        "All 4 micro-batches",
    ),
    "zero gradient": (lambda b: (b, {"loss_fn": lambda m, x: m(**x).loss * 0}), ValueError, "gradient is zero"),
    "max_batches 0": (lambda b: (b, {"max_batches": 0}), ValueError, "max_batches=0"),
    "init is a dict": (lambda b: (b, {"init": {"start": "mirror"}}), TypeError, "InitConfig, not a dict"),
    "no target": (
        lambda b: (b, {"lora": config(target_modules=["qqq"])}),
        ValueError,
        "'qqq'.*q_proj",
    ),
    "loader raises at once": (lambda b: (Interrupted(b, 0, OSError("disk")), {}), OSError, "disk"),
    "loader raises later": (lambda b: (Interrupted(b, 2, OSError("disk")), {}), OSError, "disk"),
    "ctrl-c": (lambda b: (Interrupted(b, 1, KeyboardInterrupt()), {}), KeyboardInterrupt, ""),
    "loss_fn raises at once": (lambda b: (b, {"loss_fn": raising(KeyError("x"), 0)}), KeyError, "x"),
    "loss_fn raises later": (lambda b: (b, {"loss_fn": raising(KeyError("x"), 2)}), KeyError, "x"),
    "model raises": (
        lambda b: ([b[0], {**b[1], "input_ids": b[1]["input_ids"] + 10**6}], {}),
        IndexError,
        "",
    ),
    "backward raises": (lambda b: (b, {"loss_fn": raising_in_backward}), MemoryError, "in backward"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_one_clear_error_and_everything_as_it_was(case, kind):
    """B31, and every line of the issue's list."""
    arrange, error, message = CASES[case]
    model = build("llama").train()
    model.lm_head.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.grad = torch.ones(320, 320)
    loader, kwargs = arrange(batches("llama"))
    if kind == "peft":
        lora = kwargs.pop("lora", None) or config()
        if case == "no target":
            pytest.skip("PEFT itself refuses that model")
        model = get_peft_model(model, lora)
        call = lambda: loraga.fast_init(model, loader, show_progress_bar=False, **kwargs)  # noqa: E731
    else:
        call = lambda: init(model, loader, **kwargs)  # noqa: E731
    before = everything_about(model)
    with pytest.raises(error, match=f"(?s){message}"):
        call()
    assert_same(everything_about(model), before)
    if kind == "plain":  # and the very next call works
        assert init(model, batches("llama")).loraga_report.initialised


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8"])
def test_rank_of_estimate_factors(rank):
    with pytest.raises(ValueError, match="rank="):
        loraga.estimate_factors(MLP(), mlp_batches(), rank=rank)


def test_too_many_triplets_name_the_layer():
    with pytest.raises(ValueError, match=r"'layers.2'.*\(12, 56\) has 12.*rank=16"):
        loraga.estimate_factors(MLP(), mlp_batches(), rank=16)


def test_unknown_estimator_lists_the_known():
    with pytest.raises(ValueError, match=r"'foo'.*'streaming', 'dense'"):
        loraga.estimate_factors(MLP(), mlp_batches(), estimator="foo")


def test_a_peft_model_without_that_adapter():
    model = get_peft_model(build("llama"), config())
    with pytest.raises(ValueError, match=r"no adapter 'other'.*'default'"):
        loraga.fast_init(model, batches("llama"), adapter_name="other", show_progress_bar=False)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_start_changed_the_base(start):
    """The gradient would be that of other weights, and what is saved would be wrong on the original ones."""
    model = get_peft_model(MLP(), config(init_lora_weights=start))
    before = everything_about(model)
    assert not torch.equal(model.base_model.model.layers[0].weight, MLP().layers[0].weight)
    seen = []
    message = f"'default' was made with init_lora_weights='{start}', which changes the base weights.*Load the base"
    with pytest.raises(ValueError, match=message):
        loraga.fast_init(model, (seen.append(1) or b for b in mlp_batches()), show_progress_bar=False)
    assert not seen
    assert_same(everything_about(model), before)


def test_a_config_beside_a_peft_model():
    model = get_peft_model(build("llama"), config())
    with pytest.raises(ValueError, match="keeps its own config"):
        init(model, batches("llama"))


def test_an_adapter_of_another_kind():
    from peft import IA3Config

    model = get_peft_model(build("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(TypeError, match=r"IA3.*LoRA"):
        loraga.fast_init(model, batches("llama"), show_progress_bar=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_nan_in_some_batches_is_left_out_counted_and_reported(value, estimator):
    good = mlp_batches(3, width=64)
    bad = {**mlp_batches(1, width=64, seed=5)[0]}
    bad["inputs"] = bad["inputs"].clone()
    bad["inputs"][3, 4] = value
    model = MLP((64, 96, 80, 12))
    gradients = exact_gradients(model, ["layers.0", "layers.1"], good)
    lora = LoraConfig(r=4, target_modules=["layers.0", "layers.1"])
    with pytest.warns(UserWarning, match="1 of 4 micro-batches gave NaN or Inf"):
        peft_model = init(model, [good[0], bad, *good[1:]], lora, init=InitConfig(estimator=estimator))
    report = peft_model.loraga_report
    assert report.skipped_batches == 1
    first, second = report.layers
    # behind tanh an Inf is finite again: the second layer has nothing to leave out then
    assert (first.updates, first.skipped) == (3, 1) and second.skipped == (1 if value != value else 0)
    for layer in report.layers:
        if layer.skipped:
            top = torch.linalg.svdvals(gradients[layer.name])
            assert layer.spectrum[0] == pytest.approx(float(top[0]), rel=0.01)


def test_a_layer_without_gradient_stays_ordinary_and_is_named():
    """B9: never called, or called without reaching the loss."""

    class Odd(MLP):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(40, 30)
            self.aside = nn.Linear(40, 30)

        def forward(self, inputs, labels=None):
            self.aside(inputs)
            return super().forward(inputs, labels)

    with pytest.warns(
        UserWarning, match=r"unused \(never called with gradients on\), aside \(called, but no gradient reached it\)"
    ):
        peft_model = init(Odd(), mlp_batches())
    by_name = {x.name: x for x in peft_model.loraga_report.layers}
    assert by_name["unused"].status == by_name["aside"].status == "ordinary"
    assert by_name["layers.0"].status == "initialised"
    layer = peft_model.base_model.model.unused
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.warns(UserWarning, match=r"left out of the result: unused \(never called.*\), aside \(called"):
        factors = loraga.estimate_factors(Odd(), mlp_batches(), rank=4)
    assert "unused" not in factors and "layers.1" in factors


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["plain", "peft"])
def test_a_warning_made_an_error_changes_nothing(kind, start):
    class Unused(MLP):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(40, 30)

    model = Unused() if kind == "plain" else get_peft_model(Unused(), config())
    before = everything_about(model)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="unused"):
        warnings.simplefilter("error", UserWarning)
        loraga.fast_init(
            model,
            mlp_batches(),
            config() if kind == "plain" else None,
            init=InitConfig(start=start),
            show_progress_bar=False,
        )
    assert_same(everything_about(model), before)


def test_estimate_factors_leaves_a_poisoned_layer_out():
    """Where every gradient is NaN nothing is known; where some are, a warning says how many."""

    def loss_fn(model, batch):
        poison = torch.full((), float("nan") if bool(batch["inputs"][0, 0] > -9) else 0.0)
        first = model.layers[0](batch["inputs"])
        second = model.layers[1](torch.tanh(first.detach()))
        return second.square().mean() + (first * poison).mean()

    loader = mlp_batches()
    with pytest.warns(UserWarning) as caught:
        factors = loraga.estimate_factors(MLP(), loader, ["layers.0", "layers.1"], rank=4, loss_fn=loss_fn)
    assert list(factors) == ["layers.1"]
    said = [str(warning.message) for warning in caught]
    assert said == [
        "These layers are left out of the result: layers.0 (every micro-batch had NaN or Inf).",
        "4 of 4 micro-batches gave NaN or Inf and were left out at layers.0.",
    ]
    loader[0]["inputs"][0, 0] = -10
    with pytest.warns(UserWarning, match=r"3 of 4 micro-batches gave NaN or Inf and were left out at layers\.0"):
        factors = loraga.estimate_factors(MLP(), loader, ["layers.0", "layers.1"], rank=4, loss_fn=loss_fn)
    assert list(factors) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_is_nowhere(low_cpu_mem_usage):
    """PEFT makes the adapter of a layer on the meta device there too, where a start would vanish without a word."""
    message = r"layer 'layers\.0' is not loaded yet \(meta device\).*Load the model into memory"
    with pytest.raises(ValueError, match=message):
        init(MLP().to("meta"), mlp_batches())
    peft_model = get_peft_model(MLP().to("meta"), config(), low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match=message):
        loraga.fast_init(peft_model, mlp_batches(), show_progress_bar=False)


def test_no_warning_when_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        init(MLP(), mlp_batches())


@pytest.mark.parametrize("start", STARTS)
def test_a_base_of_integers_starts_as_any_other(start):
    """B35: an int8 layer, as bitsandbytes stores it."""

    class Int8Linear(nn.Linear):
        def __init__(self, base: nn.Linear):
            super().__init__(base.in_features, base.out_features)
            scale = base.weight.detach().abs().max() / 127
            self.scale = scale
            self.weight = nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
            self.bias = base.bias

        def forward(self, input):
            return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)

    model, x = MLP(), mlp_batches(1)[0]["inputs"]
    model.layers[1] = Int8Linear(model.layers[1])
    stored = model.layers[1].weight.clone()
    with torch.no_grad():
        expected = model(x)["logits"]
        lora = LoraConfig(r=4, target_modules=["layers.0", "layers.1"])
        peft_model = init(model, mlp_batches(), lora, init=InitConfig(start=start))
        assert len(peft_model.loraga_report.initialised) == 2
        assert (peft_model(x)["logits"] - expected).abs().max() <= (0 if start == "zero-b" else 1e-5)
    assert torch.equal(peft_model.unload().layers[1].weight, stored)


def test_zero_grad_and_optimizer_calls_in_the_loss_function_do_no_harm():
    """B12."""
    model, loader = MLP((64, 96, 80, 12)), mlp_batches(width=64)
    gradients = exact_gradients(model, ["layers.0"], loader)

    def loss_fn(m, batch):
        m.zero_grad()
        return m(**batch)["loss"]

    f = loraga.estimate_factors(model, loader, ["layers.0"], rank=8, loss_fn=loss_fn)["layers.0"]
    assert captured(gradients["layers.0"], f) > 0.98


def test_bfloat16_models_sum_in_float32():
    """B5: 256 micro-batches; PEFT's sum in the parameter's dtype is 1.9 % off."""
    torch.manual_seed(0)
    model = MLP((64, 96, 80, 12)).bfloat16()
    loader = [{**b, "inputs": b["inputs"].bfloat16()} for b in mlp_batches(256, rows=8, width=64)]
    gradient = exact_gradients(model, ["layers.1"], loader)["layers.1"]
    weight, total = model.layers[1].weight, torch.zeros(80, 96, dtype=torch.bfloat16)
    for batch in loader:
        total += torch.autograd.grad(model(**batch)["loss"], weight)[0]
    assert (total.double() / 256 - gradient).norm() > 0.015 * gradient.norm()
    f = loraga.estimate_factors(model, loader, ["layers.1"], rank=80)["layers.1"]  # all of it
    assert (f.U @ torch.diag(f.S) @ f.Vh - gradient).norm() < 0.003 * gradient.norm()


def test_few_batches_are_no_error():
    """B36: PEFT's documented loop stops with StopIteration below 64 batches."""
    assert init(build("llama"), batches("llama", 1), max_batches=64).loraga_report.micro_batches == 1


def test_a_model_that_carries_gradients_is_not_changed_by_loading(tmp_path):
    """B20: loading an adapter onto a model with leftover gradients neither re-initialises it nor touches the base."""
    from peft import PeftModel

    peft_model = init(build("llama"), batches("llama"))
    peft_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft_model(**batches("llama")[0]).logits
    base = build("llama")
    for p in base.parameters():
        p.grad = torch.ones_like(p)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert (loaded(**batches("llama")[0]).logits - expected).abs().max() < 1e-5
    assert all(torch.equal(v, weights[k]) for k, v in loaded.unload().state_dict().items())


def test_a_sum_beyond_float32_is_not_called_zero():
    """Input and output gradient are finite, their product is not."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    lora = LoraConfig(target_modules=["0", "1"], r=4)
    with pytest.raises(ValueError, match=r"No target layer.*0 \(its summed gradient is not finite\)"):
        loraga.fast_init(model, [torch.full((5, 40), 1e20)], lora, loss_fn=lambda m, x: (m(x) * 1e20).sum())
    assert not hasattr(model, "peft_config")
