"""Which layers PEFT would adapt, putting an adapter there, and looking at it. B numbers: docs/peer-faults.md."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapters import (
    MODELS,
    base_model,
    close,
    config,
    disturb,
    fingerprint,
    inputs,
    output,
    started,
    unchanged,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from loraga.integrations import peft as integration


def test_inject_leaves_the_users_config_alone():
    """B27."""
    options = LoraConfig(r=4, target_modules=None, init_lora_weights=False)
    before = copy.deepcopy(options.to_dict())
    peft_model = integration.inject(base_model("llama"), options, "default")
    assert options.to_dict() == before
    assert peft_model.peft_config["default"] is not options
    assert len(integration.find_slots(peft_model, "default")[0]) == 4  # PEFT's default for llama: q and v


def test_replicated_layers_are_targets_too():
    replication = [(0, 2), (1, 2)]
    peft_model = integration.inject(base_model("llama"), config(layer_replication=replication), "default")
    slots = integration.find_slots(peft_model, "default")[0]
    assert len(slots) == 21
    assert slots[-1].name == "model.layers.2.mlp.down_proj"


def test_inject_without_a_config():
    peft_model = integration.inject(base_model("mlp"), None, "mine")
    chosen = peft_model.peft_config["mine"]
    assert (chosen.r, chosen.lora_alpha, chosen.use_rslora) == (16, 64, False)
    assert [slot.name for slot in integration.find_slots(peft_model, "mine")[0]] == ["up", "down", "head"]


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "orthogonal"])
def test_other_starts_are_left_aside(start):
    base = base_model("mlp")
    before = copy.deepcopy(base.state_dict())
    with pytest.warns(UserWarning, match=f"init_lora_weights='{start}' is left aside"):
        peft_model = integration.inject(base, config(r=4, init_lora_weights=start), "default")
    assert all(torch.equal(value, before[name]) for name, value in peft_model.unload().state_dict().items())


def test_kasa_is_refused_before_it_changes_the_base():
    import peft

    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA (it came with 0.21)")
    base = base_model("mlp")
    before = fingerprint(base)
    with pytest.raises(ValueError, match="kasa_config changes the base weights"):
        integration.inject(base, config(kasa_config=peft.KasaConfig()), "default")
    unchanged(base, before)


def test_peft_lora_ga_config_is_taken_without_its_gradients():
    """B8: PEFT's own form of LoRA-GA, whose injection would need gradients."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    options = config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_model = integration.inject(base_model("mlp"), options, "default")
    chosen = peft_model.peft_config["default"]
    assert chosen.init_lora_weights is True and chosen.lora_ga_config is None
    assert options.init_lora_weights == "lora_ga" and options.lora_ga_config is not None


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_changed_the_base_is_refused(start):
    """PEFT took that start off the base weights: a new one there would start somewhere else than at the base."""
    peft_model = get_peft_model(base_model("mlp"), config(init_lora_weights=start))
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base weights"):
        integration.check_adapter(peft_model, "default")


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
        integration.inject(model, config(**options), "default")
    unchanged(model, before)
    with pytest.raises(ValueError, match="no default target_modules for MLP"):
        integration.inject(model, config(target_modules=None), "default")


