"""PEFT's own LoRA-GA calls with `apply_to_peft`.

PEFT's own tests of LoRA-GA run with it, too; docs/peer-faults.md says how, and which one fails and why.
"""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from plain import bits, close, output, same, trained
from tiny import (
    MLP,
    R,
    assert_plain,
    assert_same,
    batches,
    build,
    captured,
    config,
    everything_about,
    exact_gradients,
    init,
    matrices,
    mlp_batches,
    objective_excess,
    pairs,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import loraga
from loraga.integrations.peft import plugin

if not hasattr(peft, "preprocess_loraga"):
    pytest.skip("this PEFT has no LoRA-GA (it came with 0.19)", allow_module_level=True)

# as user code has it: imported before the plugin is applied
from peft import LoraGAConfig, preprocess_loraga
from peft.tuners.lora import loraga as peft_loraga

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = {"stable": "stable", "weight_svd": "weight-svd", "gd_scale": "gd", "unit": "unit"}  # PEFT's names and ours
ATTRIBUTE = "_peft_loraga_grad"
P = R // 2


@pytest.fixture(autouse=True)
def applied():
    loraga.apply_to_peft()
    yield
    loraga.restore_peft()


def lora_ga(direction: str = "ArB2r", scale: str = "stable", gamma: float = 16, **kwargs) -> LoraConfig:
    options = LoraGAConfig(direction=direction, scale=scale, stable_gamma=gamma)
    return config(init_lora_weights="lora_ga", lora_ga_config=options, **kwargs)


def step_of(model: nn.Module, loader: list[dict]):
    """A user's callback: forward and backward of every batch."""

    def train_step(model: nn.Module = model) -> None:
        for batch in loader:
            model(**batch)["loss"].backward()

    return train_step


def start(model: nn.Module, loader: list[dict], lora: LoraConfig | None = None, **kwargs) -> PeftModel:
    lora = lora or lora_ga()
    preprocess_loraga(model, lora, step_of(model, loader), **kwargs)
    return get_peft_model(model, lora)


def carriers(model: nn.Module) -> dict[str, plugin.SketchedGradient]:
    return {name: getattr(m, ATTRIBUTE) for name, m in model.named_modules() if hasattr(m, ATTRIBUTE)}


def snapshot_of(model: nn.Module) -> dict:
    return everything_about(model) | {"carriers": set(carriers(model))}


def model_and_batches(name: str) -> tuple[nn.Module, list[dict]]:
    return (MLP(), mlp_batches()) if name == "mlp" else (build(name), batches(name))


# ------------------------------------------------------------------------------- PEFT's two halves


def test_something_of_the_shape_of_the_weight_waits_at_the_layer_in_between():
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    assert {name: carrier.shape for name, carrier in carriers(model).items()} == {
        f"layers.{i}": layer.weight.shape for i, layer in enumerate(model.layers)
    }
    assert not carriers(get_peft_model(model, lora_ga()))


def test_a_missing_lora_ga_config_is_an_error_in_both_halves():
    model = MLP()
    with pytest.raises(ValueError, match="If you want to use LoRA-GA"):
        preprocess_loraga(model, config(), lambda: None)
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    with pytest.raises(ValueError, match="lora_ga_config must be provided"):
        get_peft_model(model, config(init_lora_weights="lora_ga"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_keeps_its_dtype_and_its_function(dtype, autocast):
    """B23: nothing is rounded into the base, and both halves of a pair are rounded alike."""
    model = MLP().to(dtype)
    loader = [{**batch, "inputs": batch["inputs"].to(dtype)} for batch in mlp_batches()]
    before, weights = output(model, loader[0]), bits(model)
    preprocess_loraga(model, lora_ga(), step_of(model, loader))
    peft_model = get_peft_model(model, lora_ga(), autocast_adapter_dtype=autocast)
    assert same(bits(peft_model), weights)
    for index in range(3):
        pairs(peft_model, f"layers.{index}")
        A, B = matrices(peft_model, f"layers.{index}")
        assert {A.dtype, B.dtype} == {torch.float32 if autocast else dtype}
    close(output(peft_model, loader[0]).float(), before.float(), 1e-3)


class Mixed(nn.Module):
    """One layer that can be started, and two that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv2d, self.embedding = nn.Linear(10, 10), nn.Conv2d(3, 16, 3), nn.Embedding(50, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_other_kinds_of_layers_are_left_to_peft():
    model, lora = Mixed(), lora_ga(target_modules=["linear", "conv2d", "embedding"])
    preprocess_loraga(model, lora, lambda: model(torch.randn(3, 10)).square().sum().backward())
    assert set(carriers(model)) == {"linear"}
    assert get_peft_model(model, lora)(torch.randn(2, 10)).shape == (2, 10)
    with pytest.raises(ValueError, match="No supported layers found"):
        preprocess_loraga(Mixed(), lora_ga(target_modules=["conv2d", "embedding"]), lambda: None)


# ------------------------------------------------------------------------------- the right start


def unit_factors(peft_model: PeftModel, name: str) -> loraga.Factors:
    """A0 and B0 without their length, where LoRA-GA's objective looks for them.

    The length is the paper's m^(1/4)/sqrt(16), times its scaling at rank r/2, over that of the two halves.
    """
    A, B = pairs(peft_model, name)
    layer = peft_model.base_model.model.get_submodule(name)
    size = B.shape[0] ** 0.25 / 4 * (8 / math.sqrt(P)) / (2 * layer.scaling["default"])
    return loraga.Factors(torch.cat([torch.zeros_like(B), B], dim=1) / size, torch.zeros(2 * P), A / size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_the_start_against_the_exact_svd_of_the_exact_gradient(name):
    model, loader = model_and_batches(name)
    original = copy.deepcopy(model)
    peft_model = start(model, loader)
    report = peft_model.loraga_report
    assert report.micro_batches == len(loader) and not report.ordinary
    exact = exact_gradients(original, [layer.name for layer in report.layers], loader)
    for layer in report.layers:
        gradient, factors = exact[layer.name], unit_factors(peft_model, layer.name)
        assert torch.allclose(factors.Vh @ factors.Vh.T, torch.eye(P), atol=1e-5), layer.name
        assert torch.allclose(factors.U[:, P:].T @ factors.U[:, P:], torch.eye(P), atol=1e-5), layer.name
        assert objective_excess(gradient, factors, P) < 0.05, layer.name
        spectrum = torch.linalg.svdvals(gradient)[: 2 * P].tolist()
        assert layer.spectrum == pytest.approx(spectrum, rel=0.05), layer.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_numbers_in_a_and_b_are_all_that_differs_from_an_ordinary_adapter(name):
    """Of the rank asked for, and the base's parameters are the very ones that it had."""
    model, loader = model_and_batches(name)
    original, owned = copy.deepcopy(model), set(model.parameters())
    peft_model = start(model, loader)
    assert same(bits(peft_model), bits(original)) and owned <= set(peft_model.parameters())
    loraga.restore_peft()
    assert_plain(peft_model, get_peft_model(copy.deepcopy(original), lora_ga()))
    close(output(peft_model, loader[0]), output(original, loader[0]))
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, loader[0]), output(original, loader[0]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gamma", [16, 64.0])
def test_options_mean_what_fast_init_means(direction, scale, gamma):
    """Bit for bit, with every linear layer a target: the head of five outputs has two pairs, one row without a partner,
    and two ordinary ones (B28)."""
    sizes, loader = (40, 96, 56, 5), mlp_batches(classes=5)
    options = loraga.InitConfig(direction=direction, scale=SCALES[scale], stable_gamma=gamma)
    ours = init(MLP(sizes), loader, config(r=7), init=options)
    peft_model = start(MLP(sizes), loader, lora_ga(direction, scale, gamma, r=7))
    assert [layer.name for layer in ours.loraga_report.initialised] == ["layers.0", "layers.1", "layers.2"]
    for layer in ours.loraga_report.layers:
        for a, b in zip(matrices(peft_model, layer.name), matrices(ours, layer.name), strict=True):
            assert torch.equal(a, b), layer.name
    close(output(peft_model, loader[0]), output(MLP(sizes), loader[0]))


def test_factors_of_the_preprocessed_layers():
    """For the rank of the layer, by rank_pattern too, of the mean over backward calls."""
    model, loader = build("llama"), batches("llama")
    lora = lora_ga(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7})
    exact = exact_gradients(model, names := [n for n, m in model.named_modules() if n.endswith("_proj")], loader)
    preprocess_loraga(model, lora, step_of(model, loader))
    found = carriers(model)
    assert list(found) == names
    for name, carrier in found.items():
        triplets = 2 if "q_proj" in name else 6 if name == "model.layers.1.mlp.up_proj" else R
        assert carrier.name == name and carrier.factors.rank == triplets
        assert captured(exact[name], carrier.factors) > 0.95
    peft_model = get_peft_model(model, lora)
    assert peft_model.base_model.model.model.layers[1].mlp.up_proj.r["default"] == 7
    close(output(peft_model, loader[0]), output(build("llama"), loader[0]))


@pytest.mark.parametrize("targets", ["all-linear", None, r".*\.(q_proj|up_proj)", ["q_proj", "down_proj"]])
def test_targets_in_every_form(targets):
    """B27; and the user's config is not written to."""
    model, lora = build("llama"), lora_ga(target_modules=targets, exclude_modules=["layers.1.self_attn.q_proj"])
    before = copy.deepcopy(lora)
    preprocess_loraga(model, lora, step_of(model, batches("llama", 1)))
    assert lora == before
    found = carriers(model)
    peft_model = get_peft_model(model, lora)
    adapted = [n for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert list(found) == adapted and not carriers(peft_model)


def test_same_seed_same_bits():
    """B14: whatever the global generator holds; rows that the gradient leaves over are among them."""
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(start(MLP(), mlp_batches(), lora_ga("random", "weight_svd", r=20)).state_dict())
    assert same(*states)


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_the_scale_of_the_loss_does_not_matter(scale):
    """B1."""
    loader, model = mlp_batches(), MLP()

    def train_step() -> None:
        for batch in loader:
            (model(**batch)["loss"] * scale).backward()

    preprocess_loraga(model, lora_ga(), train_step)
    scaled, plain = get_peft_model(model, lora_ga()), start(MLP(), loader)
    for layer in plain.loraga_report.layers:
        for a, b in zip(matrices(scaled, layer.name), matrices(plain, layer.name), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dora, dropout", [(True, 0.0), (False, 0.5), (True, 0.5)])
def test_dora_and_dropout_start_at_the_base_function(dora, dropout):
    """B24: in training mode, too, and there is nothing to warn of."""
    model, loader = MLP(), mlp_batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_model = start(model, loader, lora_ga(use_dora=dora, lora_dropout=dropout)).train()
    assert same(bits(peft_model), bits(MLP()))
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))
    for index, layer in enumerate(MLP().layers):
        pairs(peft_model, f"layers.{index}")
        for magnitude in peft_model.base_model.model.layers[index].lora_magnitude_vector.values():
            torch.testing.assert_close(magnitude.weight, layer.weight.norm(dim=1))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_model_on_another_device_than_the_default_one(device):
    loader = [{key: value.to(device) for key, value in batch.items()} for batch in mlp_batches()]
    peft_model = start(MLP().to(device), loader, lora_ga(scale="weight_svd"))
    assert all(parameter.device.type == device for parameter in peft_model.parameters())
    close(output(peft_model, loader[0]), output(MLP().to(device), loader[0]))


# ------------------------------------------------------------------------------- what is saved

# a process that has no loraga: reads each adapter onto the original base, and writes what it computes
READER = """
import sys
sys.modules["loraga"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, batch, *adapters = sys.argv[1:]
batch = torch.load(batch)
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(**batch).logits, f"{adapter}/logits.pt")
"""


@pytest.mark.slow
def test_whatever_a_trainer_saves_is_right_on_the_original_base_without_loraga(tmp_path):
    """B7, B34: also where somebody converts out of habit, with the folder of the initial adapter, as PEFT's docs do."""
    model, loader = build("llama"), batches("llama")
    model.save_pretrained(tmp_path / "base")
    before, weights = output(model, loader[0]), bits(model)
    peft_model = start(model, loader, lora_ga(use_rslora=False))
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path / "initial")
    peft_model.peft_config["default"].init_lora_weights = "lora_ga"
    arguments = TrainingArguments(
        tmp_path / "trainer",
        per_device_train_batch_size=6,
        max_steps=4,
        learning_rate=1e-2,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [dict(zip(batch, row, strict=True)) for batch in loader for row in zip(*batch.values(), strict=True)]
    trainer = Trainer(peft_model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved by the trainer")
    peft_model.save_pretrained(tmp_path / "saved")
    peft_model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert same(bits(peft_model), weights)
    expected = output(peft_model.eval(), loader[0])
    assert (expected - before).norm() > 0.1 * before.norm()  # it has learned something
    torch.save(loader[0], tmp_path / "batch.pt")
    folders = ["trainer/checkpoint-4", "saved by the trainer", "saved", "converted"]
    command = [sys.executable, "-W", "ignore", "-c", READER, "base", "batch.pt", *folders]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    for folder in folders:
        close(torch.load(tmp_path / folder / "logits.pt"), expected)


def test_an_adapter_is_read_right_where_gradients_wait(tmp_path):
    """B20: what was started by them is overwritten by what is in the file, and the base stays."""
    loader = mlp_batches()
    peft_model = trained(start(MLP(), loader))
    peft_model.save_pretrained(tmp_path)
    waiting = MLP()
    preprocess_loraga(waiting, lora_ga(), step_of(waiting, loader))
    read = PeftModel.from_pretrained(waiting, tmp_path)
    assert read.peft_config["default"].init_lora_weights == "lora_ga" and same(bits(read), bits(MLP()))
    assert torch.equal(output(read, loader[0]), output(peft_model, loader[0]))


# ------------------------------------------------------------------------------- beside other adapters


def second_of_peft(model: nn.Module, lora: LoraConfig) -> nn.Module:
    model.add_adapter("second", lora)
    return model.base_model.model


def second_of_transformers(model: nn.Module, lora: LoraConfig) -> nn.Module:
    model.add_adapter(lora, "second")
    return model


@pytest.mark.parametrize("first", [{}, {"use_dora": True}, {"init_lora_weights": "lora_ga"}])
@pytest.mark.parametrize("add", [second_of_peft, second_of_transformers])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_adapter_beside_a_trained_one(first, add):
    """B21, B36: started as on the bare base, since the first one is off while gradients are taken; that one stays."""
    model, loader = build("llama"), batches("llama")
    lora = lora_ga("random", target_modules=["q_proj", "up_proj"])
    beside = config(target_modules=["q_proj", "down_proj"], **first)
    if add is second_of_peft:
        model = get_peft_model(model, beside)
    else:
        model.add_adapter(beside, "default")
    before = output(trained(model), loader[0])
    assert (before - output(build("llama"), loader[0])).norm() > 0.01 * before.norm()
    with pytest.raises(KeyError):
        preprocess_loraga(model, lora, lambda: {}["mine"])
    assert torch.equal(output(model, loader[0]), before)
    preprocess_loraga(model, lora, step_of(model, loader))
    inside = add(model, lora)
    model.set_adapter("default")
    assert torch.equal(output(model, loader[0]), before)
    model.set_adapter("second")
    close(output(model, loader[0]), output(build("llama"), loader[0]))
    alone = init(
        build("llama"), loader, config(target_modules=lora.target_modules), init=loraga.InitConfig(direction="random")
    )
    assert len(alone.loraga_report.initialised) == 4
    for layer in alone.loraga_report.layers:
        held, (A, B) = inside.get_submodule(layer.name), matrices(alone, layer.name)
        assert torch.equal(held.lora_A["second"].weight, A) and torch.equal(held.lora_B["second"].weight, B)


# ------------------------------------------------------------------------------- quantized and shared weights

QUANTIZED = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.mark.parametrize("scale", ["stable", "weight_svd"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights(kind, scale, tmp_path):
    """B35: the function and the stored bytes stay, and the adapter is right on the base loaded anew."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (it is in the test extra)")
    build("llama").save_pretrained(tmp_path / "base")
    loader = batches("llama", count=2, rows=3)

    def load() -> nn.Module:  # in training mode bitsandbytes computes the same every time
        quantization = BitsAndBytesConfig(**QUANTIZED[kind])
        path = tmp_path / "base"
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32).train()

    model = load()
    before, weights = output(model, loader[0]), bits(model)
    peft_model = start(model, loader, lora_ga(scale=scale)).train()
    assert len(peft_model.loraga_report.initialised) == 14
    close(output(peft_model, loader[0]), before)
    ours = init(load(), loader, init=loraga.InitConfig(scale=SCALES[scale]))
    for layer in ours.loraga_report.layers:
        for a, b in zip(matrices(peft_model, layer.name), matrices(ours, layer.name), strict=True):
            assert b.any() and torch.equal(a, b), layer.name
    expected = output(trained(peft_model), loader[0])
    peft_model.save_pretrained(tmp_path / "adapter")
    assert same(bits(peft_model), weights)
    read = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()
    close(output(read, loader[0]), expected)
    assert (expected - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_tied_output_layer(together, tmp_path):
    """B13: the embedding stays; with `ensure_weight_tying` PEFT's two adapters share what is written."""
    loader, targets = batches("llama"), ["lm_head", "q_proj"]

    def tied() -> nn.Module:
        return build("llama", tie_word_embeddings=True)

    peft_model = start(tied(), loader, lora_ga(target_modules=targets, ensure_weight_tying=together))
    A0, _ = pairs(peft_model, "lm_head")
    assert A0.any()
    assert same(bits(peft_model), bits(tied()))
    close(output(peft_model, loader[0]), output(tied(), loader[0]))
    expected = output(trained(peft_model), loader[0])
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(tied(), tmp_path), loader[0]), expected)


def test_one_parameter_in_two_targets():
    """B29."""

    def shared() -> nn.Module:
        model = MLP((40, 40, 40, 12))
        model.layers[1].weight = model.layers[0].weight
        return model

    loader = mlp_batches()
    peft_model = start(shared(), loader)
    ours = init(shared(), loader)
    assert same(bits(peft_model), bits(shared()))
    close(output(peft_model, loader[0]), output(shared(), loader[0]))
    for name in ("layers.0", "layers.1"):
        assert torch.equal(matrices(peft_model, name)[0], matrices(ours, name)[0])
    assert not torch.equal(matrices(ours, "layers.0")[0], matrices(ours, "layers.1")[0])


# ------------------------------------------------------------------------------- the user's step


class Repeated(nn.Module):
    """A layer called several times per forward, checkpointed in some way or not."""

    def __init__(self, kind: str = "plain", times: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.again, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 12)
        self.kind, self.times = kind, times

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.again(x))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.first(inputs)
        for _ in range(self.times):
            plain = self.kind == "plain"
            x = self.block(x) if plain else checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")
        logits = self.last(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("kind", ["plain", "non-reentrant", "reentrant"])
def test_each_backward_call_is_one_micro_batch(kind):
    """B10: not each call of a layer; also where checkpointing runs backward inside backward."""
    model, loader = Repeated(kind), mlp_batches()
    exact = exact_gradients(Repeated(), ["first", "again", "last"], loader)
    preprocess_loraga(model, lora_ga(target_modules=["first", "again", "last"]), step_of(model, loader))
    assert model.loraga_report.micro_batches == 4
    for name, carrier in carriers(model).items():
        spectrum = torch.linalg.svdvals(exact[name])[:R].tolist()
        assert carrier.factors.S.tolist() == pytest.approx(spectrum, rel=1e-3), name


def test_micro_batches_however_forward_and_backward_are_ordered():
    loader = mlp_batches()
    exact = exact_gradients(MLP(), ["layers.1"], loader)["layers.1"]
    spectrum = torch.linalg.svdvals(exact)[:R]

    def at_the_end(model: nn.Module) -> None:
        for loss in [model(**batch)["loss"] for batch in loader]:
            loss.backward()

    def in_one(model: nn.Module) -> None:
        sum(model(**batch)["loss"] for batch in loader).backward()

    def by_the_engine(model: nn.Module) -> None:
        torch.autograd.backward([model(**batch)["loss"] for batch in loader])

    for step, count in ((at_the_end, 4), (in_one, 1), (by_the_engine, 1)):
        model = MLP()
        preprocess_loraga(model, lora_ga(), lambda step=step, model=model: step(model))
        assert model.loraga_report.micro_batches == count
        expected = (spectrum * 4 / count).tolist()
        assert carriers(model)["layers.1"].factors.S.tolist() == pytest.approx(expected, rel=1e-3)


def test_an_in_place_activation_behind_a_target_works():
    """B30."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 96), nn.ReLU(inplace=True), nn.Linear(96, 12))

    def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])

    model, (batch,) = net(), mlp_batches(1)
    preprocess_loraga(model, lora_ga(target_modules=["0", "2"]), lambda: loss_of(model, batch).backward())
    for name, gradient in exact_gradients(net(), ["0", "2"], [batch], loss_of).items():
        spectrum = torch.linalg.svdvals(gradient)[:R].tolist()
        assert carriers(model)[name].factors.S.tolist() == pytest.approx(spectrum, rel=1e-3)


class Noisy(MLP):
    """Dropout and BatchNorm, both of which would show in training mode."""

    def __init__(self) -> None:
        super().__init__((40, 40, 12))
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(40)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(self.drop(self.norm(inputs)), labels)


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_but_the_gradient_is_left_at_the_model(mode):
    """B11, B12, B19: gradients, modes, flags, buffers, hooks; and no weight gradient is computed."""
    model = Noisy().train(mode != "eval")
    model.norm.train(mode == "eval")
    model.layers[0].bias.requires_grad_(False)
    model.layers[1].weight.grad = torch.full_like(model.layers[1].weight, 7.0)
    before, seen = everything_about(model), []

    def train_step() -> None:
        assert not any(p.requires_grad for p in model.parameters())
        for batch in mlp_batches():
            model.zero_grad(set_to_none=False)
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            seen.append([p.grad for p in model.parameters() if p.grad is not None])

    preprocess_loraga(model, lora_ga(), train_step)
    assert_same(everything_about(model), before)
    assert seen == [[]] * 4
    exact = exact_gradients(Noisy().eval(), ["layers.0"], mlp_batches())["layers.0"]
    assert captured(exact, carriers(model)["layers.0"].factors) > 0.999


def test_the_step_may_choose_the_mode():
    model = Noisy().eval()
    before, drawn = everything_about(model), []

    def train_step() -> None:
        model.train()
        for _ in range(2):
            batch = mlp_batches(1)[0]
            drawn.append(model(**batch)["logits"].detach())
            model(**batch)["loss"].backward()

    preprocess_loraga(model, lora_ga(), train_step)
    assert not torch.equal(drawn[0], drawn[1])  # dropout was on
    after = everything_about(model)
    after["rng"] = before["rng"]  # the step drew, and PEFT leaves that to the step
    assert_same(after, before)


@pytest.mark.parametrize("where", ["at once", "amid", "in backward", "flags"])
def test_a_step_that_raises_leaves_the_model_as_it_was(where, tmp_path):
    """B31."""
    model, loader = Noisy().train(), mlp_batches()
    model.layers[1].requires_grad_(False)
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    before = snapshot_of(model)

    def train_step() -> None:
        if where == "at once":
            raise KeyError("mine")
        if where == "flags":
            model.requires_grad_(True).eval()
        loss = model(**loader[0])["loss"]
        if where == "in backward":
            loss.register_hook(lambda _: {}["mine"])
        loss.backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        preprocess_loraga(model, lora_ga(), train_step, cache_file=str(tmp_path / "cache"))
    after = snapshot_of(model)
    assert_same(after, before)
    assert after["carriers"] == set() and not list(tmp_path.iterdir()) and not hasattr(model, "loraga_report")


class Unused(MLP):
    """A target that no batch reaches, and one whose result goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.aside = nn.Linear(40, 30), nn.Linear(40, 30)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.aside(inputs)
        return super().forward(inputs, labels)


def test_layers_without_a_gradient_are_named_and_ordinary(tmp_path):
    """B9; from the cache as well. What an earlier run left there is gone."""
    model, cache = Unused(), str(tmp_path / "cache")
    setattr(model.unused, ATTRIBUTE, torch.ones(30, 40))
    named = r"unused \(never called.*aside \(called, but no gradient"
    with pytest.warns(UserWarning, match=named) as caught:
        preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()), cache)
    assert caught[0].filename == __file__
    assert set(carriers(model)) == {"layers.0", "layers.1", "layers.2"}
    peft_model = get_peft_model(model, lora_ga())
    A, B = matrices(peft_model, "unused")
    assert A.any() and not B.any()
    close(output(peft_model, mlp_batches()[0]), output(Unused(), mlp_batches()[0]))
    with pytest.warns(UserWarning, match=named) as caught:
        preprocess_loraga(Unused(), lora_ga(), None, cache)
    assert caught[0].filename == __file__


def test_a_nan_micro_batch_is_left_out_and_named():
    model, loader = MLP(), mlp_batches()
    bad = {**loader[1], "inputs": torch.full_like(loader[1]["inputs"], torch.nan)}
    with pytest.warns(UserWarning, match="1 of 3 micro-batches gave NaN"):
        preprocess_loraga(model, lora_ga(), step_of(model, [loader[0], bad, loader[2]]))
    exact = exact_gradients(MLP(), ["layers.1"], [loader[0], loader[2]])["layers.1"]
    spectrum = torch.linalg.svdvals(exact)[:R].tolist()
    assert carriers(model)["layers.1"].factors.S.tolist() == pytest.approx(spectrum, rel=1e-3)


# ------------------------------------------------------------------------------- one clear error


def packed() -> nn.Module:
    """As GPTQ has it."""
    model = MLP()
    layer = model.layers[1]
    layer.register_buffer("qweight", layer.weight.detach().to(torch.int8))
    del layer.weight
    return model


def parallel() -> nn.Module:
    model = MLP()
    model.layers[1]._hf_tp_plan = "colwise"
    return model


def merged() -> nn.Module:
    model = get_peft_model(MLP(), config())
    model.merge_adapter()
    return model


REFUSED = {
    "unknown scale": (MLP, {"scale": "gd"}, r"scale='gd'.*'weight_svd'"),
    "unknown direction": (MLP, {"direction": "foo"}, "direction='foo'.*'ArB2r'"),
    "gamma": (MLP, {"gamma": 0}, "stable_gamma=0 must be"),
    "no target": (MLP, {"target_modules": ["nowhere"]}, r"No supported layers found.*'layers\.0'"),
    "no default": (MLP, {"target_modules": None}, "No supported layers found.*no default target_modules"),
    "no weight": (packed, {}, r"'layers\.1' .Linear. has no weight.*fast_init"),
    "tensor parallel": (parallel, {}, r"'layers\.1' is tensor-parallel .colwise."),
    "merged": (merged, {}, r"default is merged into layer 'layers\.0'; call unmerge_adapter"),
    "parameters": (MLP, {"target_parameters": ["layers.1.weight"]}, "target_parameters.*fast_init"),
    "replication": (MLP, {"layer_replication": [(0, 1)]}, "layer_replication.*fast_init"),
}
if "kasa_config" in LoraConfig.__dataclass_fields__:  # since 0.21
    REFUSED["kasa"] = (MLP, {"kasa_config": {}}, "kasa_config.*fast_init")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_step_runs(case):
    """B18, B32."""
    make, options, message = REFUSED[case]
    model = make()
    before = snapshot_of(model)
    with pytest.raises(ValueError, match=message):
        preprocess_loraga(model, lora_ga(**options), lambda: pytest.fail("the step ran"))
    assert_same(snapshot_of(model), before)


def test_a_step_without_a_gradient_is_an_error():
    model = MLP()
    with pytest.raises(ValueError, match="None of the 3 target layers saw a gradient: none was called"):
        preprocess_loraga(model, lora_ga(), lambda: None)
    with pytest.raises(ValueError, match="gradient is zero at every target"):
        preprocess_loraga(model, lora_ga(), lambda: (0 * model(**mlp_batches()[0])["loss"]).backward())
    assert not carriers(model)


def test_a_larger_rank_needs_another_run_and_a_smaller_one_does_not():
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    smaller = get_peft_model(copy.deepcopy(model), lora_ga(r=2))
    assert pairs(smaller, "layers.0")[0].shape == (1, 40)
    why = r"'layers\.0'.*ran for a smaller rank .4 singular triplets, and r=6 needs 6.; run it again"
    with pytest.raises(ValueError, match=why):
        get_peft_model(model, lora_ga(r=6))


def test_adapters_without_storage_are_one_clear_error():
    """B33: PEFT makes them on the meta device for offloaded layers, and with `low_cpu_mem_usage`."""
    model = cpu_offload(MLP(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'layers\.0' .Linear. is offloaded.*fast_init"):
        preprocess_loraga(model, lora_ga(), lambda: pytest.fail("the step ran"))
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    with pytest.raises(ValueError, match="leave out low_cpu_mem_usage=True"):
        get_peft_model(model, lora_ga(), low_cpu_mem_usage=True)


# ------------------------------------------------------------------------------- the cache file


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_cached_gradients_give_the_same_start_and_the_step_is_not_run(name, tmp_path):
    model, loader = model_and_batches(name)
    again, cache = copy.deepcopy(model), str(tmp_path / "new" / "folder" / "cache.pt")
    fresh = start(model, loader, cache_file=cache).state_dict()
    preprocess_loraga(again, lora_ga(), lambda: pytest.fail("the step ran"), cache_file=cache)
    cached = get_peft_model(again, lora_ga()).state_dict()
    assert all(torch.equal(value, cached[key]) for key, value in fresh.items())


def test_a_cache_file_needs_no_folder_and_is_smaller_than_the_gradients(tmp_path, monkeypatch):
    """B25."""
    monkeypatch.chdir(tmp_path)
    start(build("llama"), batches("llama", 1), cache_file="cache.pt")
    targets = sum(p.numel() for n, p in build("llama").named_parameters() if "_proj" in n)
    assert 0 < (tmp_path / "cache.pt").stat().st_size < 4 * targets / 4
    (tmp_path / "empty.pt").touch()  # PEFT takes an empty file for none
    start(MLP(), mlp_batches(), cache_file="empty.pt")
    assert (tmp_path / "empty.pt").stat().st_size > 0


def test_a_cache_that_does_not_fit_is_refused(tmp_path):
    """B26."""
    cache = str(tmp_path / "cache.pt")
    start(MLP(), mlp_batches(), cache_file=cache)
    (tmp_path / "text.pt").write_text("not a cache")
    torch.save([1], tmp_path / "list.pt")
    cases = (
        (
            MLP((40, 96, 64, 12)),
            lora_ga(),
            cache,
            r"another model: layer 'layers\.1' is \(64, 96\) here and \(56, 96\)",
        ),
        (MLP((40, 96, 56, 56, 12)), lora_ga(), cache, r"another model: layer 'layers\.2'"),
        (Unused(), lora_ga(), cache, "knows nothing of layer 'unused'"),
        (MLP(), lora_ga(r=6), cache, r"a smaller rank: it holds 4 .*layer 'layers\.0', and r=6 needs 6"),
        (MLP(), lora_ga(), tmp_path / "text.pt", "cannot be read"),
        (MLP(), lora_ga(), tmp_path / "list.pt", "no gradients by layer"),
    )
    for model, lora, file, message in cases:
        before = snapshot_of(model)
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*{message}.*Delete it"):
            preprocess_loraga(model, lora, lambda: pytest.fail("the step ran"), cache_file=file)
        assert_same(snapshot_of(model), before)
    for model in (MLP(), get_peft_model(MLP(), config())):  # fewer will do, and what is beside it does not matter
        preprocess_loraga(model, lora_ga(r=2, target_modules=["layers.0"]), None, cache_file=cache)
        assert len(carriers(model)) == 1


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_gradients_that_peft_computed_itself_are_taken(name, tmp_path):
    """Its cache file, and what it left at the layers before the plugin was applied."""
    model, loader = model_and_batches(name)
    theirs, cache = copy.deepcopy(model), str(tmp_path / "cache.pt")
    lora = lora_ga(target_modules=["c_fc", "c_proj"] if name == "gpt2" else ["layers.0", "layers.1"])
    loraga.restore_peft()
    step = step_of(theirs, loader)
    preprocess_loraga(theirs, lora, lambda: step(theirs.eval()), cache_file=cache)  # PEFT trains with dropout
    assert all(isinstance(gradient, torch.Tensor) for gradient in carriers(theirs).values())
    loraga.apply_to_peft()
    names = list(carriers(theirs))
    exact = exact_gradients(model, names, loader)
    from_cache = start(copy.deepcopy(model), [], lora, cache_file=cache)
    for peft_model in (get_peft_model(theirs, lora), from_cache):
        close(output(peft_model, loader[0]), output(model, loader[0]))
        for layer in names:
            assert objective_excess(exact[layer], unit_factors(peft_model, layer), P) < 1e-3, layer


# ------------------------------------------------------------------------------- on and off


def functions() -> list:
    """Everything the plugin may touch: the public names, what the wrapper calls, the helper and the method."""
    inside = [cell.cell_contents for cell in preprocess_loraga.__closure__]
    names = [peft.preprocess_loraga, peft_loraga.preprocess_loraga, peft_loraga.get_target_modules]
    return [*names, *inside, peft_loraga.estimate_gradients, LoraLayer.lora_ga_init, LoraLayer.update_layer]


def test_applied_twice_is_once_and_restored_is_as_before():
    loraga.restore_peft()
    before = functions()
    loraga.restore_peft()  # harmless
    loraga.apply_to_peft()
    applied = functions()
    loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), applied, strict=True))
    assert sum(a is not b for a, b in zip(applied, before, strict=True)) == 3
    loraga.restore_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))


