"""An adapter with a start: same function, right on disk, all else untouched. B numbers: shared/peer-faults.md."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loraga._version import release_of
from loraga.integrations import peft as adapters
from loraga.offsets import AnchoredLinear

OFFSETS = ("anchor", "subtract", "zero-b")
UNTOUCHED = ("anchor", "zero-b")
MODELS = ("llama", "gpt2", "mlp")
DRIFT = 2e-5


class MLP(nn.Module):
    """A plain module: rectangular layers, and an output layer it does not tell anyone about."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        **options,
    )
    return LlamaForCausalLM(config)


def base_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return llama().eval()
    if kind == "sequential":  # one that a process without this file can unpickle
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 20, bias=False)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.15)
        return GPT2LMHeadModel(config).eval()
    return MLP().eval()


def inputs(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind in ("mlp", "sequential"):
        return torch.randn(7, 24, generator=generator)
    return torch.randint(0, 64, (3, 11), generator=generator)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


def starts_for(peft_model: PeftModel, adapter_name: str = "default", seed: int = 5) -> dict:
    """Random starts whose s B0 A0 is as large as W itself."""
    generator = torch.Generator().manual_seed(seed)
    starts = {}
    for slot in adapters.find_slots(peft_model, adapter_name)[0]:
        m, n = slot.shape
        A = torch.randn(slot.rank, n, generator=generator, dtype=torch.float64)
        B = torch.randn(m, slot.rank, generator=generator, dtype=torch.float64)
        B *= adapters.base_weight(slot).norm() / (slot.scaling * (B @ A).norm())
        starts[slot.name] = (A.float(), B.float())
    return starts


def config(**options) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options})


def started(base: nn.Module, offset: str, adapter_name: str = "default", **options) -> PeftModel:
    peft_model = adapters.inject(base, config(**options), adapter_name)
    adapters.write_start(peft_model, adapter_name, starts_for(peft_model, adapter_name), offset)
    return peft_model.eval()


def disturb(peft_model: PeftModel, seed: int = 1) -> None:
    """As if trained for a while."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = DRIFT) -> None:
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ----------------------------------------------------------------------------------------------- function at the start


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", MODELS)
def test_function_is_unchanged_at_the_start(kind, offset):
    x = inputs(kind)
    reference = output(base_model(kind), x)
    peft_model = started(base_model(kind), offset)
    close(output(peft_model, x), reference)
    disturb(peft_model)
    assert relative(output(peft_model, x), reference) > 1e-2  # it does train


@pytest.mark.parametrize("kind", MODELS)
def test_the_starts_are_not_small(kind):
    """A start that is cancelled by accident of being tiny would prove nothing."""
    x = inputs(kind)
    reference = output(base_model(kind), x)
    assert relative(output(started(base_model(kind), "none"), x), reference) > 0.3


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "mlp.down_proj": 5}, "alpha_pattern": {"v_proj": 11, "down_proj": 3}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 11}, "use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"exclude_modules": ["k_proj"]},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_function_is_unchanged_with_every_option(options, offset, tmp_path):
    base = llama(attention_bias=True)
    x = inputs("llama")
    reference = output(base, x)
    peft_model = started(base, offset, **options)
    close(output(peft_model, x), reference)
    disturb(peft_model)
    trained = output(peft_model, x)
    assert relative(trained, reference) > 1e-3
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(llama(attention_bias=True), tmp_path), x), trained)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", UNTOUCHED)
def test_disabled_adapter_is_the_base_bit_for_bit(offset, dtype, kind):
    """B16, B23."""
    x = inputs(kind).to(dtype) if kind == "mlp" else inputs(kind)
    base = base_model(kind).to(dtype)
    reference, weights = output(base, x), copy.deepcopy(base.state_dict())
    peft_model = started(base, offset)
    disturb(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, x), reference)
    with adapters.adapters_disabled(peft_model):
        assert torch.equal(output(peft_model, x), reference)
    unloaded = peft_model.unload()
    assert torch.equal(output(unloaded, x), reference)
    assert unloaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in unloaded.state_dict().items())


def test_half_precision_start_is_exact_with_anchor():
    """B23: rounding of the base moves the function with subtract, not with anchor."""
    x = inputs("llama")
    base = base_model("llama").bfloat16()
    reference = output(base, x)
    close(output(started(copy.deepcopy(base), "anchor"), x), reference, 1e-6)
    close(output(started(copy.deepcopy(base), "subtract"), x), reference, 3e-2)


@pytest.mark.parametrize("offset", UNTOUCHED)
def test_dropout_in_train_mode_leaves_the_start_alone(offset):
    """B24."""
    x = inputs("llama")
    reference = output(base_model("llama"), x)
    peft_model = started(base_model("llama"), offset, lora_dropout=0.1)
    close(output(peft_model.train(), x), reference)


def test_subtract_warns_of_dropout():
    """B24: there the paper's own form cannot cancel."""
    peft_model = adapters.inject(base_model("mlp"), config(lora_dropout=0.1), "default")
    with pytest.warns(UserWarning, match="lora_dropout=0.1"):
        adapters.write_start(peft_model, "default", starts_for(peft_model), "subtract")


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unmerge(kind, offset):
    x = inputs(kind)
    peft_model = started(base_model(kind), offset)
    disturb(peft_model)
    trained = output(peft_model, x)
    peft_model.merge_adapter()
    close(output(peft_model, x), trained)
    peft_model.unmerge_adapter()
    close(output(peft_model, x), trained)
    close(output(peft_model.merge_and_unload(), x), trained)


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_casts_reach_both_halves(offset, cast):
    x = inputs("mlp")
    peft_model = getattr(started(base_model("mlp"), offset), cast)()
    dtypes = {tensor.dtype for tensor in (*peft_model.parameters(), *peft_model.buffers())}
    assert len(dtypes) == 1
    reference = output(base_model("mlp"), x)
    close(output(peft_model, x.to(*dtypes)), reference, DRIFT if cast == "double" else 5e-2)


