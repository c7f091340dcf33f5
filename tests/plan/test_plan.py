"""What `loraga plan` predicts, against the real thing at small sizes."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import loraga
from loraga.capture.isolation import isolated
from loraga.capture.taps import Taps
from loraga.cli.main import main
from loraga.estimators import LayerSpec, make_estimators
from loraga.integrations.hf_models import NAMES, config_of, without_weights
from loraga.integrations.peft.targets import find_target_names
from loraga.plan import plan as planning
from loraga.plan.dry_run import Ceilings, DryRun
from loraga.plan.plan import CHECKPOINTED, plan

CPU = torch.device("cpu")
try:
    planning.check_versions()
except ValueError as too_old:
    pytest.skip(str(too_old), allow_module_level=True)


def small_llama(layers=2, width=320, **kwargs):
    return hf.LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=448,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        **kwargs,
    )


def planned(config, lora=None, family="AutoModelForCausalLM", dtype=torch.float32, **kwargs):
    options = {"rows": 2, "length": 48, "micro_batches": 4, **kwargs}
    return plan(without_weights(config, family, dtype), lora or tiny.config(), **options)


FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "qwen2": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
}


@pytest.mark.parametrize("name, rank", [*((name, tiny.R) for name in FAMILIES), ("llama", 200)])
def test_state_is_that_of_the_real_estimators(name, rank):
    """Also at a rank that some layers have too few directions for."""
    model, lora = tiny.build(name), tiny.config(r=rank)
    if name == "bert":  # the one of tiny.py is no language model
        model = hf.BertForMaskedLM(model.config)
    found = planned(model.config, lora, FAMILIES[name])
    real = tiny.init(model, tiny.batches("gpt2"), lora).loraga_report
    assert found.state_bytes == real.state_bytes
    assert sum(layers.count for layers in found.layers) == len(real.layers)
    kinds = {layer.shape for layer in real.layers}
    assert {layers.shape for layers in found.layers} == kinds
    by_shape = sum(
        make_estimators([LayerSpec(layer.name, *layer.shape, min(rank, *layer.shape), 0, CPU)], loraga.InitConfig(), 4)[
            0
        ].state_bytes
        for layer in real.layers
    )
    assert found.state_bytes == by_shape


def test_small_layers_are_dense_and_large_ones_streaming():
    found = {layers.shape: layers for width in (320, 512) for layers in planned(small_llama(width=width)).layers}
    assert (found[512, 512].kind, found[512, 512].columns) == ("streaming", 80)
    assert (found[160, 320].kind, found[160, 320].columns) == ("dense", 0)
    assert found[160, 320].state_bytes == 4 * 160 * 320 * found[160, 320].count


def test_model_flops_are_those_torch_counts_on_the_real_model():
    # written-out attention, since torch's counter does not know the CPU's fused kernel
    config = small_llama(layers=3, attn_implementation="eager")
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    targets = find_target_names(model)
    ids = torch.randint(0, 512, (2, 48))
    with isolated(model), Taps(targets, lambda *_: None) as taps, FlopCounterMode(display=False) as counter:
        taps.backward(model(input_ids=ids, labels=ids).loss)
    assert planned(config).model_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_our_flops_are_the_four_thin_products_and_little_else():
    m, n, tokens = 512, 512, 2 * 48
    found = next(layers for layers in planned(small_llama(width=512)).layers if layers.shape == (m, n))
    thin = 2 * tokens * (80 + 96) * (m + n)  # X V with the probes beside V, and dY of that; dY Q, and X of that
    bases = found.flops / found.count - thin
    assert 0 < bases < 16 * (m + n) * 80**2  # the rest: the old sum's share, and orthonormalisation, without the tokens


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_activations_are_those_autograd_keeps_on_the_real_model(name):
    model = tiny.build(name)
    bare = without_weights(model.config, FAMILIES[name], torch.float32).eval()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    ids = torch.randint(0, tiny.VOCABULARY, (2, 48))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    with DryRun() as run:
        run.leave_out([*bare.parameters(), *bare.buffers()])
        ids = ids.to("meta")
        ids_bytes = run.live
        loss = bare(input_ids=ids, labels=ids).loss
        assert run.live - ids_bytes == pytest.approx(real, rel=0.01)
        loss.backward()
    del loss


def test_fused_attention_counts_as_torch_counts_it():
    q = torch.empty(2, 8, 64, 16, device="meta", requires_grad=True)
    k = torch.empty(2, 4, 64, 16, device="meta", requires_grad=True)
    with DryRun() as run:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        forward = run.flops
        torch.autograd.backward(out.sum())
    assert forward == 2 * (2 * 2 * 8 * 64 * 64 * 16)
    assert run.flops - forward == 5 * (2 * 2 * 8 * 64 * 64 * 16)  # one of them again: the scores are not kept


def test_dry_run_follows_what_is_held():
    with DryRun() as run:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100).t()
        assert run.live == 4000
        c = a + 1
        del a
        assert run.live == 8000  # the view holds on to it
        del b
        assert run.live == 4000
        c.mul_(2)
        assert run.live == 4000
        with run.aside() as cost:
            c.double()
        del c
    assert (run.live, run.peaks["start"], cost.extra) == (0, 8000, 8000)


def test_time_is_the_longer_of_flops_and_bytes():
    a = torch.empty(64, 64, device="meta")
    for ceilings, seconds in ((Ceilings(1e3, 1e30), 2 * 64**3 / 1e3), (Ceilings(1e30, 1e3), 3 * 4 * 64**2 / 1e3)):
        with DryRun(ceilings) as run:
            a @ a
        assert run.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("micro_batches", "bytes_per_number"),
    [
        (256, 2),
        (257, 4),
    ],
)
def test_dense_buffers_are_bfloat16_up_to_256_micro_batches(micro_batches, bytes_per_number):
    found = planned(small_llama(), micro_batches=micro_batches, init=loraga.InitConfig(estimator="dense"))
    for layers in found.layers:
        assert layers.state_bytes == bytes_per_number * layers.count * layers.shape[0] * layers.shape[1]


def test_training_with_adamw_holds_16_bytes_for_each_trained_number():
    """The number in float32, its gradient and two moments; beside them one token is nothing."""
    rank = 120
    found = planned(small_llama(), tiny.config(r=rank), rows=1, length=1)
    trained = sum(layers.count * rank * sum(layers.shape) for layers in found.layers)
    assert found.adapter_bytes == 4 * trained
    assert found.peaks["LoRA training step"] - found.weight_bytes == pytest.approx(16 * trained, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rank, rows", [(2, 8), (40, 1)])
def test_deep_models_are_extrapolated_exactly(monkeypatch, rank, rows):
    """Against a dry run of all blocks, where activations dominate the peak and where adapter gradients do."""
    lora = tiny.config(r=rank)
    short = planned(small_llama(layers=9), lora, rows=rows, length=16)
    monkeypatch.setattr("loraga.plan.plan._BLOCKS", 9)
    whole = planned(small_llama(layers=9), lora, rows=rows, length=16)
    assert short.peaks == pytest.approx(whole.peaks, rel=1e-3)
    assert short.model_flops == pytest.approx(whole.model_flops, rel=1e-9)
    assert short.layers == whole.layers


@pytest.mark.slow
def test_extrapolation_of_two_stacks(monkeypatch):
    config = tiny.build("t5").config
    config.num_layers, config.num_decoder_layers = 5, 4
    short = planned(config, family="AutoModelForSeq2SeqLM")
    monkeypatch.setattr("loraga.plan.plan._BLOCKS", 9)
    whole = planned(config, family="AutoModelForSeq2SeqLM")
    assert short.peaks == pytest.approx(whole.peaks, rel=0.02)
    assert short.model_flops == pytest.approx(whole.model_flops, rel=1e-9)


@pytest.mark.slow
def test_checkpointing_saves_memory_and_costs_a_forward():
    plain, again = (planned(small_llama(layers=8), rows=64, checkpointing=way) for way in (False, True))
    assert plain.peaks == again.peaks
    for what in ("initialisation", "LoRA training step"):
        assert plain.peaks[what + CHECKPOINTED] < 0.75 * plain.peaks[what]
    assert 1.2 < again.model_flops / plain.model_flops < 1.5
    assert plain.update_flops == again.update_flops


def test_what_waits_on_a_gpu_is_bounded(monkeypatch):
    """Pairs of all layers wait if there is room, at the end of backward; then the peak of checkpointing is there."""
    unbounded = planned(small_llama(layers=6), rows=64).peaks["initialisation" + CHECKPOINTED]
    bounds = []
    for bound in (1, 2**24):
        monkeypatch.setattr(planning, "WAITING_BYTES", bound)
        bounds.append(planned(small_llama(layers=6), rows=64).peaks["initialisation" + CHECKPOINTED])
    assert bounds[1] - bounds[0] == 2**24 - 1 and bounds[1] < unbounded


def test_bytes_between_ranks():
    config = small_llama(width=512)
    alone, four = planned(config), planned(config, ranks=4)
    assert (alone.merged_bytes, alone.broadcast_bytes) == (0, 0)
    expected, factors = 0, 0
    for layers in four.layers:
        m, n = layers.shape
        one = 4 * (2 * n * 80 + m * (80 + 16)) if layers.columns else 4 * m * n
        expected += layers.count * one
        factors += layers.count * (4 * tiny.R * (m + n + 1) + 8)
    assert (four.merged_bytes, four.broadcast_bytes) == (expected, factors)


@pytest.mark.parametrize(
    "name, parameters",
    [("llama-2-7b", 6.738e9), ("llama-2-70b", 6.898e10), ("llama-3-8b", 8.030e9), ("llama-3.1-405b", 4.059e11)],
)
def test_named_shapes(name, parameters):
    model = without_weights(config_of(name), "AutoModelForCausalLM", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert all(p.is_meta for p in model.parameters())


def test_command_prints_the_plan(capsys, tmp_path):
    small_llama(architectures=["LlamaForCausalLM"], max_position_embeddings=64).save_pretrained(tmp_path)
    call = ["--rank", "4", "--tokens", "700", "--micro-batch", "2", "--length", "32", "--ranks", "2"]
    call += ["--tflops", "10", "--gb-per-second", "100"]
    for source in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(source), *call]) == 0
        text = capsys.readouterr().out
        for part in ("6 micro-batches of 2 x 32 tokens on each of 2 ranks", "a prediction at 10 TFLOP/s", "merging 2"):
            assert part in text
    assert main(["plan", str(tmp_path), *call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batches"] == 6 and found["state_bytes"] > 0 and sum(found["seconds"].values()) > 0


@pytest.mark.parametrize(
    "call, said",
    [
        (["no-such-model"], "is no named shape (llama-2-7b"),
        (["./nowhere/config.json"], "there is no file or folder './nowhere/config.json'"),
        (["EMPTY"], "holds no config.json"),
        (["CONFIG", "--length", "65"], "more than the 64 positions"),
        (["CONFIG", "--tflops", "3"], "go together"),
        (["CONFIG", "--target-modules", "no_proj"], "finds no linear layer"),
    ],
)
def test_errors_of_the_command(capsys, tmp_path, call, said):
    small_llama(architectures=["LlamaForCausalLM"], max_position_embeddings=64).save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    model, *options = call
    model = {"CONFIG": str(tmp_path / "model"), "EMPTY": str(tmp_path / "empty")}.get(model, model)
    defaults = ["--rank", "4", "--tokens", "64", "--length", "32"]
    assert main(["plan", model, *defaults, *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1


def test_a_model_that_looks_at_values_is_refused():
    config = hf.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        experts_implementation="eager",
    )
    with pytest.raises(ValueError, match="depends on the values"):
        planned(config, tiny.config(target_modules=["q_proj"]))


def test_names_are_known():
    assert {"llama-2-7b", "llama-3-8b", "llama-2-70b", "llama-3.1-405b"} <= set(NAMES)


@pytest.mark.parametrize(
    ("library", "found", "least"), [("torch", "2.8.0+cu128", "2.9"), ("transformers", "4.57.1", "5.0")]
)
def test_what_is_too_old_is_named(library, found, least, monkeypatch, capsys):
    monkeypatch.setattr(planning, "version", lambda name: found if name == library else "99.0")
    with pytest.raises(ValueError, match=rf"needs {library} {least} or newer, and this is {re.escape(found)}: upgrade"):
        planned(small_llama())
    assert main(["plan", "llama-2-7b", "--rank", "8", "--tokens", "4096"]) == 2
    assert "Initialising works with older ones" in capsys.readouterr().err