def test_whoever_imported_earlier_is_served_and_given_back():
    """This file imported it before anything was applied; PEFT's own gradient is a tensor."""
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    assert all(isinstance(gradient, plugin.SketchedGradient) for gradient in carriers(model).values())
    later = MLP()
    peft_loraga.estimate_gradients(later, lora_ga(), step_of(later, mlp_batches()))
    for name, gradient in carriers(later).items():
        assert torch.equal(gradient.factors.U, carriers(model)[name].factors.U)
    loraga.restore_peft()
    with pytest.raises(ValueError, match=r"'layers\.0' was sketched.*only after get_peft_model"):
        get_peft_model(model, lora_ga())
    plain = MLP()
    explicit = lora_ga(target_modules=["layers.0"])
    preprocess_loraga(plain, explicit, step_of(plain, mlp_batches()))
    assert isinstance(getattr(plain.layers[0], ATTRIBUTE), torch.Tensor)


def test_gradients_are_on_although_peft_switches_them_off_around():
    model, loader = MLP(), mlp_batches()
    with torch.inference_mode():
        preprocess_loraga(model, lora_ga(), step_of(model, loader))
    assert carriers(model)
    assert not torch.is_inference(get_peft_model(model, lora_ga()).base_model.model.layers[0].weight)


@pytest.mark.parametrize(
    "version, why",
    [("0.18.1", "has no LoRA-GA; it came with 0.19"), ("0.22.0", "not known"), ("1.0.0.dev0", "not known")],
)
def test_an_unknown_peft_is_refused(version, why, monkeypatch):
    loraga.restore_peft()
    before = functions()
    monkeypatch.setattr(peft, "__version__", version)
    remedy = r".*Checked releases: 0\.19, 0\.20, 0\.21\..*fast_init"
    with pytest.raises(RuntimeError, match=rf"PEFT {re.escape(version)} {why}{remedy}" if "LoRA" in why else why):
        loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))


@pytest.mark.parametrize(
    "owner, name, other, why",
    [
        ("module", "estimate_gradients", lambda model, step: None, "another estimate_gradients"),
        ("module", "preprocess_loraga", lambda model: None, "another preprocess_loraga"),
        ("layer", "lora_ga_init", lambda self, adapter_name: None, r"another LoraLayer\.lora_ga_init"),
    ],
)
def test_a_peft_that_is_built_differently_is_refused(owner, name, other, why, monkeypatch):
    loraga.restore_peft()
    monkeypatch.setattr(peft_loraga if owner == "module" else LoraLayer, name, other)
    before = functions()
    with pytest.raises(RuntimeError, match=why):
        loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))
