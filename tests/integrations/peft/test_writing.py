"""An adapter with a start beside one that PEFT made alone: the same but for its numbers. B: docs/peer-faults.md."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from adapters import (
    MODELS,
    RANK,
    STARTS,
    base_model,
    close,
    config,
    disturb,
    fingerprint,
    inputs,
    llama,
    output,
    relative,
    same_tensors,
    started,
    starts_for,
    structure_of,
    trained,
    unchanged,
    weights_of_base,
    write,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from loraga.integrations import peft as integration
from loraga.integrations.peft import writing as _writing
from loraga.integrations.peft.slots import AdapterSlot, is_fresh

# ----------------------------------------------------------------------------------------------- function at the start


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", MODELS)
def test_function_is_unchanged_at_the_start(kind, start):
    x, base = inputs(kind), base_model(kind)
    reference, weights = output(base, x), copy.deepcopy(base.state_dict())
    peft_model = started(base, start)
    if start == "zero-b":
        assert torch.equal(output(peft_model, x), reference)
    close(output(peft_model, x), reference)
    same_tensors(weights_of_base(peft_model), weights)
    disturb(peft_model)
    assert relative(output(peft_model, x), reference) > 1e-2  # it does train


@pytest.mark.parametrize("kind", MODELS)
def test_the_starts_are_not_small(kind):
    """A start that keeps the function because it is tiny would prove nothing."""
    x = inputs(kind)
    peft_model = started(base_model(kind))
    for slot in integration.find_slots(peft_model, "default")[0]:
        with torch.no_grad():
            slot.B[:, RANK // 2 :] = 0
    assert relative(output(peft_model, x), output(base_model(kind), x)) > 0.3


OPTIONS = [
    {},
    {"use_rslora": True},
    {"r": 5},
    {"r": 1},
    {"rank_pattern": {"q_proj": 2, "mlp.down_proj": 5}, "alpha_pattern": {"v_proj": 11, "down_proj": 3}},
    {"rank_pattern": {"^model.layers.1.mlp.up_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 64}},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"exclude_modules": ["k_proj"]},
    {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "gaussian"},
    {"lora_dropout": 0.1},
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_nothing_but_numbers_differs_from_what_peft_makes(options, start, tmp_path):
    """Also what is saved: the same files, keys and shapes, which give the trained function on the original base."""
    base, x = llama(attention_bias=True).eval(), inputs()
    reference, weights = output(base, x), copy.deepcopy(base.state_dict())
    plain = get_peft_model(llama(attention_bias=True).eval(), config(**options)).eval()
    peft_model = started(base, start, **options)
    assert structure_of(peft_model) == structure_of(plain)
    close(output(peft_model, x), reference)
    disturb(peft_model)
    after = output(peft_model, x)
    assert relative(after, reference) > 1e-3
    if "modules_to_save" not in options:
        same_tensors(weights_of_base(peft_model), weights)
    for model, folder in ((peft_model, tmp_path / "ours"), (plain, tmp_path / "plain")):
        model.save_pretrained(folder)
    ours, theirs = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "ours", tmp_path / "plain"))
    assert ours == theirs
    saved, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "plain"))
    for content in (saved, expected):
        content["target_modules"] = sorted(content["target_modules"])  # a set
    assert saved == expected
    shapes, others = (
        {key: value.shape for key, value in load_file(tmp_path / name / "adapter_model.safetensors").items()}
        for name in ("ours", "plain")
    )
    assert shapes == others
    close(output(PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "ours"), x), after)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_disabled_adapter_is_the_base_bit_for_bit(start, dtype, kind):
    """B16, B23."""
    x = inputs(kind).to(dtype) if kind == "mlp" else inputs(kind)
    base = base_model(kind).to(dtype)
    reference, weights = output(base, x), copy.deepcopy(base.state_dict())
    peft_model = trained(base, start)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, x), reference)
    with integration.adapters_disabled(peft_model):
        assert torch.equal(output(peft_model, x), reference)
    unloaded = peft_model.unload()
    assert torch.equal(output(unloaded, x), reference)
    same_tensors(unloaded.state_dict(), weights)


@pytest.mark.parametrize("start", STARTS)
def test_half_precision_start_is_exact(start):
    """B23: both halves are rounded alike, and the base is not touched."""
    x, base = inputs(), base_model().bfloat16()
    reference = output(base, x)
    close(output(started(base, start), x), reference, 1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_dropout_in_train_mode_leaves_the_start_alone(start):
    """B24: A and B of both halves see the same entries dropped."""
    peft_model = started(base_model(), start, lora_dropout=0.5)
    close(output(peft_model.train(), inputs()), output(base_model(), inputs()))


# -------------------------------------------------------------------------------------------------------------- on disk

_PLAIN_READER = """
import sys, torch
sys.modules["loraga"] = None
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


