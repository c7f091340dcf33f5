"""Faults of PEFT's own LoRA-GA, from one call to the saved file. docs/peer-faults.md says which test shows which."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from zoo import (
    MLP,
    R,
    assert_same,
    batches,
    build,
    config,
    everything_about,
    exact_gradients,
    halves,
    init,
    mlp_batches,
)

import loraga
from loraga import InitConfig

OFFSETS = ("anchor", "subtract", "zero-b")


def trained(peft_model: PeftModel) -> PeftModel:
    """As if trained for a while."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return peft_model


def output(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


# ------------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_b7_what_is_saved_is_right_on_the_original_base(name, offset, tmp_path):
    batch = batches(name, 1)[0]
    peft_model = trained(init(build(name), batches(name), init=InitConfig(offset=offset)))
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(build(name), tmp_path), batch), output(peft_model, batch))
    assert (output(peft_model, batch) - output(build(name), batch)).norm() > 0.01 * output(peft_model, batch).norm()


@pytest.mark.parametrize("offset", OFFSETS)
def test_b34_a_conversion_asked_for_out_of_habit_does_no_harm(offset, tmp_path):
    """`save_pretrained` alone is right; who converts as PEFT's README says gets the same function."""
    batch = batches("llama", 1)[0]
    peft_model = init(build("llama"), batches("llama"), init=InitConfig(offset=offset))
    peft_model.save_pretrained(tmp_path / "start")
    trained(peft_model).save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    close(output(PeftModel.from_pretrained(build("llama"), tmp_path / "end"), batch), output(peft_model, batch))


# ------------------------------------------------------------------------------------------------ what is seen


def test_b8_a_config_for_pefts_lora_ga_needs_no_other_call():
    if not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    ours = init(MLP(), mlp_batches())
    theirs = init(MLP(), mlp_batches(), config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()))
    for layer in ours.loraga_report.layers:
        assert all(torch.equal(a, b) for a, b in zip(halves(ours, layer.name), halves(theirs, layer.name), strict=True))


class Calls(nn.Module):
    """One layer called `times` times in a forward; not at all where `times` of the batch is 0."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.again, self.last = nn.Linear(40, 40), nn.Linear(40, 12)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, times: int) -> dict[str, torch.Tensor]:
        for _ in range(times):
            inputs = torch.tanh(self.again(inputs))
        logits = self.last(inputs)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("times", [(2, 2, 2, 2), (1, 3, 0, 0), (0, 0, 1, 0)])
@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_b10_calls_are_summed_and_batches_averaged(times, estimator):
    """Neither halved by a second call nor divided by the batches that happened to use the layer."""
    loader = [{**batch, "times": t} for batch, t in zip(mlp_batches(), times, strict=True)]
    exact = exact_gradients(Calls(), ["again"], loader)["again"]
    found = loraga.estimate_factors(Calls(), loader, rank=8, estimator=estimator)["again"]
    assert found.S.tolist() == pytest.approx(torch.linalg.svdvals(exact)[:8].tolist(), rel=5e-3)


@pytest.mark.parametrize("offset", ["anchor", "zero-b"])
def test_b29_one_parameter_in_two_targets(offset):
    """Each place is started from the gradient of its own use; together these are the gradient of the parameter."""
    model = MLP((40, 40, 40, 12))
    model.layers[1].weight = model.layers[0].weight
    original, loader = copy.deepcopy(model), mlp_batches()
    exact = exact_gradients(original, ["layers.0"], loader)["layers.0"]
    found = loraga.estimate_factors(model, loader, ["layers.0", "layers.1"], rank=40)
    total = sum(f.U @ torch.diag(f.S) @ f.Vh for f in found.values())
    assert (total - exact).norm() < 1e-4 * exact.norm()
    peft_model = init(model, loader, init=InitConfig(offset=offset))
    assert len(peft_model.loraga_report.initialised) == 3
    close(output(peft_model, loader[0]), output(original, loader[0]))
    refused = copy.deepcopy(original)
    before = everything_about(refused)
    with pytest.raises(ValueError, match=r"layers\.0.*layers\.1.*shares it"):
        init(refused, loader, init=InitConfig(offset="subtract"))
    assert_same(everything_about(refused), before)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.filterwarnings("ignore:.*_pattern keys")
def test_b32_target_parameters_are_started(offset):
    loader, model = mlp_batches(), MLP()
    expected = output(model, loader[0])
    lora = config(target_modules=["layers.0"], target_parameters=["layers.1.weight"])
    peft_model = init(model, loader, lora, init=InitConfig(offset=offset))
    assert [layer.name for layer in peft_model.loraga_report.initialised] == ["layers.0", "layers.1.weight"]
    close(output(peft_model, loader[0]), expected)
    linear = init(MLP(), loader, config(target_modules=["layers.1"]), init=InitConfig(offset=offset))
    for ours, theirs in zip(halves(peft_model, "layers.1"), halves(linear, "layers.1"), strict=True):
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=1e-3)  # the same gradient, summed otherwise


@pytest.mark.parametrize("offset", OFFSETS)
def test_b33_an_adapter_made_with_low_cpu_mem_usage(offset):
    loader = mlp_batches()
    empty = get_peft_model(MLP(), config(), low_cpu_mem_usage=True)
    peft_model = loraga.fast_init(empty, loader, init=InitConfig(offset=offset), show_progress_bar=False)
    assert peft_model is empty and not any(p.is_meta for p in peft_model.parameters())
    whole = init(MLP(), loader, init=InitConfig(offset=offset))
    for layer in whole.loraga_report.layers:
        assert torch.equal(halves(whole, layer.name)[0], halves(empty, layer.name)[0])
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))


# ------------------------------------------------------------------------------------------------ the same again


class Unused(MLP):
    """A target that no batch reaches, so that its start is an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(40, 30)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.filterwarnings("ignore:These layers keep an ordinary LoRA start")