# -------------------------------------------------------------------------------------------------------------- on disk

_PLAIN_READER = """
import sys, torch
sys.modules["loraga"] = None
sys.path.insert(0, {tests!r})
from peft import PeftModel
import pickle
with open({models!r}, "rb") as file:
    cases = pickle.load(file)
for base, x, directory, low in cases:
    model = PeftModel.from_pretrained(base.eval(), directory, low_cpu_mem_usage=low)
    with torch.no_grad():
        result = model(x)
    result = result if isinstance(result, torch.Tensor) else result.logits
    torch.save(result, directory + "/seen.pt")
assert sys.modules["loraga"] is None
"""


def test_saved_adapters_are_right_in_plain_peft_on_the_original_base(tmp_path):
    """B7, B17: a process that cannot import loraga, every offset and model, also read with low_cpu_mem_usage."""
    cases, expected = [], []
    for kind in ("llama", "gpt2", "sequential"):
        for offset in OFFSETS:
            for rslora in (False, True):
                directory = tmp_path / f"{kind}-{offset}-{rslora}"
                peft_model = started(base_model(kind), offset, use_rslora=rslora, rank_pattern={"1.*": 2})
                disturb(peft_model)
                peft_model.save_pretrained(directory)
                cases.append((base_model(kind), inputs(kind), str(directory), rslora))
                expected.append(output(peft_model, inputs(kind)))
    models, script = tmp_path / "models.pkl", tmp_path / "reader.py"
    models.write_bytes(pickle.dumps(cases))
    script.write_text(_PLAIN_READER.format(tests=str(tmp_path), models=str(models)))
    run = subprocess.run([sys.executable, "-W", "error::UserWarning:peft", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (_, _, directory, _), trained in zip(cases, expected, strict=True):
        close(torch.load(directory + "/seen.pt"), trained)


@pytest.mark.parametrize("offset", OFFSETS)
def test_saved_config_has_nothing_foreign(offset, tmp_path):
    """B7: and does not ask PEFT to initialise anything on loading."""
    peft_model = started(base_model("llama"), offset, init_lora_weights="gaussian")
    peft_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = tmp_path / "plain"
    get_peft_model(base_model("llama"), config()).save_pretrained(plain)
    assert saved.keys() == json.loads((plain / "adapter_config.json").read_text()).keys()
    assert saved["init_lora_weights"] is True
    assert saved["r"] == (3 if offset == "zero-b" else 6)
    assert saved["lora_alpha"] == (6 if offset == "zero-b" else 12)
    assert (tmp_path / "loraga.json").exists() is (offset != "zero-b")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights.keys() == load_file(plain / "adapter_model.safetensors").keys()


def warnings_of(offset: str | None, directory) -> set[str]:
    """What start, save and load say; None is plain PEFT."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = config(use_rslora=True)
        if offset is None:
            peft_model = get_peft_model(base_model("llama"), options)
        else:
            peft_model = started(base_model("llama"), offset, use_rslora=True)
        peft_model.save_pretrained(directory)
        again = PeftModel.from_pretrained(base_model("llama"), directory, is_trainable=True)
        if offset in ("anchor", "subtract"):
            adapters.attach_anchor(again, directory)
        peft_model.load_adapter(directory, "default")
        peft_model.load_adapter(directory, "second")
    close(output(again, inputs("llama")), output(peft_model, inputs("llama")))
    return {str(warning.message) for warning in caught}


@pytest.mark.parametrize("offset", OFFSETS)
def test_start_save_and_load_warn_no_more_than_plain_peft(offset, tmp_path):
    assert warnings_of(offset, tmp_path) <= warnings_of(None, tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
def test_loading_back_into_the_same_model(offset, low_cpu_mem_usage, tmp_path):
    """What a trainer does when it resumes or loads the best checkpoint."""
    x = inputs("llama")
    peft_model = started(base_model("llama"), offset)
    disturb(peft_model)
    trained = output(peft_model, x)
    peft_model.save_pretrained(tmp_path)
    disturb(peft_model, seed=2)
    assert relative(output(peft_model, x), trained) > 1e-3
    peft_model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(peft_model, x), trained)


@pytest.mark.parametrize("offset", ["anchor", "subtract"])
def test_full_state_dict_round_trip(offset):
    peft_model = started(base_model("llama"), offset)
    state = copy.deepcopy(peft_model.state_dict())
    assert not any("half" in key or "frozen" in key for key in state)
    trained = output(peft_model, inputs("llama"))
    disturb(peft_model)
    assert str(peft_model.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(output(peft_model, inputs("llama")), trained)
    del state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    lacking = peft_model.load_state_dict(state, strict=False)
    assert lacking.missing_keys == ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert not lacking.unexpected_keys


@pytest.mark.parametrize("offset", ["anchor", "subtract"])
def test_a_checkpoint_without_frozen_half_is_refused(offset, tmp_path):
    started(base_model("mlp"), "zero-b").save_pretrained(tmp_path)
    peft_model = started(base_model("mlp"), offset)
    with pytest.raises(RuntimeError, match="no frozen half"):
        peft_model.load_adapter(tmp_path, "default")


def test_a_checkpoint_of_another_start_is_refused_on_a_shifted_base(tmp_path):
    peft_model = adapters.inject(base_model("mlp"), config(), "default")
    adapters.write_start(peft_model, "default", starts_for(peft_model, seed=99), "subtract")
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="attach_anchor"):
        started(base_model("mlp"), "subtract").load_adapter(tmp_path, "default")


# ------------------------------------------------------------------------------------------------------ going on later


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 64, (2, 9), generator=generator) for _ in range(steps)]


def train(peft_model: nn.Module, data: list[torch.Tensor], optimizer=None) -> torch.optim.Optimizer:
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for ids in data:
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_anchor_trains_as_subtract_does(options):
    """The paper's dynamics, 20 AdamW steps with weight decay, in float64."""
    results = {}
    for offset in ("anchor", "subtract"):
        peft_model = started(base_model("llama").double(), offset, **options).train()
        train(peft_model, batches(20))
        results[offset] = output(peft_model.eval(), inputs("llama"))
    reference = output(base_model("llama").double(), inputs("llama"))
    assert relative(results["anchor"], reference) > 1e-3
    close(results["anchor"], results["subtract"], 1e-10)


@pytest.mark.parametrize("offset", ["anchor", "subtract"])
def test_attach_anchor_goes_on_with_the_same_training(offset, tmp_path):
    peft_model = started(base_model("llama").double(), offset, use_rslora=True).train()
    data = batches(8)
    optimizer = train(peft_model, data[:4])
    peft_model.save_pretrained(tmp_path)
    memory = copy.deepcopy(optimizer.state_dict())
    train(peft_model, data[4:], optimizer)

    again = PeftModel.from_pretrained(base_model("llama").double(), tmp_path, is_trainable=True)
    adapters.attach_anchor(again, tmp_path)
    assert again.print_trainable_parameters() == peft_model.print_trainable_parameters()
    resumed = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    resumed.load_state_dict(memory)
    train(again.train(), data[4:], resumed)
    close(output(again.eval(), inputs("llama")), output(peft_model.eval(), inputs("llama")), 1e-10)
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "loraga.json"):
        first, second = (json.loads((d / name).read_text()) for d in (tmp_path, tmp_path / "again"))
        for content in (first, second):
            content.pop("offset", None)  # subtract, saved again as anchor
            content.get("target_modules", []).sort()
        assert first == second


def test_attach_anchor_refuses_what_it_does_not_know(tmp_path):
    peft_model = started(base_model("mlp"), "anchor")
    with pytest.raises(ValueError, match=r"loraga\.json does not exist"):
        adapters.attach_anchor(peft_model, tmp_path)
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attached already"):
        adapters.attach_anchor(peft_model, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        adapters.attach_anchor(peft_model, tmp_path, "other")
    plain = get_peft_model(base_model("mlp"), config())
    with pytest.raises(ValueError, match="has rank 3"):
        adapters.attach_anchor(plain, tmp_path)
    assert type(plain.base_model.model.up.lora_A["default"]) is nn.Linear


def test_resuming_without_the_frozen_half_is_an_error_that_says_so(tmp_path):
    """Without it, a fused AdamW reads beyond the end of the saved state."""
    trainer(started(base_model("llama"), "anchor"), tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    read = PeftModel.from_pretrained(base_model("llama"), checkpoint, is_trainable=True)
    with pytest.raises(ValueError, match=r"attach_anchor\(model, checkpoint_dir\)"):
        trainer(read, tmp_path).train(resume_from_checkpoint=str(checkpoint))


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = torch.randint(0, 64, (24, 9), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(peft_model: nn.Module, directory, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        logging_strategy="no",
        **options,
    )
    return Trainer(model=peft_model, args=arguments, train_dataset=Rows())


@pytest.mark.parametrize("offset", OFFSETS)
def test_trainer_resumes_to_the_uninterrupted_weights(offset, tmp_path):
    whole = started(base_model("llama"), offset, lora_dropout=0.0)
    trainer(whole, tmp_path).train()
    resumed = started(base_model("llama"), offset)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    close(output(resumed.eval(), inputs("llama")), output(whole.eval(), inputs("llama")), 1e-6)
    if offset == "zero-b":
        return
    assert (tmp_path / "checkpoint-3" / "loraga.json").exists()
    read = PeftModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-3", is_trainable=True)
    adapters.attach_anchor(read, tmp_path / "checkpoint-3")
    trainer(read, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    close(output(read.eval(), inputs("llama")), output(whole.eval(), inputs("llama")), 1e-5)


# ------------------------------------------------------------------------------------------- several adapters, copies


@pytest.mark.parametrize("offset", OFFSETS)
def test_second_adapter_beside_it(offset, tmp_path):
    """B21: added, switched to and deleted; neither changes the other."""
    x = inputs("llama")
    peft_model = started(base_model("llama"), offset)
    disturb(peft_model)
    first = output(peft_model, x)
    peft_model.add_adapter("second", config(r=5, use_rslora=True))
    assert torch.equal(output(peft_model, x), first)
    peft_model.set_adapter("second")
    if offset in UNTOUCHED:
        assert torch.equal(output(peft_model, x), output(base_model("llama"), x))
    disturb(peft_model)
    peft_model.set_adapter("default")
    assert torch.equal(output(peft_model, x), first)
    assert not any("second" in name for name, p in peft_model.named_parameters() if p.requires_grad)
    assert sum("default" in name for name, p in peft_model.named_parameters() if p.requires_grad) == 28
    peft_model.save_pretrained(tmp_path)
    assert not (tmp_path / "second" / "loraga.json").exists()
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 5
    peft_model.delete_adapter("second")
    assert torch.equal(output(peft_model, x), first)


@pytest.mark.parametrize("offset", UNTOUCHED)
def test_starting_an_adapter_beside_a_trained_one(offset):
    """B21, B36: the trained one keeps its output bit for bit."""
    x = inputs("llama")
    peft_model = get_peft_model(base_model("llama"), config())
    disturb(peft_model)
    first = output(peft_model.eval(), x)
    options = config(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    peft_model.add_adapter("fresh", options)
    adapters.write_start(peft_model, "fresh", starts_for(peft_model, "fresh"), offset)
    assert torch.equal(output(peft_model, x), first)
    assert options.r == 2 and options.init_lora_weights == "gaussian"  # the user's object
    assert peft_model.peft_config["default"].r == 3
    peft_model.set_adapter("fresh")
    close(output(peft_model, x), output(base_model("llama"), x))
    peft_model.delete_adapter("fresh")
    assert torch.equal(output(peft_model, x), first)


def test_subtract_beside_another_adapter_is_refused():
    """B21: it would change what the other one computes."""
    peft_model = get_peft_model(base_model("mlp"), config())
    peft_model.add_adapter("second", config())
    with pytest.raises(ValueError, match=r"'default' beside 'second'.*anchor"):
        adapters.write_start(peft_model, "second", starts_for(peft_model, "second"), "subtract")


@pytest.mark.parametrize("offset", OFFSETS)
def test_an_adapter_can_be_started_again(offset):
    x = inputs("llama")
    peft_model = started(base_model("llama"), "anchor", use_dora=True)
    disturb(peft_model)
    adapters.write_start(peft_model, "default", starts_for(peft_model, seed=8), offset)
    close(output(peft_model, x), output(base_model("llama"), x))
    assert peft_model.peft_config["default"].r == (3 if offset == "zero-b" else 6)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.r["default"] == (6 if offset == "anchor" else 3)
    assert layer.scaling["default"] == pytest.approx(2.0) == layer.lora_alpha["default"] / layer.r["default"]


def test_adapters_made_from_an_anchored_one(tmp_path):
    """PEFT derives their config from its config; nothing of the frozen half sticks to it."""
    x = inputs("llama")
    peft_model = started(base_model("llama"), "anchor")
    disturb(peft_model)
    trained = output(peft_model, x)
    peft_model.add_weighted_adapter(["default"], [1.0], "blend", combination_type="linear")
    peft_model.set_adapter("blend")
    close(output(peft_model, x), trained)
    peft_model.save_pretrained(tmp_path)
    assert not (tmp_path / "blend" / "loraga.json").exists()
    close(output(PeftModel.from_pretrained(base_model("llama"), tmp_path / "blend"), x), trained)
    with pytest.raises(ValueError, match="not initialised with offset='subtract'"):
        adapters.restore_base(peft_model, "blend")
    adapters.write_start(peft_model, "blend", starts_for(peft_model, "blend"), "zero-b")
    close(output(peft_model, x), output(base_model("llama"), x))


def test_distributed_data_parallel(tmp_path):
    """The frozen half is no parameter that would wait for a gradient."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        peft_model = started(base_model("mlp"), "anchor").train()
        wrapped = DistributedDataParallel(peft_model)
        for _ in range(2):
            wrapped(inputs("mlp")).square().sum().backward()
    finally:
        distributed.destroy_process_group()
    assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("offset", OFFSETS)
def test_deepcopy_is_independent(offset, tmp_path):
    x = inputs("llama")
    peft_model = started(base_model("llama"), offset)
    twin = copy.deepcopy(peft_model)
    disturb(twin)
    close(output(peft_model, x), output(base_model("llama"), x))
    trained = output(twin, x)
    twin.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(base_model("llama"), tmp_path), x), trained)


def test_whole_model_can_be_pickled(tmp_path):
    peft_model = started(base_model("mlp"), "anchor")
    disturb(peft_model)
    torch.save(peft_model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(again, inputs("mlp")), output(peft_model, inputs("mlp")))


@pytest.mark.parametrize("offset", OFFSETS)
def test_torch_compile(offset):
    """One graph, forward and backward, with the numbers of eager mode."""
    x = inputs("mlp")
    peft_model = started(base_model("mlp"), offset)
    disturb(peft_model)
    compiled = torch.compile(peft_model.base_model.model, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (compiled, peft_model):
        peft_model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 6
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], 1e-5)
    close(output(compiled, x), output(peft_model, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids = batches(1)[0]
    gradients = []
    for checkpointing in (False, True):
        peft_model = started(base_model("llama"), "anchor").train()
        if checkpointing:
            peft_model.enable_input_require_grads()
            peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft_model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad})
    if release_of(transformers.__version__) >= (5, 0):
        assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    else:  # its attention rounds otherwise under checkpointing, with PEFT's own LoRA too
        for name, gradient in gradients[0].items():
            close(gradients[1][name], gradient, 1e-5)


# -------------------------------------------------------------------------------------------------- frozen, trainable


def test_only_the_trained_half_is_a_parameter():
    peft_model = started(base_model("llama"), "anchor")
    plain = get_peft_model(base_model("llama"), config())
    assert peft_model.get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0]
    layer = peft_model.base_model.model.model.layers[0].mlp.down_proj
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert (A.in_features, A.out_features, B.in_features, B.out_features) == (56, 6, 6, 32)
    assert A.weight.shape == (6, 56) and B.weight.shape == (32, 6)
    frozen = A.frozen.clone(), B.frozen.clone()
    train(peft_model, batches(2))
    assert torch.equal(A.frozen, frozen[0]) and torch.equal(B.frozen, frozen[1])
    assert not torch.equal(A.trained, A.frozen) and not torch.equal(B.trained, -B.frozen)


@pytest.mark.parametrize("offset", ["anchor", "subtract"])
def test_parameters_stay_the_same_objects(offset):
    """An optimizer made before the initialisation still holds what is trained."""
    peft_model = adapters.inject(base_model("mlp"), config(lora_bias=True), "default")
    before = [id(p) for p in peft_model.parameters() if p.requires_grad]
    adapters.write_start(peft_model, "default", starts_for(peft_model), offset)
    assert [id(p) for p in peft_model.parameters() if p.requires_grad] == before


def test_frozen_adapter_stays_frozen():
    peft_model = get_peft_model(base_model("mlp"), config(inference_mode=True))
    adapters.write_start(peft_model, "default", starts_for(peft_model), "anchor")
    assert not any(p.requires_grad for p in peft_model.parameters())


# ------------------------------------------------------------------------------------------------------ missing starts


@pytest.mark.parametrize("offset", OFFSETS)
def test_layers_without_a_start_stay_an_ordinary_lora(offset, tmp_path):
    x = inputs("llama")
    peft_model = adapters.inject(base_model("llama"), config(use_rslora=True), "default")
    starts = starts_for(peft_model)
    left_out = [name for name in starts if "v_proj" in name]
    ordinary = {name: peft_model.base_model.model.get_submodule(name).lora_A["default"].weight for name in left_out}
    ordinary = {name: weight.detach().clone() for name, weight in ordinary.items()}
    adapters.write_start(peft_model, "default", {n: s for n, s in starts.items() if n not in left_out}, offset)
    close(output(peft_model.eval(), x), output(base_model("llama"), x))
    for slot in adapters.find_slots(peft_model, "default")[0]:
        if slot.name in left_out:
            assert torch.equal(slot.lora_A.weight[:3], ordinary[slot.name])
            assert not slot.lora_B.weight.any() and not slot.lora_A.weight[3:].any()
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(base_model("llama"), tmp_path), x), output(peft_model, x))


class Mixed(nn.Module):
    """Layers loraga initialises beside layers it cannot; their names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 12, max_norm=1e3)  # which is never reached
        self.block = nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 12))
        self.conv = nn.Sequential(nn.Conv1d(12, 6, 1, dilation=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.block(self.table(x)).transpose(1, 2))


@pytest.mark.parametrize("offset", OFFSETS)
def test_layers_that_are_not_started_keep_their_rank(offset, tmp_path):
    torch.manual_seed(0)
    base = Mixed()
    x = torch.arange(10)[None]
    original = copy.deepcopy(base)
    options = config(target_modules=["0", "2", "table"], rank_pattern={"conv.0": 2}, alpha_pattern={"conv.0": 7})
    peft_model = adapters.inject(base, options, "default")
    slots, unsupported = adapters.find_slots(peft_model, "default")
    assert [slot.name for slot in slots] == ["block.0", "block.2"]
    assert list(unsupported) == ["table", "conv.0"] and "Conv1d" in unsupported["conv.0"]
    adapters.write_start(peft_model, "default", starts_for(peft_model), offset)
    close(output(peft_model, x), output(original, x))
    disturb(peft_model)
    trained = output(peft_model, x)
    peft_model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "saved", is_trainable=True)
    close(output(again, x), trained)
    if offset != "zero-b":
        adapters.attach_anchor(again, tmp_path / "saved")
    for model in (peft_model, again):
        adapters.export_adapter(model, tmp_path / "out", rank=6)
        close(output(PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "out"), x), trained)
        adapters.export_adapter(model, tmp_path / "small")
        small = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "small").base_model.model
        assert small.block[0].r["default"] == 3 and small.conv[0].r["default"] == 2
        here, there = (m.conv[0].lora_A["default"].weight for m in (small, model.base_model.model))
        assert torch.equal(here, there)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys|.*alpha_pattern keys")
def test_target_parameters_are_started(offset, tmp_path):
    """B32."""
    torch.manual_seed(0)
    base = Pair()
    original, x = copy.deepcopy(base), torch.randn(4, 8)
    peft_model = adapters.inject(base, config(target_modules=["first"], target_parameters=["second.weight"]), "default")
    slots, unsupported = adapters.find_slots(peft_model, "default")
    assert [slot.name for slot in slots] == ["first", "second.weight"] and not unsupported
    adapters.write_start(peft_model, "default", starts_for(peft_model), offset)
    close(output(peft_model, x), output(original, x))
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(original, tmp_path), x), output(peft_model, x))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_made_with_low_cpu_mem_usage(offset, use_dora):
    """B33: their weights do not exist yet."""
    x = inputs("llama")
    peft_model = get_peft_model(base_model("llama"), config(use_dora=use_dora), low_cpu_mem_usage=True)
    starts = starts_for(peft_model)
    starts.pop("model.layers.0.self_attn.q_proj")
    adapters.write_start(peft_model, "default", starts, offset)
    assert not any(p.is_meta for p in peft_model.parameters())
    close(output(peft_model.eval(), x), output(base_model("llama"), x))


