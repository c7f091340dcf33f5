"""Quantized bases, with the real layers of bitsandbytes and torchao on the CPU; GPTQ and AWQ through a stand-in."""

from __future__ import annotations

import importlib.util
import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from tiny import (
    STARTS,
    batches,
    build,
    captured,
    config,
    described,
    exact_gradients,
    init,
    matrices,
    objective_excess,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import loraga

pytestmark = pytest.mark.slow

BITSANDBYTES = ("nf4", "nf4-double", "fp4-in-bfloat16", "int8")
TORCHAO = ("torchao-int8", "torchao-int4")
NAME = "model.layers.0.self_attn.q_proj"
LINEARS = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
ALL_LINEARS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in LINEARS]


def missing(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed (it is in the test extra)"
    )


KINDS = [pytest.param(kind, marks=missing("bitsandbytes")) for kind in BITSANDBYTES]
KINDS += [pytest.param(kind, marks=missing("torchao")) for kind in TORCHAO]
ONE_OF_EACH = [kind for kind in KINDS if kind.values[0] in ("nf4", "int8", "torchao-int8")]
ONE_WITH_EACH_START = [
    pytest.param(*kind.values, start, marks=kind.marks)
    for kind in KINDS
    for start in STARTS
    if start == "mirror" or kind in ONE_OF_EACH
]


