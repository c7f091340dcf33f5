"""What PEFT, transformers and torch do to a LoRA after it was made, done to a started one beside a plain one.

Each test states what the tool promises of any LoRA, and runs for an adapter that PEFT started alone ("plain") as well.
"""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from adapters import (
    STARTS,
    base_model,
    close,
    config,
    disturb,
    inputs,
    output,
    relative,
    same_tensors,
    started,
    trained,
    weights_of_base,
    write,
)
from peft import (
    PeftMixedModel,
    PeftModel,
    get_model_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import Trainer, TrainingArguments

from loraga._version import release_of

ALL = ("plain", *STARTS)
every_start = pytest.mark.parametrize("start", ALL)


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 64, (2, 9), generator=generator) for _ in range(steps)]


def train(model: nn.Module, data: list[torch.Tensor], optimizer: torch.optim.Optimizer | None = None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for ids in data:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(sum(model(input_ids=ids, labels=ids).loss for ids in batches(8)))


# ------------------------------------------------------------------------------------------------------------- merging


@every_start
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mlp"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(kind, start, safe):
    x = inputs(kind)
    peft_model = trained(base_model(kind), start)
    before = output(peft_model, x)
    peft_model.merge_adapter(safe_merge=safe)
    close(output(peft_model, x), before)
    peft_model.unmerge_adapter()
    close(output(peft_model, x), before)
    close(output(peft_model.merge_and_unload(safe_merge=safe), x), before)


@every_start
def test_unload_gives_the_base_back(start):
    weights = copy.deepcopy(base_model().state_dict())
    same_tensors(trained(base_model(), start).unload().state_dict(), weights)


# ---------------------------------------------------------------------------------------------------- several adapters


def pair(start: str) -> tuple[PeftModel, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model with two trained adapters, what each computes, and what the base does."""
    peft_model = trained(base_model(), start)
    x = inputs()
    first = output(peft_model, x)
    peft_model.add_adapter("second", config())
    if start != "plain":
        write(peft_model, start, "second", seed=9)
    peft_model.set_adapter("second")
    disturb(peft_model, seed=4)
    return peft_model.eval(), first, output(peft_model, x), output(base_model(), x)


def delta(peft_model: PeftModel, adapter_name: str) -> torch.Tensor:
    layer = peft_model.base_model.model.model.layers[1].mlp.down_proj
    return layer.get_delta_weight(adapter_name).detach()


@every_start
def test_adapters_side_by_side(start, tmp_path):
    """B21: added, switched to, saved, loaded and deleted; neither changes the other."""
    peft_model, first, second, _ = pair(start)
    x = inputs()
    peft_model.set_adapter("default")
    assert torch.equal(output(peft_model, x), first)
    assert not any("second" in name for name, p in peft_model.named_parameters() if p.requires_grad)
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(base_model(), tmp_path / "second"), x), second)
    peft_model.load_adapter(tmp_path / "second", "third")
    peft_model.set_adapter("third")
    assert torch.equal(output(peft_model, x), second)
    peft_model.delete_adapter("third")
    peft_model.delete_adapter("second")
    peft_model.set_adapter("default")
    assert torch.equal(output(peft_model, x), first)
    status = get_model_status(peft_model)
    assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}


@every_start
def test_a_second_adapter_made_from_the_first_ones_config(start, tmp_path):
    peft_model = started(base_model(), start)
    peft_model.add_adapter("second", peft_model.peft_config["default"])
    if start != "plain":
        write(peft_model, start, "second")
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["second"].weight.shape == layer.lora_A["default"].weight.shape
    peft_model.save_pretrained(tmp_path)
    close(
        output(PeftModel.from_pretrained(base_model(), tmp_path / "second"), inputs()), output(base_model(), inputs())
    )


@every_start
@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_add_weighted_adapter(start, how):
    if how == "svd" and release_of(peft.__version__) < (0, 19):
        pytest.skip("PEFT 0.18 loses the blend of plain adapters, too")
    peft_model, *_ = pair(start)
    if how == "linear":  # sums A and B, not their products: right for one adapter
        peft_model.add_weighted_adapter(["default"], [0.7], "blend", combination_type=how)
        expected = 0.7 * delta(peft_model, "default")
    else:
        options = {"svd_rank": 8} if how == "svd" else {}
        peft_model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "blend", combination_type=how, **options)
        expected = 0.7 * delta(peft_model, "default") + 0.4 * delta(peft_model, "second")
    close(delta(peft_model, "blend"), expected, 1e-4)


@every_start
def test_a_batch_of_several_adapters(start):
    peft_model, first, second, base = pair(start)
    with torch.no_grad():
        rows = peft_model(inputs(), adapter_names=["default", "second", "__base__"]).logits
    for row, expected in zip(rows, (first[0], second[1], base[2]), strict=True):
        close(row, expected)


@every_start
def test_both_adapters_at_once_in_a_mixed_model(start):
    mixed = PeftMixedModel(base_model(), config(), "default")
    mixed.add_adapter("second", config())
    peft_model = trained(base_model(), start)
    numbers = {name: p for name, p in peft_model.named_parameters() if "lora_" in name}
    with torch.no_grad():  # this class neither reads nor writes an adapter
        for name, parameter in mixed.named_parameters():
            if name in numbers:
                parameter.copy_(numbers[name])
    mixed.set_adapter(["default", "second"])
    close(output(mixed.eval(), inputs()), output(peft_model, inputs()))


# ------------------------------------------------------------------------------------------------- scaling and casting


@every_start
def test_scalings_set_from_outside(start):
    peft_model = trained(base_model(), start)
    base, full = output(base_model(), inputs()), output(peft_model, inputs())
    with rescale_adapter_scale(peft_model, 0.0):
        close(output(peft_model, inputs()), base)
    assert torch.equal(output(peft_model, inputs()), full)
    for layer in (m for m in peft_model.modules() if hasattr(m, "scale_layer")):
        layer.scale_layer(0.5)
    peft_model.merge_adapter()
    halved = weights_of_base(peft_model)["model.layers.1.mlp.down_proj.weight"]
    original = base_model().model.layers[1].mlp.down_proj.weight
    close(halved - original, delta(trained(base_model(), start), "default") / 2, 1e-4)


@every_start
@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_casts(start, cast):
    peft_model = getattr(trained(base_model("mlp"), start), cast)()
    assert len({tensor.dtype for tensor in (*peft_model.parameters(), *peft_model.buffers())}) == 1
    x = inputs("mlp").to(next(peft_model.parameters()).dtype)
    expected = output(trained(base_model("mlp"), start), inputs("mlp"))
    close(output(peft_model, x), expected, 1e-6 if cast == "double" else 5e-2)


# ------------------------------------------------------------------------------------------------------ state and files


@every_start
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_back_into_the_same_model(start, low_cpu_mem_usage, tmp_path):
    """What a trainer does when it resumes or loads the best checkpoint."""
    peft_model = trained(base_model(), start)
    before = output(peft_model, inputs())
    peft_model.save_pretrained(tmp_path)
    disturb(peft_model, seed=2)
    assert relative(output(peft_model, inputs()), before) > 1e-3
    peft_model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(peft_model, inputs()), before)


@every_start
def test_state_dicts(start):
    peft_model = trained(base_model(), start)
    state, adapter = copy.deepcopy(peft_model.state_dict()), copy.deepcopy(get_peft_model_state_dict(peft_model))
    before = output(peft_model, inputs())
    disturb(peft_model, seed=2)
    set_peft_model_state_dict(peft_model, adapter)
    assert torch.equal(output(peft_model, inputs()), before)
    disturb(peft_model, seed=3)
    assert str(peft_model.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(output(peft_model, inputs()), before)
    inner = {key.removeprefix("base_model.model."): value for key, value in adapter.items()}
    again = inject_adapter_in_model(config(), base_model(), state_dict=inner)
    set_peft_model_state_dict(again, inner)
    close(output(again.eval(), inputs()), before)


@every_start
def test_swapped_in_a_running_model(start, tmp_path):
    """Servers swap weights without making layers anew, and compare the configs before."""
    peft_model = trained(base_model(), start)
    peft_model.save_pretrained(tmp_path)
    running = started(base_model(), "plain")
    hotswap_adapter(running, tmp_path, "default")
    close(output(running, inputs()), output(peft_model, inputs()))


@every_start
def test_loaded_by_transformers_itself(start, tmp_path):
    peft_model = trained(base_model(), start)
    peft_model.save_pretrained(tmp_path)
    model = base_model()
    model.load_adapter(str(tmp_path))
    close(output(model.eval(), inputs()), output(peft_model, inputs()))


@every_start
def test_saved_with_a_conversion_asked_for_out_of_habit(start, tmp_path):
    """The argument that PiSSA and PEFT's own LoRA-GA need; here it takes nothing off that is not zero."""
    peft_model = started(base_model(), start)
    peft_model.save_pretrained(tmp_path / "initial")
    disturb(peft_model)
    peft_model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    close(
        output(PeftModel.from_pretrained(base_model(), tmp_path / "converted"), inputs()), output(peft_model, inputs())
    )


@every_start
def test_copies_and_pickles(start, tmp_path):
    peft_model = started(base_model("mlp"), start)
    other = copy.deepcopy(peft_model)
    disturb(other)
    close(output(peft_model, inputs("mlp")), output(base_model("mlp"), inputs("mlp")))
    torch.save(other, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(output(again, inputs("mlp")), output(other, inputs("mlp")))


# ------------------------------------------------------------------------------------------------------------- training


@every_start
def test_torch_compile(start):
    """One graph, forward and backward, with the numbers of eager mode."""
    x = inputs("mlp")
    peft_model = trained(base_model("mlp"), start)
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


@every_start
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(start, reentrant):
    ids = batches(1)[0]
    gradients = []
    for checkpointing in (False, True):
        peft_model = trained(base_model(), start).train()
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


def loraplus(peft_model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(peft_model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)


def lorafa(peft_model: PeftModel) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(peft_model, r=4, lora_alpha=8, lr=1e-3)


@every_start
@pytest.mark.parametrize("make", [loraplus, lorafa], ids=lambda make: make.__name__)
def test_pefts_own_optimizers(start, make):
    """LoRA-FA divides by A Aᵀ, which mirrored rows make singular."""
    peft_model = started(base_model(), start).train()
    before = loss(peft_model)
    train(peft_model, batches(8) * 3, make(peft_model))
    assert loss(peft_model) < before
    assert all(p.isfinite().all() for p in peft_model.parameters())


@every_start
def test_weight_decay_alone_leaves_the_function_alone(start):
    """It shrinks both halves alike."""
    peft_model = started(base_model(), start)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        for parameter in peft_model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    close(output(peft_model, inputs()), output(base_model(), inputs()))


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = torch.randint(0, 64, (24, 9), generator=torch.Generator().manual_seed(4))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(peft_model: nn.Module, directory) -> Trainer:
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
    )
    return Trainer(model=peft_model, args=arguments, train_dataset=Rows())


@pytest.mark.slow
@every_start
def test_trainer_resumes_to_the_uninterrupted_weights(start, tmp_path):
    """From a model that reads its own checkpoint, and from one that PEFT reads from the checkpoint's folder."""
    whole = started(base_model(), start)
    trainer(whole, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 4
    for model in (
        started(base_model(), start),
        PeftModel.from_pretrained(base_model(), checkpoint, is_trainable=True),
    ):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(checkpoint))
        close(output(model.eval(), inputs()), output(whole.eval(), inputs()), 1e-5)