@pytest.mark.slow
def test_saved_adapters_are_right_in_plain_peft_on_the_original_base(tmp_path):
    """B7, B17: a process that cannot import loraga, every start and model, also read with low_cpu_mem_usage."""
    cases, expected = [], []
    for kind in ("llama", "gpt2", "sequential"):
        for start in STARTS:
            for rslora in (False, True):
                directory = tmp_path / f"{kind}-{start}-{rslora}"
                peft_model = trained(base_model(kind), start, use_rslora=rslora, rank_pattern={"1.*": 2})
                peft_model.save_pretrained(directory)
                cases.append((base_model(kind), inputs(kind), str(directory), rslora))
                expected.append(output(peft_model, inputs(kind)))
    models, script = tmp_path / "models.pkl", tmp_path / "reader.py"
    models.write_bytes(pickle.dumps(cases))
    script.write_text(_PLAIN_READER.format(models=str(models)))
    run = subprocess.run([sys.executable, "-W", "error::UserWarning:peft", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (_, _, directory, _), result in zip(cases, expected, strict=True):
        close(torch.load(directory + "/seen.pt"), result)


def warnings_of(start: str, directory) -> set[str]:
    """What start, save and load say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft_model = started(base_model(), start)
        peft_model.save_pretrained(directory)
        again = PeftModel.from_pretrained(base_model(), directory, is_trainable=True)
        peft_model.load_adapter(directory, "default")
        peft_model.load_adapter(directory, "second")
    close(output(again, inputs()), output(peft_model, inputs()))
    return {str(warning.message) for warning in caught}


@pytest.mark.parametrize("start", STARTS)
def test_start_save_and_load_warn_no_more_than_plain_peft(start, tmp_path):
    assert warnings_of(start, tmp_path) <= warnings_of("plain", tmp_path)


def test_folders_of_version_0_1_are_read_as_the_plain_loras_they_are(tmp_path):
    """They hold rank 2r (the frozen half as well), patterns of exact names, and a `loraga.json` that nobody needs."""
    plain = trained(base_model("mlp"), "plain", r=8, lora_alpha=16, rank_pattern={"^head": 2}, use_rslora=True)
    plain.save_pretrained(tmp_path)
    (tmp_path / "loraga.json").write_text('{"offset": "anchor", "frozen_half": "second", "trainable_rank": {"up": 4}}')
    read = PeftModel.from_pretrained(base_model("mlp"), tmp_path, is_trainable=True)
    assert torch.equal(output(read, inputs("mlp")), output(plain, inputs("mlp")))
    assert read.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    write(read)
    close(output(read, inputs("mlp")), output(base_model("mlp"), inputs("mlp")))


# ------------------------------------------------------------------------------------------------------- started again


@pytest.mark.parametrize("start", STARTS)
def test_starting_an_adapter_beside_a_trained_one(start):
    """B21, B36: the trained one keeps its output bit for bit."""
    x = inputs()
    peft_model = trained(base_model(), "plain")
    first = output(peft_model, x)
    options = config(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    peft_model.add_adapter("fresh", options)
    write(peft_model, start, "fresh")
    assert torch.equal(output(peft_model, x), first)
    assert options.r == 2 and options.init_lora_weights == "gaussian"  # the user's object
    peft_model.set_adapter("fresh")
    close(output(peft_model, x), output(base_model(), x))
    peft_model.delete_adapter("fresh")
    assert torch.equal(output(peft_model, x), first)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_trained_adapter_starts_again_as_a_fresh_one(options, start):
    """All of it: rows that the start leaves to PEFT and layers without a start are ordinary again, too."""
    results = []
    for peft_model in (
        trained(base_model("mlp"), start, r=8, **options),
        started(base_model("mlp"), "plain", r=8, **options),
    ):
        starts = starts_for(peft_model, start, seed=8)
        del starts["down"]
        integration.write_start(integration.Adapter.of(peft_model, "default"), starts, seed=3)
        results.append({name: p.detach().clone() for name, p in peft_model.named_parameters() if "lora_" in name})
        close(output(peft_model, inputs("mlp")), output(base_model("mlp"), inputs("mlp")))
    same_tensors(*results)


def test_parameters_stay_the_same_objects():
    """An optimizer made before the initialisation still holds what is trained."""
    peft_model = integration.inject(base_model("mlp"), config(lora_bias=True), "default")
    before = [id(p) for p in peft_model.parameters() if p.requires_grad]
    write(peft_model)
    assert [id(p) for p in peft_model.parameters() if p.requires_grad] == before


def test_frozen_adapter_stays_frozen():
    peft_model = get_peft_model(base_model("mlp"), config(inference_mode=True))
    write(peft_model)
    assert not any(p.requires_grad for p in peft_model.parameters())


# ------------------------------------------------------------------------------------------------------ missing starts


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("init_lora_weights", [True, "gaussian"])
def test_layers_without_a_start_are_ordinary(start, init_lora_weights):
    """As PEFT makes them: the same distribution, and B zero. The seed decides, so that every run and rank agrees."""
    peft_model = integration.inject(base_model(), config(init_lora_weights=init_lora_weights), "default")
    starts = starts_for(peft_model, start)
    left_out = {name for name in starts if "v_proj" in name}
    slots = {slot.name: slot for slot in integration.find_slots(peft_model, "default")[0]}
    made = {name: slots[name].A.detach().clone() for name in left_out}
    results = []
    for seed in (0, 0, 1):
        integration.write_start(
            integration.Adapter.of(peft_model, "default"),
            {n: s for n, s in starts.items() if n not in left_out},
            seed=seed,
        )
        results.append(torch.cat([slots[name].A.detach().flatten() for name in sorted(left_out)]))
        assert {name for name, slot in slots.items() if is_fresh(slot)} == (
            left_out if start == "mirror" else set(slots)
        )
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    expected = torch.cat([value.flatten() for value in made.values()])
    for quantity in (lambda a: a.std(), lambda a: a.abs().max()):
        close(quantity(results[0]), quantity(expected), 0.25)
    close(output(peft_model.eval(), inputs()), output(base_model(), inputs()))


@pytest.mark.parametrize("start", STARTS)
def test_a_head_of_five_outputs_gets_as_many_directions_as_it_has(start):
    peft_model = integration.inject(base_model("mlp"), config(r=8), "default")
    slot = next(s for s in integration.find_slots(peft_model, "default")[0] if s.name == "head")
    starts = starts_for(peft_model, start)
    integration.write_start(integration.Adapter.of(peft_model, "default"), starts)
    k = {"mirror": 7, "zero-b": 5}[start]
    assert len(starts["head"][0]) == k
    assert torch.equal(slot.A[:k], starts["head"][0])
    assert slot.A[k:].abs().max() <= 20**-0.5 and slot.A[k:].any(dim=1).all()  # PEFT's: uniform up to 1 / sqrt(n)
    assert torch.equal(slot.B[:, :k], starts["head"][1]) and not slot.B[:, k:].any()
    close(output(peft_model.eval(), inputs("mlp")), output(base_model("mlp"), inputs("mlp")))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys|.*alpha_pattern keys")
def test_target_parameters_are_started(start, tmp_path):
    """B32."""
    torch.manual_seed(0)
    base = Pair()
    original, x = copy.deepcopy(base), torch.randn(4, 8)
    options = config(target_modules=["first"], target_parameters=["second.weight"])
    peft_model = integration.inject(base, options, "default")
    slots, unsupported = integration.find_slots(peft_model, "default")
    assert [slot.name for slot in slots] == ["first", "second.weight"] and not unsupported
    write(peft_model, start)
    close(output(peft_model, x), output(original, x))
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(original, tmp_path), x), output(peft_model, x))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_made_with_low_cpu_mem_usage(start, use_dora):
    """B33: their weights do not exist yet."""
    peft_model = get_peft_model(base_model(), config(use_dora=use_dora), low_cpu_mem_usage=True)
    starts = starts_for(peft_model, start)
    starts.pop("model.layers.0.self_attn.q_proj")
    integration.write_start(integration.Adapter.of(peft_model, "default"), starts)
    assert not any(p.is_meta for p in peft_model.parameters())
    close(output(peft_model.eval(), inputs()), output(base_model(), inputs()))


class Mixed(nn.Module):
    """A linear layer beside one that loraga cannot start."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.conv = nn.Conv1d(20, 6, 1, dilation=2)


def test_unstarted_layers_without_weights_are_an_error():
    """B33: PEFT made no weights for the convolution, and we would make none."""
    peft_model = get_peft_model(Mixed(), config(target_modules=["linear", "conv"]), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"'conv' has no weights yet.*low_cpu_mem_usage"):
        integration.write_start(integration.Adapter.of(peft_model, "default"), {})


# ----------------------------------------------------------------------------------------- weights of a special kind


def tied(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "head":
        return llama(tie_word_embeddings=True).eval()
    model = base_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


@pytest.mark.parametrize("kind", ["head", "pair"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_tied_weights_are_no_problem(start, kind):
    """B13, B29."""
    reference = output(tied(kind), inputs())
    peft_model = started(tied(kind), start, target_modules=["lm_head", "up_proj"])
    close(output(peft_model, inputs()), reference)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, inputs()), reference)


class IntegerLinear(nn.Linear):
    """An int8 linear layer without a quant_state."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.weight = nn.Parameter((self.weight.data * 100).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) / 100).T


@pytest.mark.parametrize("start", STARTS)
def test_quantized_base(start):
    """B35."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 12), IntegerLinear(12, 10)), torch.randn(3, 8)
    reference = model(x).detach()
    peft_model = started(copy.deepcopy(model), start, target_modules=["0", "1"])
    close(output(peft_model, x), reference)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, x), reference)
    second = integration.find_slots(peft_model, "default")[0][1]
    with pytest.raises(ValueError, match=r"'1' .IntegerLinear.*weight-svd"):
        integration.base_weight(second)


# ------------------------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("trained_before", [False, True])
def test_a_failing_write_leaves_everything_as_it_was(trained_before, low_cpu_mem_usage, monkeypatch):
    """B31."""
    base = base_model().bfloat16()
    if low_cpu_mem_usage:
        peft_model = get_peft_model(base, config(use_dora=True), low_cpu_mem_usage=True)
    else:
        peft_model = trained(base, "mirror", use_dora=True) if trained_before else started(base, "plain")
    before = structure_of(peft_model), {n: p for n, p in peft_model.named_parameters()}
    values = {name: p.detach().clone() for name, p in before[1].items() if not p.is_meta}
    settings, starts = peft_model.peft_config["default"], starts_for(peft_model, seed=6)
    fill, calls = _writing.fill, []

    def failing(slot: AdapterSlot, *args) -> None:
        calls.append(slot.name)
        fill(slot, *args)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(_writing, "fill", failing)
    with pytest.raises(KeyboardInterrupt):
        integration.write_start(integration.Adapter.of(peft_model, "default"), starts)
    assert structure_of(peft_model) == before[0] and peft_model.peft_config["default"] is settings
    now = dict(peft_model.named_parameters())
    assert all(now[name] is parameter for name, parameter in before[1].items())
    assert all(torch.equal(now[name], value) for name, value in values.items())
    monkeypatch.undo()
    integration.write_start(integration.Adapter.of(peft_model, "default"), starts)


def test_bad_starts_are_named():
    peft_model = integration.inject(base_model("mlp"), config(), "default")
    before = fingerprint(peft_model)
    A, B = starts_for(peft_model)["up"]
    for bad, match in (
        ({"nowhere": (A, B)}, "nowhere"),
        ({"up": (A[:2], B)}, r"'up' has shapes \(2, 24\).*needs A \(k, 24\) and B \(40, k\) with k at most 4"),
        ({"up": (torch.cat([A, A]), torch.cat([B, B], 1))}, r"'up' has shapes \(8, 24\)"),
        ({"up": (A, B * float("nan"))}, "'up' has NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            integration.write_start(integration.Adapter.of(peft_model, "default"), bad)
    unchanged(peft_model, before)