def test_inject_twice_is_an_error():
    """B36."""
    model = base_model("mlp")
    peft_model = integration.inject(model, config(), "default")
    with pytest.raises(TypeError, match="PeftModel"):
        integration.inject(peft_model, config(), "default")
    with pytest.raises(ValueError, match="PEFT layers already"):
        integration.inject(model, config(), "default")
    with pytest.raises(TypeError, match="LoraConfig"):
        integration.inject(base_model("mlp"), {"r": 3}, "default")


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
    found = integration.find_target_names(model, target, exclude)
    unchanged(model, before)
    peft_model = get_peft_model(base_model(kind), LoraConfig(target_modules=target, exclude_modules=exclude))
    theirs = [name for name, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert list(found) == theirs and theirs
    assert all(module is model.get_submodule(name) for name, module in found.items())
    through = integration.find_target_names(peft_model, target, exclude)
    assert list(through) == [f"base_model.model.{name}" for name in theirs]
    assert all(module is peft_model.get_submodule(name).base_layer for name, module in through.items())


def test_targets_of_prompt_learning_are_refused():
    from peft import PromptTuningConfig

    peft_model = get_peft_model(base_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="get_base_model"):
        integration.find_target_names(peft_model)
    with pytest.raises(TypeError, match="initialises LoRA"):
        integration.check_adapter(peft_model, "default")


def test_targets_beside_modules_to_save():
    """The copies that PEFT trains in full, and their originals, are no targets."""
    peft_model = get_peft_model(base_model("llama"), config(modules_to_save=["lm_head"]))
    found = integration.find_target_names(peft_model)
    assert list(found) == [f"base_model.model.{name}" for name in integration.find_target_names(base_model("llama"))]


def test_targets_of_a_plain_module_leave_its_output_layer_out():
    """B27."""
    model = base_model("mlp")
    assert list(integration.find_target_names(model)) == ["up", "down", "head"]
    model.get_output_embeddings = lambda: model.head
    assert list(integration.find_target_names(model)) == ["up", "down"]
    with pytest.raises(ValueError, match="nowhere"):
        integration.find_target_names(model, ["nowhere"])


def test_check_adapter():
    peft_model = integration.inject(base_model("mlp"), config(), "mine")
    with pytest.raises(ValueError, match=r"no adapter 'other'.*'mine'"):
        integration.check_adapter(peft_model, "other")
    integration.check_adapter(peft_model, "mine")
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into layer 'up'.*unmerge_adapter\(\)"):
        integration.check_adapter(peft_model, "mine")
    from peft import LoKrConfig

    with pytest.raises(TypeError, match="LoRA"):
        integration.check_adapter(get_peft_model(base_model("mlp"), LoKrConfig(target_modules=["up"])), "default")


@pytest.mark.parametrize("kind", MODELS)
def test_slots_describe_the_layers(kind):
    """B4: sizes are out and in features, also where the transpose is stored."""
    base = base_model(kind)
    x = torch.randn(2, 200)
    peft_model = integration.inject(base, config(rank_pattern={"mlp.*": 2}, alpha_pattern={"attn": 5}), "default")
    slots, unsupported = integration.find_slots(peft_model, "default")
    assert not unsupported
    for slot in slots:
        m, n = slot.shape
        assert slot.base_layer(x[:, :n]).shape == (2, m)
        assert slot.base_layer.weight.shape == ((n, m) if slot.transposed else (m, n))
        assert slot.transposed == (type(slot.base_layer).__name__ == "Conv1D")
        assert integration.base_weight(slot).shape == (m, n)
        bias = slot.base_layer.bias if slot.base_layer.bias is not None else 0
        close(slot.base_layer(x[:, :n]) - bias, x[:, :n] @ integration.base_weight(slot).T, 1e-5)
        assert slot.rank == slot.layer.r["default"] and slot.scaling == slot.layer.scaling["default"]
        assert peft_model.base_model.model.get_submodule(slot.name) is slot.layer


def test_adapters_disabled_touches_nothing_else():
    """B31: requires_grad, and the state before, also after an exception."""
    peft_model = started(base_model("llama"), "mirror", modules_to_save=["lm_head"])
    disturb(peft_model)
    trained, before = output(peft_model, inputs("llama")), fingerprint(peft_model)
    with pytest.raises(KeyError), integration.adapters_disabled(peft_model):
        assert torch.equal(output(peft_model, inputs("llama")), output(base_model("llama"), inputs("llama")))
        unchanged(peft_model, before)
        raise KeyError
    unchanged(peft_model, before)
    assert torch.equal(output(peft_model, inputs("llama")), trained)
    with peft_model.disable_adapter():
        with integration.adapters_disabled(peft_model):
            pass
        assert torch.equal(output(peft_model, inputs("llama")), output(base_model("llama"), inputs("llama")))
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), integration.adapters_disabled(peft_model):
        pass


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
    restore = integration.remember_model(model)
    peft_model = started(model, "mirror", modules_to_save=["head"] if kind == "mlp" else None)
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
    close(output(started(model, "mirror"), inputs(kind)), output(base_model(kind), inputs(kind)))


class UnknownLinear(nn.Linear):
    """Of another library: it may compute anything with its weight."""


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_made_of_unknown_modules_is_not_started(side):
    peft_model = started(base_model("mlp"), "plain")
    layer = peft_model.base_model.model.up
    getattr(layer, side)["default"].__class__ = UnknownLinear
    slots, unsupported = integration.find_slots(peft_model, "default")
    assert [slot.name for slot in slots] == ["down", "head"]
    assert unsupported == {"up": "its adapter is made of UnknownLinear"}
