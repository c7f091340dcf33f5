"""`export_adapter`: the best approximation of a rank or of a budget, and a file that every reader takes alike."""

from __future__ import annotations

import inspect
import json
import warnings

import pytest
import torch
from adapters import (
    STARTS,
    base_model,
    close,
    disturb,
    fingerprint,
    inputs,
    llama,
    output,
    relative,
    started,
    trained,
    unchanged,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file
from torch import nn

import loraga
from loraga.integrations import peft as integration

pytestmark = pytest.mark.filterwarnings("ignore:At this rank:UserWarning")


def read(folder, base: nn.Module) -> PeftModel:
    return PeftModel.from_pretrained(base, folder).eval()


def deltas(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """s B A of each layer in float64."""
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in peft_model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def settings(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [None, 1, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_best_approximation_of_a_rank(kind, rank, start, rslora, tmp_path):
    """With the error that the exact SVD has; the model stays as it is."""
    options = {"use_rslora": rslora, "rank_pattern": {"c_fc|up_proj": 3}, "alpha_pattern": {"mlp.*": 4}}
    peft_model = trained(base_model(kind), start, **options)
    before = fingerprint(peft_model)
    errors = loraga.export_adapter(peft_model, tmp_path, rank=rank)
    unchanged(peft_model, before)
    assert settings(tmp_path)["use_rslora"] is False and not (tmp_path / "loraga.json").exists()
    exported, wanted = deltas(read(tmp_path, base_model(kind))), deltas(peft_model)
    assert errors.keys() == exported.keys() == wanted.keys()
    for name, delta in wanted.items():
        kept = rank or peft_model.base_model.model.get_submodule(name).r["default"]
        singular = torch.linalg.svdvals(delta)
        best = float(singular[kept:].norm() / singular.norm())
        assert errors[name] == pytest.approx(best, abs=1e-5)
        assert relative(exported[name], delta) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("one_rank", [False, True])
@pytest.mark.parametrize("budget", [14, 31, 56])
def test_a_budget_is_one_threshold_over_all_layers(budget, one_rank, start, tmp_path):
    """No other choice of as many directions (at least one a layer) keeps more of all updates together."""
    peft_model = trained(base_model(), start, alpha_pattern={"q_proj": 40})
    errors = loraga.export_adapter(peft_model, tmp_path, budget=budget, one_rank=one_rank)
    wanted, exported = deltas(peft_model), deltas(read(tmp_path, base_model()))
    spectra = {name: torch.linalg.svdvals(delta)[:4] for name, delta in wanted.items()}
    ranks = {name: int(torch.linalg.matrix_rank(exported[name], rtol=1e-5)) for name in wanted}
    assert sum(ranks.values()) == budget and min(ranks.values()) >= 1
    kept = [float(spectra[name][rank - 1]) for name, rank in ranks.items() if rank > 1]
    dropped = [float(spectra[name][rank]) for name, rank in ranks.items() if rank < 4]
    if kept and dropped:
        assert min(kept) >= max(dropped)
    for name, rank in ranks.items():
        best = float(spectra[name][rank:].norm() / spectra[name].norm())
        assert errors[name] == pytest.approx(best, abs=1e-5)
        assert relative(exported[name], wanted[name]) == pytest.approx(best, abs=1e-5)
    written = settings(tmp_path)
    assert written["r"] == max(ranks.values())
    if one_rank:
        assert not written["rank_pattern"] and not written["alpha_pattern"]
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert {A.shape[0] for key, A in tensors.items() if "lora_A" in key} == {max(ranks.values())}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("how", [{}, {"rank": 3}, {"budget": 40}, {"budget": 40, "one_rank": True}], ids=str)
def test_a_reader_that_knows_alpha_over_r_only_is_right(how, start, tmp_path):
    """What servers do: W + alpha / r · B A, with alpha and r of the whole file, whatever the patterns say."""
    options = {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 21}}
    peft_model = trained(base_model(), start, **options)
    loraga.export_adapter(peft_model, tmp_path, **how)
    expected = output(read(tmp_path, base_model()), inputs())
    base, written = base_model(), settings(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                base.get_submodule(name).weight += written["lora_alpha"] / written["r"] * (B @ A)
    close(output(base, inputs()), expected)


def test_a_large_error_is_warned_of_and_a_small_one_is_not(tmp_path):
    peft_model = trained(base_model("mlp"), "mirror")
    with pytest.warns(UserWarning, match=r"changes the update of [23] of 3 layers by more than 10%: .*\(\d+%\)"):
        loraga.export_adapter(peft_model, tmp_path, rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loraga.export_adapter(peft_model, tmp_path)


@pytest.mark.parametrize("start", STARTS)
def test_what_else_the_adapter_holds_is_kept(start, tmp_path):
    peft_model = trained(base_model(), start, modules_to_save=["lm_head"], use_dora=True)
    errors = loraga.export_adapter(peft_model, tmp_path, rank=6)
    assert max(errors.values()) < 1e-6
    close(output(read(tmp_path, base_model()), inputs()), output(peft_model, inputs()))


class Mixed(nn.Module):
    """Layers that loraga can start beside layers it cannot; their names end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 12, max_norm=1e3)  # which is never reached
        self.block = nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 12))
        self.conv = nn.Sequential(nn.Conv1d(12, 6, 1, dilation=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.block(self.table(x)).transpose(1, 2))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"conv.0": 2}, "alpha_pattern": {"conv.0": 7}},
        {"rank_pattern": {"(table|0)": 3}, "alpha_pattern": {"(conv.0|2)": 12}},
        {"use_rslora": True, "rank_pattern": {"^block.0": 3}},
    ],
    ids=str,
)
def test_layers_that_are_not_started_are_written_as_they_are(options, start, tmp_path):
    peft_model = started(Mixed(), start, target_modules=["0", "2", "table"], **options)
    slots, unsupported = integration.find_slots(peft_model, "default")
    assert [slot.name for slot in slots] == ["block.0", "block.2"] and list(unsupported) == ["table", "conv.0"]
    x = torch.arange(10)[None]
    close(output(peft_model, x), output(Mixed(), x))
    disturb(peft_model)
    for name, how in (("all", {}), ("wide", {"rank": 6}), ("thin", {"rank": 1}), ("shared", {"budget": 3})):
        loraga.export_adapter(peft_model, tmp_path / name, **how)
        again = read(tmp_path / name, Mixed())
        if name in ("all", "wide"):
            close(output(again, x), output(peft_model, x))
        ours, theirs = (deltas(model)["conv.0"] for model in (peft_model, again))
        close(ours, theirs, 1e-6)
    assert sum(again.base_model.model.block[index].r["default"] for index in (0, 2)) == 3


class LikePatterns(nn.Module):
    """Names that say something else where PEFT takes them for patterns: the key "a.b" matches "a_b" as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(12, 12) for _ in range(4)]
        self.a = nn.ModuleDict({"b": layers[0]})
        self.a_b = layers[1]
        self.deep = nn.ModuleDict({"c+": layers[2]})
        self.add_module("c+", layers[3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("c+")(self.deep["c+"](self.a_b(self.a["b"](x))))


@pytest.mark.parametrize("weak", ["a.b", "c+"])
def test_a_rank_is_written_for_the_layer_of_that_name_only(weak, tmp_path):
    """One layer gets rank 1, and all others keep theirs."""
    peft_model = trained(LikePatterns(), "mirror", target_modules=["b", "a_b", "c+"])
    with torch.no_grad():
        peft_model.base_model.model.get_submodule(weak).lora_B["default"].weight *= 1e-3
    loraga.export_adapter(peft_model, tmp_path, budget=13)
    again = read(tmp_path, LikePatterns())
    ranks = {name: layer.r["default"] for name, layer in again.named_modules() if isinstance(layer, LoraLayer)}
    assert sorted(ranks.values()) == [1, 4, 4, 4] and ranks[f"base_model.model.{weak}"] == 1
    x = torch.randn(3, 12)
    close(output(again, x), output(peft_model, x), 1e-3)


@pytest.mark.skipif("target_modules_to_tie" not in inspect.getsource(LoraModel), reason="this PEFT ties no adapters")
@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"rank": 6}, {"budget": 7}], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_an_output_layer_tied_to_the_embedding(start, how, tmp_path):
    """`ensure_weight_tying`: its A and B are the embedding's B and A, in memory and in the file."""

    def tied_model() -> nn.Module:
        return llama(tie_word_embeddings=True).eval()

    peft_model = trained(
        tied_model(), start, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True, use_rslora=True
    )
    errors = loraga.export_adapter(peft_model, tmp_path, **how)
    again = read(tmp_path, tied_model())
    ours, theirs = deltas(peft_model), deltas(again)
    for name, error in errors.items():
        assert relative(theirs[name], ours[name]) == pytest.approx(error, abs=1e-5)
    embedding = theirs["model.embed_tokens"]
    assert embedding.shape == theirs["lm_head"].shape
    close(theirs["lm_head"], embedding, 1e-5)
    if max(errors.values()) < 1e-6:
        close(output(again, inputs()), output(peft_model, inputs()))


def square(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))


def test_two_layers_that_share_one_adapter_are_each_written(tmp_path):
    """Tied by the user: in the file each has a copy of its own."""
    peft_model = started(square(), "plain", target_modules=["0", "2"])
    first, second = (peft_model.base_model.model[index] for index in (0, 2))
    second.lora_A["default"], second.lora_B["default"] = first.lora_A["default"], first.lora_B["default"]
    disturb(peft_model)
    x = torch.randn(3, 12)
    loraga.export_adapter(peft_model, tmp_path)
    close(output(read(tmp_path, square()), x), output(peft_model, x))


def test_shared_memory_that_would_be_written_wrong_is_refused(tmp_path):
    """A layer that loraga cannot shorten holds one side of a layer that it does."""
    peft_model = started(Mixed(), "mirror", target_modules=["2", "conv.0"])
    first, conv = peft_model.base_model.model.block[2], peft_model.base_model.model.conv[0]
    conv.lora_A["default"].weight = nn.Parameter(first.lora_B["default"].weight.detach().T[:, :, None])
    with pytest.raises(ValueError, match=r"'conv\.0' shares memory with that of 'block\.2'"):
        loraga.export_adapter(peft_model, tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how, error, match",
    [
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": True}, TypeError, "rank must be a whole number"),
        ({"rank": 2.0}, TypeError, "rank must be a whole number"),
        ({"budget": "8"}, TypeError, "budget must be a whole number"),
        ({"budget": 2}, ValueError, "budget=2 is too small: 3 is rank 1 for each layer"),
        ({"rank": 2, "budget": 8}, ValueError, "exclude each other"),
        ({"adapter_name": "other"}, ValueError, "no adapter 'other'"),
    ],
    ids=str,
)
def test_wrong_options_are_named_and_nothing_is_written(how, error, match, tmp_path):
    peft_model = started(base_model("mlp"), "mirror")
    with pytest.raises(error, match=match):
        loraga.export_adapter(peft_model, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
