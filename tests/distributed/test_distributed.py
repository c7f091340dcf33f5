"""Several processes on this machine over gloo: merging, failures, DistributedDataParallel, FSDP2, tensor parallel."""

from __future__ import annotations

import signal
from pathlib import Path

import peft
import pytest
import rank_jobs as jobs
import ranks
import tiny
import torch
from peft import PeftModel
from torch import nn

import loraga
from loraga.estimators import sketch_width

# the first test waits for all processes: 40 seconds on two idle cores, several times that on busy ones
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
ORDERS = ("before", "after")
FEW = 5  # tests, up to which no job is run but theirs
PEFT_HAS_LORA_GA = hasattr(peft, "preprocess_loraga")


class Found(dict):
    """Results by job, each a list by rank; a job that raised fails the tests that ask for it."""

    def __init__(self, work: dict[str, tuple], folder: Path) -> None:
        super().__init__(folder=folder)
        self._work = work

    def __missing__(self, name: str) -> list:
        """Run one job by itself."""
        self.update(ranks.launch({name: self._work[name]}, self["folder"]))
        return super().__getitem__(name)

    def __getitem__(self, name: str):
        results = super().__getitem__(name)
        for rank, result in enumerate(results if isinstance(results, list) else ()):
            assert not isinstance(result, Exception), f"{name}, rank {rank}: {result.trace}"
        return results


