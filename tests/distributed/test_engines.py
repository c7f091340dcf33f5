"""FSDP2 and DeepSpeed's ZeRO hold a started adapter as they hold any LoRA: names in their state, saving, restoring."""

from __future__ import annotations

import importlib.util

import engine_jobs as jobs
import pytest
import ranks
import tiny
import torch
from peft import PeftModel

ROUNDING = 1e-5  # of logits of size 1 in float32
MOVED = 1e-2  # by how much training changed them
WORLD = 2
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = ("zero 2", "zero 3")
ENGINES = ("fsdp2", "fsdp2 then start", *ZERO)
CASES = [(engine, start) for engine in ENGINES for start in ("mirror", "zero-b")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]  # the first test waits for all processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank saw, by case; and where it saved."""
    folder = tmp_path_factory.mktemp("engines")
    cases = [case for case in CASES if DEEPSPEED or case[0] not in ZERO]
    results = ranks.launch({"engines": (jobs.engines, WORLD, cases, str(folder))}, folder)["engines"]
    return folder, results


@pytest.fixture
def run(request, found):
    """One case: (folder, what each rank saw)."""
    case = request.param
    if case[0] in ZERO and not DEEPSPEED:
        pytest.skip("DeepSpeed is not installed; it runs on Linux only")
    folder, results = found
    for rank, result in enumerate(results):
        assert isinstance(result, dict), getattr(result, "trace", result)
        seen = result.get(case, "an earlier case failed")
        assert isinstance(seen, dict), f"rank {rank}: {seen}"
    return folder / "-".join(case), [result[case] for result in results]


every = pytest.mark.parametrize("run", CASES, ids=" ".join, indirect=True)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**jobs.probe()).logits


def apart(one, other) -> float:
    return float((one - other).abs().max())


@every
def test_state_has_the_names_shapes_and_dtypes_of_a_plain_lora(run):
    _, seen = run
    assert any("lora_A" in name for name in seen[0]["described"])
    assert seen[0]["saved"] == seen[0]["described"]
    for rank in seen:
        assert rank["sharded"]
        assert rank["described"] == rank["described plain"]
        assert rank["saved alike"]


@every
def test_training_begins_at_the_base_and_leaves_its_weights_alone(run):
    _, seen = run
    base = tiny.build("llama")
    for rank in seen:
        assert apart(rank["begun"], logits(base)) < ROUNDING
        assert apart(rank["trained"], rank["begun"]) > MOVED
        assert apart(rank["trained"], rank["plain"]) > MOVED  # it is not the plain one's training
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in seen[0]["kept"].items()
    }
    assert set(weights) == set(base.state_dict())
    for name, value in base.state_dict().items():
        assert torch.equal(weights[name], value), name


@every
def test_adapter_of_the_state_loads_in_plain_peft(run):
    folder, seen = run
    loaded = logits(PeftModel.from_pretrained(tiny.build("llama"), folder / "adapter"))
    for rank in seen:
        assert apart(rank["trained"], loaded) < ROUNDING


@every
def test_state_restores_a_plain_lora_on_all_ranks(run):
    _, seen = run
    for rank in seen:
        assert torch.equal(rank["trained"], rank["restored"])
