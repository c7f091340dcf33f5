"""Faults of PEFT's own LoRA-GA, from one call to the saved file. docs/peer-faults.md says which test shows which."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain import bits, close, output, same, trained
from safetensors.torch import load_file
from tiny import (
    MLP,
    STARTS,
    R,
    assert_same,
    batches,
    build,
    config,
    everything_about,
    exact_gradients,
    init,
    matrices,
    mlp_batches,
)
from torch import nn

import loraga
from loraga import InitConfig

each_start = pytest.mark.parametrize("start", STARTS)


# ------------------------------------------------------------------------------------------------ the first step


@each_start
def test_b2_the_first_step_is_the_best_that_the_adapter_can_do(start):
    """Plain gradient descent on A and B moves the weight along the best approximation of the gradient's negative."""
    loader, rate = mlp_batches(), 1e-6
    peft_model = init(MLP(), loader, init=InitConfig(start=start, scale="gd")).double()
    loss = sum(peft_model(batch["inputs"].double(), batch["labels"])["loss"] for batch in loader) / len(loader)
    loss.backward()
    for name, gradient in exact_gradients(MLP().double(), ["layers.0", "layers.1"], _doubled(loader)).items():
        layer = peft_model.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = layer.scaling["default"] * ((B - rate * B.grad) @ (A - rate * A.grad) - B @ A) / rate
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        best = U[:, :R] * S[:R] @ Vh[:R]
        assert (change + best).norm() < 0.02 * best.norm(), name


def _doubled(loader: list[dict]) -> list[dict]:
    return [{**batch, "inputs": batch["inputs"].double()} for batch in loader]


# ------------------------------------------------------------------------------------------------ on disk


@each_start
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_b7_what_is_saved_is_right_on_the_original_base(name, start, tmp_path):
    batch = batches(name, 1)[0]
    peft_model = trained(init(build(name), batches(name), init=InitConfig(start=start)))
    peft_model.save_pretrained(tmp_path)
    close(output(PeftModel.from_pretrained(build(name), tmp_path), batch), output(peft_model, batch))
    assert (output(peft_model, batch) - output(build(name), batch)).norm() > 0.01 * output(peft_model, batch).norm()


@each_start
def test_b17_what_is_saved_has_the_rank_asked_for_and_an_ordinary_config(start, tmp_path):
    trained(init(MLP(), mlp_batches(), init=InitConfig(start=start))).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 6
    for name, value in saved.items():
        assert value.shape[0 if "lora_A" in name else 1] == R
    stored = LoraConfig.from_pretrained(tmp_path)
    assert (stored.r, stored.init_lora_weights, stored.rank_pattern) == (R, True, {})
    assert not (tmp_path / "loraga.json").exists()


@each_start
def test_b34_a_conversion_asked_for_out_of_habit_does_no_harm(start, tmp_path):
    """`save_pretrained` alone is right; who converts as PEFT's README says gets the same function."""
    batch = batches("llama", 1)[0]
    peft_model = init(build("llama"), batches("llama"), init=InitConfig(start=start))
    peft_model.save_pretrained(tmp_path / "start")
    trained(peft_model).save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    close(output(PeftModel.from_pretrained(build("llama"), tmp_path / "end"), batch), output(peft_model, batch))


# ------------------------------------------------------------------------------------------------ the base stays


@each_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_b16_b23_the_base_stays_bit_for_bit_and_its_function_too(start, dtype):
    model = build("llama").to(dtype)
    loader, original = batches("llama"), copy.deepcopy(model)
    expected = output(original, loader[0])
    peft_model = init(model, loader, init=InitConfig(start=start))
    assert same(bits(peft_model), bits(original))
    if start == "zero-b":
        assert torch.equal(output(peft_model, loader[0]), expected)
    close(output(peft_model, loader[0]).float(), expected.float(), 2e-5 if dtype == torch.float32 else 2e-3)
    trained(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, loader[0]), expected)
    assert not torch.equal(output(peft_model, loader[0]), expected)
    unloaded = peft_model.unload()
    assert same(bits(unloaded), bits(original)) and torch.equal(output(unloaded, loader[0]), expected)


@each_start
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_b13_a_tied_output_layer(start):
    loader, lora = batches("llama"), config(target_modules=["lm_head", "q_proj"])
    peft_model = init(build("llama", tie_word_embeddings=True), loader, lora, init=InitConfig(start=start))
    assert {layer.name for layer in peft_model.loraga_report.initialised} >= {"lm_head"}
    assert same(bits(peft_model), bits(build("llama", tie_word_embeddings=True)))
    close(output(peft_model, loader[0]), output(build("llama", tie_word_embeddings=True), loader[0]))