def test_unstarted_layers_without_weights_are_an_error():
    """B33: PEFT made no weights for the convolution, and we would make none."""
    options = config(target_modules=["0", "2"])
    peft_model = get_peft_model(Mixed(), options, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"'conv\.0' has no weights yet.*low_cpu_mem_usage"):
        adapters.write_start(peft_model, "default", {}, "anchor")


# -------------------------------------------------------------------------------------------------------- tied weights


def tied(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "head":
        return llama(tie_word_embeddings=True).eval()
    model = base_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


@pytest.mark.parametrize("kind", ["head", "pair"])
@pytest.mark.parametrize("offset", UNTOUCHED)
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_tied_weights_are_no_problem_where_the_base_stays(offset, kind):
    """B13, B29."""
    x = inputs("llama")
    reference = output(tied(kind), x)
    peft_model = started(tied(kind), offset, target_modules=["lm_head", "up_proj"])
    close(output(peft_model, x), reference)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, x), reference)


@pytest.mark.parametrize("kind, names", [("head", "embed_tokens.*lm_head|lm_head.*embed_tokens"), ("pair", "up_proj")])
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_subtract_refuses_tied_weights(kind, names):
    """B13, B29."""
    peft_model = adapters.inject(tied(kind), config(target_modules=["lm_head", "up_proj"]), "default")
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ValueError, match=f"({names}).*anchor"):
        adapters.write_start(peft_model, "default", starts_for(peft_model), "subtract")
    after = peft_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# ------------------------------------------------------------------------------------------------------------- failure