def quantization(kind):
    if kind in BITSANDBYTES:
        return {
            "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "nf4-double": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
            "fp4-in-bfloat16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }[kind]
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    return TorchAoConfig(
        {
            "torchao-int8": Int8WeightOnlyConfig,
            # torchao's Int4WeightOnlyConfig asks for a GPU library
            "torchao-int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
            "torchao-dynamic": Int8DynamicActivationInt8WeightConfig,
        }[kind]()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "llama"
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def load(folder):
    """A quantized Llama as users load it. Training mode, in which bitsandbytes computes the same every time."""

    def load(kind):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization(kind), dtype=torch.float32
        )
        return model.train()

    return load


@pytest.fixture(scope="module")
def data():
    return batches("llama", count=2, rows=3)


def dequantized(layer) -> Tensor:
    """W in float32, by the means of the library itself."""
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if type(weight).__name__ == "Int8Params":
        scale = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves it
        return weight.data * scale[:, None] / 127
    return weight.dequantize().float()


def dequantized_model(model, names) -> nn.Module:
    plain = build("llama")
    for name in names:
        plain.get_submodule(name).weight.data = dequantized(model.get_submodule(name)).detach().clone()
    return plain


def stored(model) -> dict[str, Tensor]:
    """The base weights as they are stored, in bytes."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            inside = getattr(parameter, "qdata", parameter.data)
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[name] = inside.contiguous().view(torch.uint8).clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model, data) -> Tensor:
    return model(**data[0]).logits.detach()


# ------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_the_dequantized_model(kind, load, data):
    model = load(kind)
    model.eval()  # as from_pretrained gives it; on some CPUs bitsandbytes then repacks 4-bit weights for inference
    before = stored(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = loraga.estimate_factors(model, data, rank=8)
    assert same(stored(model), before)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(module.training for module in model.modules())

    plain = dequantized_model(model, found)
    torch.testing.assert_close(logits(plain, data), logits(model.train(), data), atol=1e-5, rtol=0)
    expected = loraga.estimate_factors(plain, data, rank=8)
    assert found.keys() == expected.keys() and len(found) == 14
    for name, gradient in exact_gradients(plain, list(found), data).items():
        assert found[name].U.shape[0] == gradient.shape[0] and found[name].Vh.shape[1] == gradient.shape[1]
        energy, reference = captured(gradient, found[name]), captured(gradient, expected[name])
        assert abs(energy - reference) < 1e-3 * reference and energy > 0.95, name
        assert objective_excess(gradient, found[name], 4) < 0.02, name


@missing("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_state_of_a_packed_layer_is_made_before_the_first_batch(kind, load, data):
    """Allocated between activations, it would keep their memory from being used again."""
    from loraga.capture.collector import Collector

    model = load(kind)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    collector = Collector({"up": 8}, loraga.InitConfig(), 1, False, 0, torch.device("cpu"))
    collector.prepare({"up": layer}, {})
    spec = collector.estimators["up"].spec
    assert (spec.m, spec.n) == (448, 320)


@missing("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_a_layer_without_backward_is_refused(kind, load, data):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16

    model = load(kind)
    if has_avx512bf16():
        with torch.no_grad():
            model.eval()(**data[0])
    else:  # what the forward above does on other CPUs
        layer = model.get_submodule(NAME)
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    message = rf"repacked the weight of layer '{NAME}' for inference.*has no backward. Load the model again"
    with pytest.raises(ValueError, match=message):
        loraga.estimate_factors(model, data)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        init(model, data)
    assert kinds == [type(module) for module in model.modules()]


@missing("torchao")
def test_layers_behind_rounded_activations_are_named(load, data):
    """torchao rounds activations too, without a gradient: the loss does not depend on what feeds such a layer."""
    with pytest.warns(UserWarning, match=rf"ordinary LoRA start: {NAME} \(gradient is zero\).*up_proj"):
        peft_model = init(load("torchao-dynamic"), data)
    names = {layer.name.rpartition(".")[2] for layer in peft_model.loraga_report.initialised}
    assert names == {"o_proj", "down_proj"}


# -------------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("kind, start", ONE_WITH_EACH_START)
def test_the_function_is_kept_and_the_adapter_trains(kind, start, load, data, tmp_path):
    model = load(kind)
    reference, before = logits(model, data), stored(model)
    owners = {name: id(parameter) for name, parameter in model.named_parameters()}
    peft_model = init(model, data, init=loraga.InitConfig(start=start))
    assert all(layer.initialised for layer in peft_model.loraga_report.layers)
    assert set(owners.values()) <= {id(parameter) for parameter in peft_model.parameters()}
    assert described(peft_model) == described(get_peft_model(load(kind), config()))
    assert same(stored(peft_model), before)
    if start == "zero-b":
        assert torch.equal(logits(peft_model, data), reference)
    else:  # B A and its opposite cancel to within the rounding of a sum
        torch.testing.assert_close(logits(peft_model, data), reference, atol=5e-6, rtol=0)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, data), reference)

    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = peft_model(**data[0]).loss
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0]
    assert same(stored(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, data), reference)
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(kind), tmp_path).train()
    torch.testing.assert_close(logits(again, data), logits(peft_model, data), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_weight_svd_reads_the_weight_and_leaves_it(kind, load, data):
    """PEFT puts a copy in place of bitsandbytes' weights when it dequantizes them on a CPU."""
    model = load(kind)
    reference, before = logits(model, data), stored(model)
    owners = {id(parameter) for parameter in model.parameters()}
    options = loraga.InitConfig(scale="weight-svd")
    plain = init(dequantized_model(model, ALL_LINEARS), data, init=options)
    peft_model = init(model, data, init=options)
    for layer in peft_model.loraga_report.layers:
        for ours, expected in zip(matrices(peft_model, layer.name), matrices(plain, layer.name), strict=True):
            torch.testing.assert_close(ours.norm(), expected.norm(), atol=0, rtol=1e-4)
    assert same(stored(peft_model), before) and owners <= {id(parameter) for parameter in peft_model.parameters()}
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, data), reference)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_dora(kind, load, data):
    """The magnitude is the norm of the dequantized rows, and the function stays."""
    model = load(kind)
    lora = config(use_dora=True, target_modules=["q_proj", "up_proj"])
    plain = dequantized_model(model, ALL_LINEARS)
    peft_model = init(model, data, lora)
    magnitude = peft_model.base_model.model.get_submodule(NAME).lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), plain.get_submodule(NAME).weight.detach().norm(dim=1))
    torch.testing.assert_close(logits(peft_model, data), logits(plain, data), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- GPTQ and AWQ


class Packed(nn.Module):
    """A layer of the kind GPTQ and AWQ store: no `weight`, eight 4-bit integers in an int32, scales by group of 32.

    The package itself, gptqmodel, asks for torch 2.14 and compiles as it runs: too much for these tests.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        grouped = linear.weight.detach().unflatten(1, (-1, 32))
        scales = grouped.abs().amax(-1) / 7
        integers = ((grouped / scales[..., None]).round() + 8).to(torch.int64).flatten(1).unflatten(1, (-1, 8))
        packed = (integers << (4 * torch.arange(8))).sum(-1)
        self.register_buffer("qweight", (packed - (packed >> 31 << 32)).to(torch.int32))
        self.register_buffer("scales", scales)

    def dequantize(self) -> Tensor:
        integers = (self.qweight[..., None] >> (4 * torch.arange(8)) & 15).flatten(1) - 8
        return (integers.unflatten(1, (-1, 32)) * self.scales[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("layer", [GPTQLoraLinear, AwqLoraLinear])
def test_gptq_and_awq_as_peft_wraps_them(layer, start, data):
    model, plain = build("llama"), build("llama")
    for name in ALL_LINEARS:
        parent, _, child = name.rpartition(".")
        packed = Packed(model.get_submodule(name))
        setattr(model.get_submodule(parent), child, packed)
        plain.get_submodule(name).weight.data = packed.dequantize()
    reference = logits(model, data)
    targets = [name.rpartition(".")[2] for name in LINEARS]  # "all-linear" is what PEFT makes of it: nn.Linear
    found = loraga.estimate_factors(model, data, targets, rank=8)
    expected = loraga.estimate_factors(plain, data, targets, rank=8)
    assert sorted(found) == sorted(ALL_LINEARS)
    for name, gradient in exact_gradients(plain, ALL_LINEARS, data).items():
        energy, reference_energy = captured(gradient, found[name]), captured(gradient, expected[name])
        assert abs(energy - reference_energy) < 1e-3 * reference_energy, name

    lora = config(target_modules=targets)
    lora._register_custom_module({Packed: layer})
    with pytest.raises(ValueError, match=rf"'{NAME}' .Packed. is stored in a form that PEFT cannot dequantize"):
        init(model, data, lora, init=loraga.InitConfig(scale="weight-svd"))
    assert type(model.get_submodule(NAME)) is Packed and torch.equal(logits(model, data), reference)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model = init(model, data, lora, init=loraga.InitConfig(start=start))
    assert type(peft_model.base_model.model.get_submodule(NAME)) is layer
    assert all(report.initialised for report in peft_model.loraga_report.layers)
    torch.testing.assert_close(logits(peft_model, data), reference, atol=0 if start == "zero-b" else 5e-6, rtol=0)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, data), reference)
    assert same(peft_model.unload().state_dict(), before)


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_loraga_init_of_a_quantized_folder(kind, load, tmp_path, capsys):
    """A folder that was saved quantized is loaded quantized, and its adapter fits."""
    from command_line import QUIET, run, save_tokenizer, write_data

    model = load(kind)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = write_data(tmp_path / "rows.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(tmp_path / "model", "--data", rows, "--output", tmp_path / "out", *QUIET) == 0, capsys.readouterr()
    report = loraga.InitReport.load(tmp_path / "out" / "loraga_report.json")
    assert len(report.initialised) == 14
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(again.get_submodule(NAME)) is type(model.get_submodule(NAME))
    adapted = PeftModel.from_pretrained(again, tmp_path / "out").train()
    ids = {"input_ids": torch.arange(24).reshape(2, 12)}
    with adapted.disable_adapter():
        expected = adapted(**ids).logits
    torch.testing.assert_close(adapted(**ids).logits, expected, atol=2e-5, rtol=0)