@each_start
def test_b21_the_adapter_beside_it_computes_what_it_did(start):
    loader, model = mlp_batches(), MLP()
    peft_model = trained(get_peft_model(model, config()))
    expected = output(peft_model, loader[0])
    peft_model.add_adapter("second", config(r=2))
    options = {"adapter_name": "second", "show_progress_bar": False}
    loraga.fast_init(peft_model, loader, init=InitConfig(start=start), **options)
    assert torch.equal(output(peft_model, loader[0]), expected)
    peft_model.set_adapter("second")
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))
    alone = init(MLP(), loader, config(r=2), init=InitConfig(start=start))
    for index, layer in enumerate(peft_model.base_model.model.layers):
        assert torch.equal(layer.lora_A["second"].weight, matrices(alone, f"layers.{index}")[0])


@each_start
def test_b24_dropout_in_training_mode_leaves_the_start_alone(start):
    loader = mlp_batches()
    peft_model = init(MLP(), loader, config(lora_dropout=0.5), init=InitConfig(start=start)).train()
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))
    drawn = [output(trained(peft_model), loader[0]) for _ in range(2)]
    assert not torch.equal(*drawn)  # it is on


# ------------------------------------------------------------------------------------------------ what is seen


def test_b8_a_config_for_pefts_lora_ga_needs_no_other_call():
    if not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no LoRA-GA")
    ours = init(MLP(), mlp_batches())
    theirs = init(MLP(), mlp_batches(), config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()))
    for layer in ours.loraga_report.layers:
        for a, b in zip(matrices(ours, layer.name), matrices(theirs, layer.name), strict=True):
            assert torch.equal(a, b)


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


@each_start
def test_b29_one_parameter_in_two_targets(start):
    """Each place is started from the gradient of its own use; together these are the gradient of the parameter."""
    model = MLP((40, 40, 40, 12))
    model.layers[1].weight = model.layers[0].weight
    original, loader = copy.deepcopy(model), mlp_batches()
    exact = exact_gradients(original, ["layers.0"], loader)["layers.0"]
    found = loraga.estimate_factors(model, loader, ["layers.0", "layers.1"], rank=40)
    total = sum(f.U @ torch.diag(f.S) @ f.Vh for f in found.values())
    assert (total - exact).norm() < 1e-4 * exact.norm()
    peft_model = init(model, loader, init=InitConfig(start=start))
    assert len(peft_model.loraga_report.initialised) == 3 and same(bits(peft_model), bits(original))
    close(output(peft_model, loader[0]), output(original, loader[0]))


@each_start
@pytest.mark.filterwarnings("ignore:.*_pattern keys")
def test_b32_target_parameters_are_started(start):
    loader, model = mlp_batches(), MLP()
    expected = output(model, loader[0])
    lora = config(target_modules=["layers.0"], target_parameters=["layers.1.weight"])
    peft_model = init(model, loader, lora, init=InitConfig(start=start))
    assert [layer.name for layer in peft_model.loraga_report.initialised] == ["layers.0", "layers.1.weight"]
    close(output(peft_model, loader[0]), expected)
    linear = init(MLP(), loader, config(target_modules=["layers.1"]), init=InitConfig(start=start))
    for ours, theirs in zip(matrices(peft_model, "layers.1"), matrices(linear, "layers.1"), strict=True):
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=0, atol=1e-3)  # the same gradient, summed otherwise


@each_start
def test_b33_an_adapter_made_with_low_cpu_mem_usage(start):
    loader = mlp_batches()
    empty = get_peft_model(MLP(), config(), low_cpu_mem_usage=True)
    peft_model = loraga.fast_init(empty, loader, init=InitConfig(start=start), show_progress_bar=False)
    assert peft_model is empty and not any(p.is_meta for p in peft_model.parameters())
    assert same(peft_model.state_dict(), init(MLP(), loader, init=InitConfig(start=start)).state_dict())
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))


# ------------------------------------------------------------------------------------------------ the same again


class Unused(MLP):
    """A target that no batch reaches, so that its start is an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(40, 30)


@each_start
@pytest.mark.filterwarnings("ignore:These layers keep an ordinary LoRA start")
def test_b14_a_second_run_gives_the_very_same_model(start):
    """Also the random start of layers without gradient, and of rows that it leaves over."""
    model, states = Unused(), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        states.append(
            init(copy.deepcopy(model), mlp_batches(), config(r=20), init=InitConfig(start=start)).state_dict()
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*states)
    other = init(copy.deepcopy(model), mlp_batches(), config(r=20), init=InitConfig(start=start), seed=1).state_dict()
    unused = "base_model.model.unused.lora_A.default.weight"
    assert not torch.equal(other[unused], states[0][unused])


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
        assert torch.equal(matrices(plain, layer.name)[0], matrices(through, layer.name)[0])
    factors = loraga.estimate_factors(nn.parallel.DistributedDataParallel(MLP()), mlp_batches(), rank=4)
    assert list(factors) == [layer.name for layer in plain.loraga_report.layers]


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_names_every_fault_and_only_tests_that_exist():
    root = Path(__file__).parents[3]
    rows = re.findall(r"^\| (B\d+) \|(.*)\|$", (root / "docs" / "peer-faults.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [f"B{i}" for i in range(1, 38)]
    for number, row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert named or "no test" in row, number
        for file, test in named:
            assert f"def {test}(" in next((root / "tests").rglob(f"{file}.py")).read_text(), (number, test)