def fingerprint(model: nn.Module) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"state": state, "flags": flags, "modules": [id(m) for m in model.modules()]}


def unchanged(model: nn.Module, before: dict) -> None:
    after = fingerprint(model)
    assert after["flags"] == before["flags"] and after["modules"] == before["modules"]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())


@pytest.mark.parametrize("offset", (*OFFSETS, "none"))
@pytest.mark.parametrize("anchored_before", [False, True])
def test_a_failing_write_leaves_everything_as_it_was(offset, anchored_before, monkeypatch):
    base = base_model("llama").bfloat16()
    peft_model = (
        started(base, "anchor", use_dora=True) if anchored_before else adapters.inject(base, config(), "default")
    )
    disturb(peft_model)
    before, settings = fingerprint(peft_model), peft_model.peft_config["default"]
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    numbers = dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling)
    from loraga.integrations import _writing

    writer, calls = _writing._WRITERS[offset], []

    def failing(slot, A0, B0):
        calls.append(slot.name)
        writer(slot, A0, B0)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setitem(_writing._WRITERS, offset, failing)
    with pytest.raises(KeyboardInterrupt):
        adapters.write_start(peft_model, "default", starts_for(peft_model, seed=6), offset)
    unchanged(peft_model, before)
    assert peft_model.peft_config["default"] is settings
    assert (dict(layer.r), dict(layer.lora_alpha), dict(layer.scaling)) == numbers
    monkeypatch.undo()
    adapters.write_start(peft_model, "default", starts_for(peft_model, seed=6), offset)