def test_b14_a_second_run_restores_the_very_same_model(offset):
    """Also the base that `subtract` shifts, and the random start of layers without gradient."""
    model, states = Unused(), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        states.append(init(copy.deepcopy(model), mlp_batches(), init=InitConfig(offset=offset)).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    other = init(copy.deepcopy(model), mlp_batches(), init=InitConfig(offset=offset), seed=1).state_dict()
    unused = "base_model.model.unused.lora_A.default.weight"
    assert not torch.equal(other[unused][:R], states[0][unused][:R])


# ------------------------------------------------------------------------------------------------ wrapped models


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrapper", "inside"),
    [
        ("DistributedDataParallel", "plain"),  # around a PeftModel it is right: test_distributed
        ("DataParallel", "plain"),
        ("DataParallel", "peft"),
        ("OptimizedModule", "plain"),
        ("OptimizedModule", "peft"),
    ],
)
def test_b15_a_wrapped_model_is_one_clear_error(wrapper, inside, one_process):
    """Its gradient reduction would never hear of the adapter, and what is saved would carry the wrapper's names."""
    wrap = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "DataParallel": nn.DataParallel,
        "OptimizedModule": lambda model: torch.compile(model, backend="eager"),
    }[wrapper]
    model = MLP() if inside == "plain" else get_peft_model(MLP(), config())
    before = everything_about(model)
    with pytest.raises(ValueError, match=rf"wrapped in {wrapper}.*pass model\.(module|_orig_mod)"):
        loraga.fast_init(wrap(model), mlp_batches(), show_progress_bar=False)
    assert_same(everything_about(model), before)


def test_b15_the_loss_may_go_through_a_wrapper_and_gradients_be_seen_in_one(one_process):
    plain = init(MLP(), mlp_batches())
    model = MLP()
    wrapped = nn.parallel.DistributedDataParallel(model)
    through = init(model, mlp_batches(), loss_fn=lambda _, batch: wrapped(**batch)["loss"])
    for layer in plain.loraga_report.layers:
        assert torch.equal(halves(plain, layer.name)[0], halves(through, layer.name)[0])
    factors = loraga.estimate_factors(nn.parallel.DistributedDataParallel(MLP()), mlp_batches(), rank=4)
    assert list(factors) == [layer.name for layer in plain.loraga_report.layers]


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_names_every_fault_and_only_tests_that_exist():
    root = Path(__file__).parents[1]
    rows = re.findall(r"^\| (B\d+) \|(.*)\|$", (root / "docs" / "peer-faults.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [f"B{i}" for i in range(1, 38)]
    for number, row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert named or "no test" in row, number
        for file, test in named:
            assert f"def {test}(" in (root / "tests" / f"{file}.py").read_text(), (number, test)