def work_of(folder: Path) -> dict[str, tuple]:
    """Jobs by name: function, number of ranks, arguments."""
    return {
        "one": (jobs.sixteen, 1),
        "two": (jobs.sixteen, 2),
        "two again": (jobs.sixteen, 2),
        "four": (jobs.sixteen, 4),
        "uneven": (jobs.uneven, 4),
        "routed streaming": (jobs.routed, 4, "streaming"),
        "routed dense": (jobs.routed, 2, "dense"),
        "half": (jobs.half, 2),
        "autocast": (jobs.autocast, 2),
        "not linear streaming": (jobs.not_linear, 2, "streaming"),
        "not linear dense": (jobs.not_linear, 2, "dense"),
        **{f"every kind {start} {n}": (jobs.every_kind, n, start) for start in tiny.STARTS for n in (1, 2)},
        "ordinary": (jobs.ordinary, 2),
        "every kind sharded": (jobs.every_kind_sharded, 2),
        **({"peft flow": (jobs.peft_flow, 2, str(folder))} if PEFT_HAS_LORA_GA else {}),
        "failures": (jobs.failures, 4),
        "alone": (jobs.alone, 2),
        "ddp": (jobs.ddp, 2),
        **{f"whole {start}": (jobs.whole, 1, start) for start in tiny.STARTS},
        **{f"{start} {o}": (jobs.sharded, 2, start, o, str(folder)) for start in tiny.STARTS for o in ORDERS},
        "memory": (jobs.memory, 2),
        "refusals": (jobs.refusals, 2),
        "cut short": (jobs.cut_short, 2),
    }


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """What each rank of each job found: all of them in one go, or, for a few tests, each as it is asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    found = Found(work_of(folder), folder)
    if sum(item.module is request.module for item in request.session.items) > FEW:
        found.update(ranks.launch(work_of(folder), folder))
    return found


# ---- data parallel


@pytest.mark.parametrize("world", ["one", "two", "four"])
def test_ranks_together_are_as_good_as_one(found, world):
    excess = found[world][0]["excess"]
    assert sum(excess) / len(excess) <= 0.01
    assert max(excess) <= 0.05
    # captured over exact share of energy; the energy outside the sketch is estimated from sixteen probes
    assert found[world][0]["energy"] == pytest.approx([1.0] * len(excess), rel=0.15)


@pytest.mark.parametrize("world", ["two", "four"])
def test_all_ranks_get_the_same_bits(found, world):
    first = found[world][0]
    for other in found[world][1:]:
        for key in ("factors", "adapter", "report"):
            assert other[key] == first[key]


def test_the_same_world_gives_the_same_bits_again(found):
    assert found["two"][0]["factors"] == found["two again"][0]["factors"]
    assert found["two"][0]["adapter"] == found["two again"][0]["adapter"]
    assert found["two"][0]["adapter"] != found["one"][0]["adapter"]  # so that equality means something


def test_the_report_counts_over_all_ranks(found):
    for world, size in (("one", 1), ("two", 2), ("four", 4)):
        batches, count, reduced = found[world][0]["counts"]
        assert (batches, count) == (16, size)
        assert all(layer["updates"] == 16 for layer in found[world][0]["report"])
        assert (reduced > 0) == (size > 1)
        assert (f"{size} ranks" in found[world][0]["text"]) == (size > 1)


def test_bytes_reduced_are_those_of_three_thin_exchanges(found):
    """m n numbers for small layers; k (m + n), k n again, 16 m for probes and the factors for the others."""
    expected = 0
    for layer in found["two"][0]["report"]:
        m, n = layer["shape"]
        k, q = sketch_width(tiny.R), tiny.R
        sketch = 2 * k * n + (k + 16) * m
        expected += 4 * ((sketch if m * n > 2 * k * (m + n) else m * n) + q * (m + n + 1)) + 8
    counts = 8 * 5 * (1 + len(found["two"][0]["report"]))
    assert found["two"][0]["counts"][2] == expected + counts


def test_uneven_shares_and_a_poisoned_batch(found):
    first = found["uneven"][0]
    assert sum(first["excess"]) / len(first["excess"]) <= 0.01
    assert first["norm"] == pytest.approx([1.0] * len(first["norm"]), rel=0.01)
    for each in found["uneven"]:
        assert each["counts"] == (9, 1)
        assert each["layers"] == {(8, 1)}
    # said once in each of the two calls, by rank 0
    assert [each["warnings"] for each in found["uneven"]] == [2, 0, 0, 0]


def test_merging_inside_autocast(found):
    for each in found["autocast"]:
        assert len(each) == 4 and max(each) <= 1e-5


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_layers_that_only_some_ranks_call(found, estimator):
    results = found[f"routed {estimator}"]
    for each in results:
        assert each["names"] == ["experts.0", "experts.1", "small.0", "small.1"]
        assert min(each["captured"]) > 0.99
        assert each["norm"] == pytest.approx([1.0] * 4, rel=0.01)
        assert each["digest"] == results[0]["digest"]
    assert [len(each["warnings"]) for each in results] == [1] + [0] * (len(results) - 1)
    assert "experts.2" in results[0]["warnings"][0]


def test_float16_losses_scaled_by_each_rank_for_itself(found):
    for each in found["half"]:
        assert each == pytest.approx([1.0] * 3, rel=2e-3)


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_layers_that_are_not_linear(found, estimator):
    first, second = found[f"not linear {estimator}"]
    assert first["digest"] == second["digest"]
    assert min(first["captured"]) > 0.999
    assert first["norm"] == pytest.approx([1.0] * 3, rel=0.01)


@pytest.mark.parametrize("start", tiny.STARTS)
def test_adapters_of_every_kind(found, start):
    """Convolutions, an embedding and experts, one of which no rank uses: as one process with all batches."""
    (alone,), (first, second) = found[f"every kind {start} 1"], found[f"every kind {start} 2"]
    assert first == second
    assert first["ordinary"] == alone["ordinary"]
    assert list(first["ordinary"]) == ["straight.weight[2]", "crossed.weight[2]"]
    assert first["updates"] == alone["updates"] == {4}
    assert first["spectra"].keys() == alone["spectra"].keys()
    for name, spectrum in first["spectra"].items():
        assert spectrum == pytest.approx(alone["spectra"][name], rel=1e-3, abs=1e-5 * spectrum[0]), name


def test_what_stays_ordinary_is_the_same_on_all_ranks(found):
    first, second = found["ordinary"]
    assert first["made"] != second["made"]  # so that equality means something
    assert first["started"] == second["started"]


def test_adapters_of_every_kind_in_sharded_models(found):
    """Sharded after, their state dicts are what they were; sharded before, all but linear layers stay ordinary."""
    for result in found["every kind sharded"]:
        assert result["kept"] == [True, True]
        assert result["initialised"] == ["head"]
        assert result["ordinary"].keys() == {"table", "conv1", "conv2", "conv3", "point", "straight", "crossed"}
        assert all("is sharded; to start it, initialise before" in said for said in result["ordinary"].values())


@pytest.mark.skipif(not PEFT_HAS_LORA_GA, reason="this PEFT has no LoRA-GA (it came with 0.19)")
def test_pefts_own_calls(found):
    """B15: the same adapter on all ranks, from the mean over all batches."""
    first, second = found["peft flow"]
    assert first["merged"] == second["merged"] == first["cached"] == second["cached"]
    assert first["counts"] == second["counts"] == (4, 2)
    assert sum(first["excess"]) / len(first["excess"]) <= 0.01
    assert max(first["excess"]) <= 0.05
    assert second["failed"] == "OSError: bad step"
    assert first["failed"] == "RankFailed: Rank 1 stopped with OSError: bad step"
    assert first["sharded"].startswith("ValueError: The model is sharded by fully_shard already")


# ---- failures


@pytest.mark.parametrize(
    ("what", "rank", "text"),
    [
        ("loader", 2, "OSError: disk gone"),
        ("loss", 1, "ArithmeticError: bad loss"),
        ("targets", 1, "ValueError: target_modules={'layers.9'} finds no linear layer"),
        ("rank", 3, "ValueError: Rank 3 and rank 0 do not initialise the same thing; they differ in targets: (("),
        ("merging", 0, "MemoryError: no room"),
        ("writing", 2, "MemoryError: no room"),
    ],
)
def test_one_rank_fails_and_all_stop_with_its_error(found, what, rank, text):
    for index, each in enumerate(found["failures"]):
        assert each[what].startswith(text if index == rank else f"RankFailed: Rank {rank} stopped with {text}")
        assert each[f"{what} seconds"] < 20


def test_what_is_wrong_for_all_is_said_by_all(found):
    for each in found["failures"]:
        assert each["empty"].startswith("ValueError: The loader gave no batch")
        assert each["afterwards"] == "nothing"


def test_a_call_that_other_ranks_do_not_make_ends(found):
    alone = found["alone"][0]
    assert "waited 2 s" in alone["error"]
    assert "for rank 1. Every rank must make the same loraga calls" in alone["error"]
    assert len(alone["heard"]) == 1 and "for rank 1" in alone["heard"][0]


def test_a_failure_amid_collectives_of_the_forward_ends_when_that_process_does(found):
    waiting, failed = found["cut short"]
    assert failed["outcome"] == "OSError: amid the forward"
    assert waiting["outcome"] == "RankFailed: Rank 1 stopped with OSError: amid the forward"
    assert max(waiting["seconds"], failed["seconds"]) < 30


# ---- wrappers and sharding


@pytest.mark.parametrize("moment", ["between batches", "amid the merge"])
def test_a_killed_rank_stops_the_others_in_bounded_time(moment, tmp_path):
    survivor, dead = ranks.launch({"killed": (jobs.killed, 2, moment)}, tmp_path)["killed"]  # which would not wait on
    assert dead == -signal.SIGKILL
    assert survivor.startswith("RankFailed"), survivor
    assert ("for rank 1" if moment == "between batches" else "may be gone") in survivor


def test_distributed_data_parallel(found):
    first, second = found["ddp"]
    assert first["names"] == ["layers.0", "layers.1", "layers.2"]
    assert "pass model.module" in first["refused"]
    assert first["same"]
    assert first["started"] == second["started"]
    assert first["trained"] == second["trained"] != first["started"]
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", tiny.STARTS)
def test_fully_shard_trains_as_one_process(found, start, order):
    (whole,) = found[f"whole {start}"]
    for each in found[f"{start} {order}"]:
        assert each["kinds"].keys() == {"DTensor"}
        assert each["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert each["back"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", tiny.STARTS)
def test_what_a_sharded_model_saves_is_a_plain_adapter(found, start, order):
    (whole,) = found[f"whole {start}"]
    read = PeftModel.from_pretrained(tiny.build("llama"), found["folder"] / f"{start}-{order}")
    state = {name: value for name, value in read.state_dict().items() if "lora_" in name}
    assert state.keys() == whole["start"].keys()
    for name, value in whole["start"].items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5)


def test_no_tensor_of_a_sharded_initialisation_is_larger_than_in_a_training_step(found):
    for each in found["memory"]:
        assert each["start"] <= each["step"] < each["weights"], each["what"]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("plain", "ValueError: The model is sharded by fully_shard already"),
        ("weights", "ValueError: scale='weight-svd' needs the whole weight of 'model.layers.0.self_attn.q_proj'"),
        ("uneven", "ValueError: The loaders of 1 of 2 ranks"),
        ("loss", "OSError: behind the forward"),
        ("export", "ValueError: The parameters of this model are sharded"),
        ("dora", "ValueError: The DoRA magnitude of 'model.layers.0.self_attn.q_proj'"),
        ("columns", "ValueError: Layer 'model.layers.0.mlp.gate_proj' is tensor-parallel"),
        ("rows", "ValueError: Layer 'model.layers.0.mlp.down_proj' is tensor-parallel"),
    ],
)
def test_what_cannot_be_done_with_sharded_models_says_so(found, what, text):
    for each in found["refusals"]:
        assert each[what].startswith(text)


def test_sharded_models_can_be_tapped_and_initialised_anew(found):
    for each in found["refusals"]:
        assert each["factors"] <= 1e-5  # of a plain sharded model
        assert each["beside"] <= 1e-5  # of a layer beside tensor-parallel ones
        assert each["kinds"] == {"DTensor"}  # after a loss function raised
        assert each["again"] == each["after all"] == each["anew"] == "nothing"


# ---- other libraries' marks, without these libraries


def test_deepspeed_zero_3_is_refused():
    model = tiny.MLP()
    parameter = model.layers[1].weight
    parameter.ds_id, parameter.ds_shape = 3, parameter.shape
    parameter.data = torch.empty(0)
    for call in (tiny.init, loraga.estimate_factors):
        with pytest.raises(ValueError, match=r"ZeRO-3 .*layers\.1\.weight.*loraga init"):
            call(model, tiny.mlp_batches(1))


def test_a_tensor_parallel_plan_is_refused_by_layer():
    model = tiny.MLP()
    model.layers[1]._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"'layers\.1' is tensor-parallel \(colwise\)"):
        loraga.estimate_factors(model, tiny.mlp_batches(1), rank=4)
    assert set(loraga.estimate_factors(model, tiny.mlp_batches(1), ["layers.0"], rank=4)) == {"layers.0"}


def test_flat_parameters_are_refused():
    class FlatParameter(nn.Parameter):
        pass

    model = tiny.MLP()
    model.layers[0].weight = FlatParameter(model.layers[0].weight.detach())
    with pytest.raises(ValueError, match="fully_shard"):
        tiny.init(model, tiny.mlp_batches(1))