def test_bad_starts_are_named():
    peft_model = adapters.inject(base_model("mlp"), config(), "default")
    starts = starts_for(peft_model)
    before = fingerprint(peft_model)
    A, B = starts["up"]
    for bad, match in (
        ({"nowhere": (A, B)}, "nowhere"),
        ({"up": (A[:2], B)}, r"'up' has shapes \(2, 24\).*needs A \(3, 24\) and B \(40, 3\)"),
        ({"up": (A, B * float("nan"))}, "'up' has NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            adapters.write_start(peft_model, "default", bad, "anchor")
    with pytest.raises(ValueError, match=r"offset='anker'.*'anchor', 'subtract'"):
        adapters.write_start(peft_model, "default", starts, "anker")
    unchanged(peft_model, before)


@pytest.mark.parametrize("kind", MODELS)
def test_snapshot_restores_a_plain_model(kind):
    """B31: after an injection, whatever happened since."""
    model = base_model(kind).train()
    if kind != "mlp":
        model.config.pretraining_tp = 2  # PEFT sets it to 1
    first = next(model.parameters())
    first.requires_grad_(False)
    handle = model.register_forward_hook(lambda *args: None)
    before, attributes = fingerprint(model), sorted(model.__dict__)
    settings = copy.deepcopy(getattr(model, "config", None))
    modes = [m.training for m in model.modules()]
    restore = adapters.snapshot(model)
    peft_model = started(model, "anchor", modules_to_save=["head"] if kind == "mlp" else None)
    peft_model.eval()
    handle_since = model.register_forward_pre_hook(lambda *args: None)
    restore()
    unchanged(model, before)
    assert sorted(model.__dict__) == attributes
    assert [m.training for m in model.modules()] == modes
    assert not any(isinstance(m, LoraLayer) for m in model.modules())
    assert settings is None or model.config.to_dict() == settings.to_dict()
    assert len(model._forward_hooks) == 1 and not model._forward_pre_hooks
    handle.remove()
    handle_since.remove()
    assert not model._forward_hooks
    close(output(started(model, "anchor"), inputs(kind)), output(base_model(kind), inputs(kind)))


# ---------------------------------------------------------------------------------------------- finding and injecting


def test_inject_leaves_the_users_config_alone():
    """B27."""
    options = LoraConfig(r=4, target_modules=None, init_lora_weights=False)
    before = copy.deepcopy(options.to_dict())
    peft_model = adapters.inject(base_model("llama"), options, "default")
    assert options.to_dict() == before
    assert peft_model.peft_config["default"] is not options
    assert len(adapters.find_slots(peft_model, "default")[0]) == 4  # PEFT's default for llama: q and v


def test_replicated_layers_are_targets_too():
    replication = [(0, 2), (1, 2)]
    peft_model = adapters.inject(base_model("llama"), config(layer_replication=replication), "default")
    slots = adapters.find_slots(peft_model, "default")[0]
    assert len(slots) == 21
    assert slots[-1].name == "model.layers.2.mlp.down_proj"


def test_inject_without_a_config():
    peft_model = adapters.inject(base_model("mlp"), None, "mine")
    chosen = peft_model.peft_config["mine"]
    assert (chosen.r, chosen.lora_alpha, chosen.use_rslora) == (8, 16, True)
    assert [slot.name for slot in adapters.find_slots(peft_model, "mine")[0]] == ["up", "down", "head"]


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "orthogonal"])
def test_other_starts_are_left_aside(start):
    base = base_model("mlp")
    before = copy.deepcopy(base.state_dict())
    with pytest.warns(UserWarning, match=f"init_lora_weights='{start}' is left aside"):
        peft_model = adapters.inject(base, config(r=4, init_lora_weights=start), "default")
    assert all(torch.equal(value, before[name]) for name, value in peft_model.unload().state_dict().items())


def test_peft_lora_ga_config_is_taken_without_its_gradients():
    """B8: PEFT's own form of LoRA-GA, whose injection would need gradients."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    options = config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_model = adapters.inject(base_model("mlp"), options, "default")
    assert peft_model.peft_config["default"].lora_ga_config is None and options.lora_ga_config is not None


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nowhere"]},
        {"target_modules": "nothing.*"},
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        {"target_modules": "all-linear", "exclude_modules": ".*"},
    ],
)
def test_no_target_is_an_error_that_names_modules(options):
    model = base_model("mlp")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"target_modules=.* finds no linear layer in MLP, which has 'up', 'down'"):
        adapters.inject(model, config(**options), "default")
    unchanged(model, before)
    with pytest.raises(ValueError, match="no default target_modules for MLP"):
        adapters.inject(model, config(target_modules=None), "default")


def test_inject_twice_is_an_error():
    """B36."""
    model = base_model("mlp")
    peft_model = adapters.inject(model, config(), "default")
    with pytest.raises(TypeError, match="PeftModel"):
        adapters.inject(peft_model, config(), "default")
    with pytest.raises(ValueError, match="PEFT layers already"):
        adapters.inject(model, config(), "default")
    with pytest.raises(TypeError, match="LoraConfig"):
        adapters.inject(base_model("mlp"), {"r": 3}, "default")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "target, exclude",
    [
        ("all-linear", None),
        (None, None),
        (["up_proj", "c_fc"], None),
        ({"q_proj", "c_proj"}, ["1.self_attn.q_proj", "h.0.attn.c_proj"]),
        (r".*\.1\..*", r".*norm|.*ln_.*|.*(act|attn|mlp|dropout|self_attn|act_fn|act)|.*attn\.?\w*drop.*"),
    ],
)
def test_targets_are_those_of_peft(kind, target, exclude):
    """B27: for every form `target_modules` takes, on a plain model and on one with an adapter."""
    model = base_model(kind)
    before = fingerprint(model)
    found = adapters.find_target_names(model, target, exclude)
    unchanged(model, before)
    peft_model = get_peft_model(base_model(kind), LoraConfig(target_modules=target, exclude_modules=exclude))
    theirs = [name for name, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert list(found) == theirs and theirs
    assert all(module is model.get_submodule(name) for name, module in found.items())
    through = adapters.find_target_names(peft_model, target, exclude)
    assert list(through) == [f"base_model.model.{name}" for name in theirs]
    assert all(module is peft_model.get_submodule(name).base_layer for name, module in through.items())


def test_targets_of_prompt_learning_are_refused():
    from peft import PromptTuningConfig

    peft_model = get_peft_model(base_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="get_base_model"):
        adapters.find_target_names(peft_model)
    with pytest.raises(TypeError, match="initialises LoRA"):
        adapters.check_adapter(peft_model, "default")


def test_targets_beside_modules_to_save():
    """The copies that PEFT trains in full, and their originals, are no targets."""
    peft_model = get_peft_model(base_model("llama"), config(modules_to_save=["lm_head"]))
    found = adapters.find_target_names(peft_model)
    assert list(found) == [f"base_model.model.{name}" for name in adapters.find_target_names(base_model("llama"))]


def test_targets_of_a_plain_module_leave_its_output_layer_out():
    """B27."""
    model = base_model("mlp")
    assert list(adapters.find_target_names(model)) == ["up", "down", "head"]
    model.get_output_embeddings = lambda: model.head
    assert list(adapters.find_target_names(model)) == ["up", "down"]
    with pytest.raises(ValueError, match="nowhere"):
        adapters.find_target_names(model, ["nowhere"])


# ------------------------------------------------------------------------------------------------- looking at adapters


def test_check_adapter():
    peft_model = adapters.inject(base_model("mlp"), config(), "mine")
    with pytest.raises(ValueError, match=r"no adapter 'other'.*'mine'"):
        adapters.check_adapter(peft_model, "other")
    adapters.check_adapter(peft_model, "mine")
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into layer 'up'.*unmerge_adapter\(\)"):
        adapters.check_adapter(peft_model, "mine")
    from peft import LoKrConfig

    with pytest.raises(TypeError, match="LoRA"):
        adapters.check_adapter(get_peft_model(base_model("mlp"), LoKrConfig(target_modules=["up"])), "default")
    with pytest.raises(ValueError, match="restore_base"):
        adapters.check_adapter(started(base_model("mlp"), "subtract"), "default")


@pytest.mark.parametrize("kind", MODELS)
def test_slots_describe_the_layers(kind):
    """B4: sizes are out and in features, also where the transpose is stored."""
    base = base_model(kind)
    x = torch.randn(2, 200)
    peft_model = adapters.inject(base, config(rank_pattern={"mlp.*": 2}, alpha_pattern={"attn": 5}), "default")
    slots, unsupported = adapters.find_slots(peft_model, "default")
    assert not unsupported
    for slot in slots:
        m, n = slot.shape
        assert slot.base_layer(x[:, :n]).shape == (2, m)
        assert slot.base_layer.weight.shape == ((n, m) if slot.transposed else (m, n))
        assert slot.transposed == (type(slot.base_layer).__name__ == "Conv1D")
        assert adapters.base_weight(slot).shape == (m, n)
        bias = slot.base_layer.bias if slot.base_layer.bias is not None else 0
        close(slot.base_layer(x[:, :n]) - bias, x[:, :n] @ adapters.base_weight(slot).T, 1e-5)
        assert slot.rank == slot.layer.r["default"] and slot.scaling == slot.layer.scaling["default"]
        assert peft_model.base_model.model.get_submodule(slot.name) is slot.layer


def test_adapters_disabled_touches_nothing_else():
    """B31: requires_grad, and the state before, also after an exception."""
    peft_model = started(base_model("llama"), "anchor", modules_to_save=["lm_head"])
    disturb(peft_model)
    trained, before = output(peft_model, inputs("llama")), fingerprint(peft_model)
    with pytest.raises(KeyError), adapters.adapters_disabled(peft_model):
        assert torch.equal(output(peft_model, inputs("llama")), output(base_model("llama"), inputs("llama")))
        unchanged(peft_model, before)
        raise KeyError
    unchanged(peft_model, before)
    assert torch.equal(output(peft_model, inputs("llama")), trained)
    with peft_model.disable_adapter():
        with adapters.adapters_disabled(peft_model):
            pass
        assert torch.equal(output(peft_model, inputs("llama")), output(base_model("llama"), inputs("llama")))
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), adapters.adapters_disabled(peft_model):
        pass


class IntegerLinear(nn.Linear):
    """An int8 linear layer without a quant_state."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.weight = nn.Parameter((self.weight.data * 100).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) / 100).T


def test_quantized_base():
    """B35: named and refused by subtract, fine for the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), IntegerLinear(12, 10))
    x = torch.randn(3, 8)
    reference = model(x).detach()
    peft_model = adapters.inject(copy.deepcopy(model), config(target_modules=["0", "1"]), "default")
    first, second = adapters.find_slots(peft_model, "default")[0]
    assert not adapters.quantized(first.base_layer) and adapters.quantized(second.base_layer)
    starts = {s.name: (torch.randn(3, s.shape[1]), torch.randn(s.shape[0], 3)) for s in (first, second)}
    before = fingerprint(peft_model)
    with pytest.raises(ValueError, match=r"quantized weight of '1' .IntegerLinear.*'anchor' or 'zero-b'"):
        adapters.write_start(peft_model, "default", starts, "subtract")
    unchanged(peft_model, before)
    with pytest.raises(ValueError, match=r"'1' .IntegerLinear.*weight-svd"):
        adapters.base_weight(second)
    for offset in UNTOUCHED:
        peft_model = adapters.inject(copy.deepcopy(model), config(target_modules=["0", "1"]), "default")
        adapters.write_start(peft_model, "default", starts, offset)
        close(output(peft_model, x), reference)
        with peft_model.disable_adapter():
            assert torch.equal(output(peft_model, x), reference)


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("offset", (*OFFSETS, "none"))
@pytest.mark.parametrize("rank", [None, 1, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_export_is_the_best_approximation(kind, rank, offset, tmp_path):
    """B17: at the trainable rank again, with the error the exact SVD has; the base stays."""
    peft_model = started(base_model(kind), offset, use_rslora=True, alpha_pattern={"mlp.*": 4})
    disturb(peft_model)
    before = fingerprint(peft_model)
    errors = adapters.export_adapter(peft_model, tmp_path, rank=rank)
    unchanged(peft_model, before)
    read = PeftModel.from_pretrained(base_model(kind), tmp_path)
    assert read.peft_config["default"].r == (rank or 3)
    original = {slot.name: slot for slot in adapters.find_slots(read, "default")[0]}
    shifted = {slot.name: slot for slot in adapters.find_slots(peft_model, "default")[0]}
    assert errors.keys() == original.keys()
    for name, slot in shifted.items():
        delta = slot.layer.get_delta_weight("default").detach().double()
        delta += (slot.base_layer.weight - original[name].base_layer.weight).detach().double()
        exported = original[name].layer.get_delta_weight("default").detach().double()
        singular = torch.linalg.svdvals(delta)
        best = float(singular[rank or 3 :].norm() / singular.norm())
        assert errors[name] == pytest.approx(best, abs=1e-5)
        assert relative(exported, delta) == pytest.approx(best, abs=1e-5)
    assert json.loads((tmp_path / "loraga.json").read_text())["relative_error"] == errors


def test_export_keeps_what_else_the_adapter_holds(tmp_path):
    x = inputs("llama")
    peft_model = started(base_model("llama"), "anchor", modules_to_save=["lm_head"], use_dora=True)
    disturb(peft_model)
    errors = adapters.export_adapter(peft_model, tmp_path, rank=6)
    assert max(errors.values()) < 1e-6
    close(output(PeftModel.from_pretrained(base_model("llama"), tmp_path), x), output(peft_model, x))
    with pytest.raises(ValueError, match="rank=0"):
        adapters.export_adapter(peft_model, tmp_path, rank=0)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        adapters.export_adapter(peft_model, tmp_path, "other")


# ----------------------------------------------------------------------------------------------------------- subtract


@pytest.mark.parametrize("kind", MODELS)
def test_restore_base_gives_the_original_back(kind, tmp_path):
    """B16: disabled adapter, unload and deletion are right again, to rounding."""
    x = inputs(kind)
    base = base_model(kind)
    peft_model = started(copy.deepcopy(base), "subtract", use_rslora=True)
    disturb(peft_model)
    trained = output(peft_model, x)
    with peft_model.disable_adapter():
        assert relative(output(peft_model, x), output(base, x)) > 1e-2  # documented: the shifted base
    adapters.restore_base(peft_model)
    close(output(peft_model, x), trained)
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), trained)
    with pytest.raises(ValueError, match="not initialised with offset='subtract'"):
        adapters.restore_base(peft_model)
    close(output(peft_model.unload(), x), output(base, x))


def test_anchored_layers_are_linear_layers():
    """What PEFT, trainers and optimizers ask of a layer."""
    layer = started(base_model("mlp"), "anchor").base_model.model.up.lora_A["default"]
    assert isinstance(layer, nn.Linear) and isinstance(layer, AnchoredLinear)
    assert "in_features=24, out_features=6" in repr(layer)
