"""The main job end to end: real architectures, every start, exactness of the start, and what must not change."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    ARCHITECTURES,
    MLP,
    STARTS,
    FewAndNone,
    R,
    assert_plain,
    assert_same,
    batches,
    build,
    captured,
    config,
    everything_about,
    exact_gradients,
    init,
    matrices,
    mlp_batches,
    objective_excess,
    pairs,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import loraga
from loraga import InitConfig
from loraga.capture.collector import Collector
from loraga.estimators import finish


def linear_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_factors_against_the_exact_svd(name, estimator):
    """LoRA-GA objective mean <= 1.01x, worst <= 1.05x (streaming); worst <= 1.01x (dense, bfloat16 buffers)."""
    model, loader = build(name), batches(name)
    factors = loraga.estimate_factors(model, loader, rank=2 * R, estimator=estimator)
    gradients = exact_gradients(model, list(factors), loader)
    assert len(factors) >= 8
    excess = [objective_excess(gradients[n], f, R) for n, f in factors.items()]
    if estimator == "streaming":
        assert sum(excess) / len(excess) <= 0.01 and max(excess) <= 0.05
    else:
        assert max(excess) <= 0.01
    for n, f in factors.items():
        assert f.shape == tuple(gradients[n].shape)
        assert captured(gradients[n], f) > 0.97


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_float32_is_exact(name):
    model, loader = build(name), batches(name)
    lora = config(r=R)
    peft_model = init(copy.deepcopy(model), loader, lora, init=InitConfig(estimator="dense", buffer_dtype="float32"))
    gradients = exact_gradients(model, [x.name for x in peft_model.loraga_report.layers], loader)
    for layer, g in gradients.items():
        a, b = pairs(peft_model, layer)
        u, v = torch.linalg.qr(b.double()).Q, torch.linalg.qr(a.double().T).Q
        best = torch.linalg.svdvals(g)[R:].norm()
        assert (g - u @ (u.T @ g) - (g @ v) @ v.T).norm() <= 1.001 * best


@pytest.mark.parametrize(
    ("name", "start", "rslora"),
    [
        *((name, start, False) for name in ARCHITECTURES for start in STARTS),
        *(("llama", start, True) for start in STARTS),
    ],
)
def test_start_is_the_paper_formula_on_the_exact_factors(name, start, rslora):
    """Directions and lengths (B1): r/2 mirrored pairs of the first right and the next left vectors, or r right ones.

    The paper's length m^(1/4)/sqrt(gamma) is for PEFT's scaling at rank r/2, which is 2 or sqrt(2) times that of rank
    r; a mirrored row is half as long as one that is alone.
    """
    model, loader = build(name), batches(name)
    peft_model = init(copy.deepcopy(model), loader, config(use_rslora=rslora), init=InitConfig(start=start))
    gradients = exact_gradients(model, [x.name for x in peft_model.loraga_report.layers], loader)
    for layer, g in gradients.items():
        c = g.shape[0] ** 0.25 / 4 * (2**0.5 if rslora else 2)
        if start == "mirror":
            a, b = pairs(peft_model, layer)
            c /= 2
            assert torch.allclose(b.T @ b, c**2 * torch.eye(R // 2), atol=1e-4 * c**2)
        else:
            a, b = matrices(peft_model, layer)
            assert not b.any()
        q = len(a)
        assert torch.allclose(a @ a.T, c**2 * torch.eye(q), atol=1e-4 * c**2)
        _, s, vh = torch.linalg.svd(g)
        if s[q - 1] > 1.2 * s[q]:  # where there is a gap the subspace is defined
            overlap = (a.double() / c) @ vh[:q].T
            assert overlap.square().sum() > 0.97 * q


@pytest.mark.slow
def test_minilm_with_real_weights_and_text(minilm):
    model, loader = minilm
    factors = loraga.estimate_factors(model, loader, rank=16)
    gradients = exact_gradients(model, list(factors), loader)
    excess = [objective_excess(gradients[n], f, 8) for n, f in factors.items() if min(f.shape) > 16]
    assert len(excess) == 36
    assert sum(excess) / len(excess) <= 0.01 and max(excess) <= 0.05


@pytest.fixture(scope="module")
def minilm():
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import docstrings
    from minilm import load_model, load_tokenizer

    data = docstrings.load()
    tokenizer = load_tokenizer()
    loader = []
    for i in range(4):
        rows = data.train[16 * i : 16 * i + 16]
        texts = [text for text, _ in rows]
        batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
        batch["labels"] = torch.tensor([label for _, label in rows])
        loader.append(batch)
    return load_model(16, seed=0), loader


# -------------------------------------------------------------------------------------- function at the start


def assert_unchanged(got: torch.Tensor, expected: torch.Tensor, exact: bool = False) -> None:
    """To within the rounding of a sum that is zero, or bit for bit, as where B is zero."""
    assert not exact or torch.equal(got, expected)
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_function_and_base_at_the_start(name, start):
    """And nothing but numbers in A and B tells the model from the one that PEFT alone would have made."""
    model, loader = build(name), batches(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = get_peft_model(build(name), config())
    with torch.no_grad():
        expected = model(**loader[0]).logits
        peft_model = init(model, loader, init=InitConfig(start=start))
        assert_plain(peft_model, plain)
        assert_unchanged(peft_model(**loader[0]).logits, expected, start == "zero-b")
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**loader[0]).logits, expected)
        for key, value in peft_model.unload().state_dict().items():
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_bfloat16_base_is_untouched_bit_for_bit(start, adapter_dtype):
    """B23: where base weights are rounded, nothing is written to them. Both halves of a pair round alike."""
    model, loader = build("llama").bfloat16(), batches("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**loader[0]).logits
        wide = adapter_dtype == torch.float32  # as PEFT has it, unless told otherwise
        peft_model = get_peft_model(model, config(), autocast_adapter_dtype=wide)
        loraga.fast_init(peft_model, loader, init=InitConfig(start=start), show_progress_bar=False)
        of_one_layer = (pairs if start == "mirror" else matrices)(peft_model, "model.layers.0.mlp.up_proj")
        assert {matrix.dtype for matrix in of_one_layer} == {adapter_dtype}
        got = peft_model(**loader[0]).logits
        assert (got.float() - expected.float()).abs().max() <= (0 if start == "zero-b" else 0.01)
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**loader[0]).logits, expected)
        assert all(torch.equal(value, before[key]) for key, value in peft_model.unload().state_dict().items())


def test_lora_one_moves_down_the_gradient():
    model, loader = build("llama"), batches("llama")
    with torch.no_grad():
        before = sum(float(model(**b).loss) for b in loader)
        peft_model = init(model, loader, init=InitConfig(method="lora-one", lora_one_gamma=1e4))
        assert sum(float(peft_model(**b).loss) for b in loader) < before
    assert_plain(peft_model, get_peft_model(build("llama"), config()))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("name", "targets"), [("vit", "all-linear"), ("bert", ["query", "classifier"])])
def test_a_head_of_five_outputs_at_rank_eight(name, targets, start):
    """As many mirrored pairs as it has directions for, then rows of which B is zero, then what an ordinary LoRA has."""
    loader = batches(name, classes=5)
    gradient = exact_gradients(build(name, labels=5), ["classifier"], loader)["classifier"]
    model = build(name, labels=5)
    with torch.no_grad():
        expected = model(**loader[0]).logits
        peft_model = init(model, loader, config(r=8, target_modules=targets), init=InitConfig(start=start))
        assert_unchanged(peft_model(**loader[0]).logits, expected, start == "zero-b")
    directions = {layer.name: layer.directions for layer in peft_model.loraga_report.initialised}
    assert directions.pop("classifier") == 5 and set(directions.values()) == {8}
    A, B = matrices(peft_model, "classifier")
    if start == "mirror":
        assert torch.equal(A[:2], A[2:4]) and torch.equal(B[:, :2], -B[:, 2:4]) and B[:, :2].any(dim=0).all()
        assert not B[:, 4:].any()
        found, others = torch.cat([2 * A[2:4], A[4:7]]), A[7:]  # a row of a pair is half as long
    else:
        assert not B.any()
        found, others = A[:5], A[5:]
    size = found[0].norm()
    assert torch.allclose(found @ found.T, size**2 * torch.eye(5), atol=1e-4 * size**2)
    assert (gradient @ (found / size).double().T).norm() > 0.9999 * gradient.norm()
    bound = A.shape[1] ** -0.5  # of PEFT's uniform distribution
    assert 0.9 * bound < others.abs().max() <= bound and others.std() == pytest.approx(bound / 3**0.5, rel=0.1)


# ------------------------------------------------------------------------------------- determinism, invariance


@pytest.mark.slow
def test_same_seed_same_bits_in_any_process():
    code = """
import sys; sys.path.insert(0, {tests!r})
import torch, loraga, hashlib
torch.manual_seed({noise}); torch.set_num_threads(1)
from tiny import build, batches
m = loraga.fast_init(build("llama"), batches("llama"), show_progress_bar=False, seed=5)
state = b"".join(v.numpy().tobytes() for k, v in sorted(m.state_dict().items()) if "lora" in k)
print(hashlib.sha256(state).hexdigest())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code.format(tests=str(Path(__file__).parent / "support"), noise=noise)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for noise in (1, 2)
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 60


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e15])
def test_scale_of_the_loss_does_not_matter(scale):
    """B1: reduction and accumulation change the size of the gradient, not the start."""
    loader = batches("llama")
    plain = init(build("llama"), loader)
    scaled = init(build("llama"), loader, loss_fn=lambda m, b: m(**b).loss * scale)
    for layer in plain.loraga_report.layers:
        (a, b), (c, d) = matrices(plain, layer.name), matrices(scaled, layer.name)
        # projections, since a sign or a rotation between equal singular values may turn with the last bit
        assert torch.allclose(a.T @ a, c.T @ c, atol=2e-3) and torch.allclose(b @ b.T, d @ d.T, atol=2e-3)


def assert_same_start(ours: PeftModel, theirs: PeftModel) -> None:
    assert ours.loraga_report.layers
    for layer in ours.loraga_report.layers:
        for one, other in zip(matrices(ours, layer.name), matrices(theirs, layer.name), strict=True):
            assert torch.equal(one, other), layer.name


@pytest.mark.parametrize("training", [True, False])
def test_mode_does_not_matter_and_stays(training):
    """B19: dropout and statistics play no part, and everything is as before afterwards."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, dropout_rate=0.5)
    )
    model.config.decoder_start_token_id = 0
    loader = batches("t5")
    runs = []
    for seed in (1, 2):
        other = copy.deepcopy(model).train(training)
        torch.manual_seed(seed)
        runs.append(loraga.estimate_factors(other, loader, rank=4))
        assert all(m.training == training for m in other.modules())
    for name in runs[0]:
        assert torch.equal(runs[0][name].U, runs[1][name].U)


@pytest.mark.parametrize("with_grad", [True, False])
def test_estimate_factors_leaves_no_trace(with_grad):
    """B6, B11, B31: pre-existing gradients neither enter nor are lost."""
    model, loader = build("llama").train(), batches("llama")
    clean = loraga.estimate_factors(model, loader, rank=4)
    if with_grad:
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e4)
    model.lm_head.requires_grad_(False)
    model.model.layers[0].eval()
    before = everything_about(model)
    factors = loraga.estimate_factors(model, loader, rank=4)
    assert_same(everything_about(model), before)
    for name, f in factors.items():
        assert torch.equal(f.U, clean[name].U)


@pytest.mark.parametrize("start", STARTS)
def test_a_peft_model_is_initialised_in_place_and_stays_as_it_was(start):
    model, loader = build("llama"), batches("llama")
    peft_model = get_peft_model(model, config(modules_to_save=["lm_head"])).train()
    flags = {n: p.requires_grad for n, p in peft_model.named_parameters()}
    modes = {n: m.training for n, m in peft_model.named_modules()}
    same = loraga.fast_init(peft_model, loader, show_progress_bar=False, init=InitConfig(start=start))
    assert same is peft_model
    assert {n: p.requires_grad for n, p in peft_model.named_parameters()} == flags
    assert {n: m.training for n, m in peft_model.named_modules()} == modes
    assert_same_start(init(build("llama"), loader, init=InitConfig(start=start)), peft_model)


HISTORIES = {
    "mirror": InitConfig(),
    "zero-b": InitConfig(start="zero-b"),
    "lora-one": InitConfig(method="lora-one"),
    "trained from an ordinary start": None,
}


@pytest.mark.filterwarnings("ignore:These layers keep an ordinary LoRA start")
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_that_was_trained_starts_as_a_fresh_one(start, history):
    """Bit for bit, also the rows that the gradient leaves over and layers that it does not reach: B is zero there."""
    model = FewAndNone()
    again, fresh = (get_peft_model(copy.deepcopy(model), config(r=8)) for _ in range(2))
    if HISTORIES[history] is not None:
        loraga.fast_init(again, mlp_batches(classes=5, seed=7), init=HISTORIES[history], show_progress_bar=False)
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    for peft_model in (again, fresh):
        torch.rand(1)  # wherever the global generator is
        loraga.fast_init(peft_model, mlp_batches(classes=5), init=InitConfig(start=start), show_progress_bar=False)
    assert_plain(again, fresh)
    assert_same_start(again, fresh)
    assert_same_start(again, init(model, mlp_batches(classes=5), config(r=8), init=InitConfig(start=start)))
    (A, B), started = matrices(again, "unused"), matrices(again, "layers.2")[1]
    assert not B.any() and A.any(dim=1).all()
    assert not started[:, 4 if start == "mirror" else 0 :].any()


@pytest.mark.parametrize("start", STARTS)
def test_factors_of_a_trained_model_are_those_of_its_base(start):
    peft_model = init(MLP(), mlp_batches(), init=InitConfig(start=start))
    with torch.no_grad():
        matrices(peft_model, "layers.1")[1].add_(0.1)
    factors = loraga.estimate_factors(peft_model, mlp_batches(), rank=R)
    for name, f in loraga.estimate_factors(MLP(), mlp_batches(), rank=R).items():
        torch.testing.assert_close(factors[f"base_model.model.{name}"].S, f.S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("start", STARTS)
def test_a_second_adapter_made_from_the_config_of_the_first(start, tmp_path):
    """It has the rank that was asked for, and its folder is read as any other."""
    loader, options = batches("llama"), InitConfig(start=start)
    peft_model = init(build("llama"), loader, init=options)
    peft_model.add_adapter("second", peft_model.peft_config["default"])
    loraga.fast_init(peft_model, loader, adapter_name="second", init=options, show_progress_bar=False)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["second"].weight.shape == (R, 320) and peft_model.peft_config["second"].r == R
    assert torch.equal(layer.lora_A["second"].weight, layer.lora_A["default"].weight)
    peft_model.set_adapter("second")
    with torch.no_grad():
        expected = build("llama")(**loader[0]).logits
        assert_unchanged(peft_model(**loader[0]).logits, expected, start == "zero-b")
        layer.lora_B["second"].weight += 0.1
        trained = peft_model(**loader[0]).logits
        peft_model.save_pretrained(tmp_path)
        for name, logits in (("second", trained), ("", expected)):
            read = PeftModel.from_pretrained(build("llama"), tmp_path / name)
            assert_unchanged(read(**loader[0]).logits, logits)


# ------------------------------------------------------------------------------------------- forms of input


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, 4),
        ({"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}, 2),
        ({"target_modules": None}, 4),  # PEFT's default for llama: q_proj, v_proj
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "k_proj"]}, 10),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
    ],
)
def test_targets_in_every_form(options, expected):
    """B27."""
    lora = config(**options)
    asked = copy.deepcopy(lora.to_dict())
    peft_model = init(build("llama"), batches("llama"), lora)
    assert len(peft_model.loraga_report.layers) == expected
    assert lora.to_dict() == asked  # the caller's config is not written to
    if "exclude_modules" not in options and "layers_to_transform" not in options:
        assert len(loraga.estimate_factors(build("llama"), batches("llama"), options["target_modules"])) == expected


def test_rank_and_alpha_patterns():
    lora = config(rank_pattern={"q_proj": 3, "down_proj": 6}, alpha_pattern={"q_proj": 32})
    model, loader = build("llama"), batches("llama")
    with torch.no_grad():
        expected = model(**loader[0]).logits
        peft_model = init(model, loader, lora)
        assert (peft_model(**loader[0]).logits - expected).abs().max() < 2e-5
    ranks = {x.name.rsplit(".", 1)[1]: (x.rank, x.directions) for x in peft_model.loraga_report.layers}
    # of an odd rank one row is left over, which takes a direction that a pair holds in B
    assert ranks["q_proj"] == (3, 2) and ranks["down_proj"] == (6, 6) and ranks["v_proj"] == (R, R)


def test_default_config_and_plain_module():
    loader = mlp_batches()
    model = MLP()
    names = linear_names(model)
    gradients = exact_gradients(model, names, loader)
    lora = LoraConfig(r=6, lora_alpha=6, target_modules="all-linear")
    peft_model = loraga.fast_init(model, loader, lora, show_progress_bar=False)
    assert {x.name for x in peft_model.loraga_report.layers} == set(names)
    for layer in peft_model.loraga_report.layers:
        g = gradients[layer.name]
        assert layer.spectrum == pytest.approx(torch.linalg.svdvals(g)[:6].tolist(), rel=1e-2)
        share = torch.linalg.svdvals(g)[:6].square().sum() / g.square().sum()
        assert layer.captured_energy == pytest.approx(float(share), abs=0.01)
    big = loraga.fast_init(MLP((64, 48, 32)), mlp_batches(width=64, classes=32), show_progress_bar=False)
    default = big.peft_config["default"]
    assert (default.r, default.lora_alpha, default.use_rslora) == (16, 64, False)
    assert [(layer.rank, layer.directions) for layer in big.loraga_report.layers] == [(16, 16)] * 2


def test_loaders_and_losses_of_every_kind():
    from transformers import BatchEncoding

    loader = batches("llama")
    reference = init(build("llama"), loader)

    def check(other_loader, loss_fn=None, **kwargs):
        got = init(build("llama"), other_loader, loss_fn=loss_fn, **kwargs)
        assert got.loraga_report.micro_batches == 4
        assert_same_start(reference, got)

    check([BatchEncoding(b) for b in loader])
    check([BatchEncoding(b) for b in loader], lambda m, b: m(input_ids=b.input_ids, labels=b.labels).loss)
    check(torch.utils.data.DataLoader(loader, batch_size=None))
    check([(b["input_ids"], b["labels"]) for b in loader], lambda m, b: m(input_ids=b[0], labels=b[1]).loss)
    check([*loader, *loader], max_batches=4)


def test_a_generator_of_unknown_length_gives_the_same_up_to_the_estimator():
    loader = batches("llama")
    assert_same_start(init(build("llama"), loader), init(build("llama"), (x for x in loader)))


def test_each_batch_counts_the_same():
    """The mean over micro-batches, as the official code: a batch of one row weighs as much as one of five."""
    loader = [*batches("llama", 1, rows=5), *batches("llama", 1, rows=1, seed=3)]
    model = build("llama")
    gradients = exact_gradients(model, ["model.layers.0.mlp.up_proj"], loader)
    factors = loraga.estimate_factors(model, loader, ["layers.0.mlp.up_proj"], rank=8)
    for name, g in gradients.items():
        assert factors[name].S.double().numpy() == pytest.approx(torch.linalg.svdvals(g)[:8].numpy(), rel=0.02)


def test_autocast_in_the_loss_function():
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    model, loader = build("llama"), batches("llama")
    exact = exact_gradients(model, ["model.layers.1.mlp.up_proj"], loader)["model.layers.1.mlp.up_proj"]
    f = loraga.estimate_factors(model, loader, [r"layers.1.mlp.up_proj"], rank=8, loss_fn=loss_fn)
    assert captured(exact, f["model.layers.1.mlp.up_proj"]) > 0.97


@pytest.mark.parametrize("estimator", ["streaming", "dense"])
def test_called_inside_autocast(estimator):
    """The model runs under the caller's autocast; the linear algebra does not."""
    model, loader = build("llama"), batches("llama")
    with torch.no_grad():
        expected = model(**loader[0]).logits
    with torch.autocast("cpu", torch.bfloat16):
        factors = loraga.estimate_factors(model, loader, rank=8, estimator=estimator)
        peft_model = init(model, loader, init=InitConfig(scale="weight-svd", estimator=estimator))
    for f in factors.values():
        assert torch.allclose(f.U.T @ f.U, torch.eye(8), atol=1e-5)
    assert_plain(peft_model, get_peft_model(build("llama"), config()))
    with torch.no_grad():
        assert_unchanged(peft_model(**loader[0]).logits, expected)


def test_blocks_compiled_in_place_run_as_written():
    """Hooks that come later are not in what was compiled; it is used again afterwards."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    model, loader = build("llama"), batches("llama")
    plain = loraga.estimate_factors(model, loader, rank=4)
    for block in model.model.layers:
        block.compile(backend=backend)
    for expected in (2, 2):
        calls.clear()
        with torch.no_grad():
            model(**loader[0])
        assert len(calls) == expected
        calls.clear()
        factors = loraga.estimate_factors(model, loader, rank=4)
        assert not calls
        assert all(torch.equal(factors[name].S, f.S) for name, f in plain.items())


def test_a_layer_computed_with_elsewhere_than_its_weight_lies():
    """As under FSDP2's CPU offload: the sketch is made anew where the gradient comes, as long as it is empty."""
    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    collector = Collector({"up": 8}, InitConfig(), 2, False, 0, cpu)
    collector.prepare({"up": nn.Linear(220, 300)}, {})
    collector._devices["up"] = elsewhere
    collector.make("up", 300, 220)
    pairs = [(torch.randn(40, 220), torch.randn(40, 300)) for _ in range(2)]
    for x, dy in pairs:
        collector.on_pair("up", x, dy)
        collector.next_micro_batch()
    assert collector.estimators["up"].spec.device == cpu
    assert (collector.outcomes.updates["up"], collector.outcomes.left_out()["up"]) == (2, 0)
    factors = finish(collector.estimators, {"up": 2.0})["up"].factors
    gradient = sum(dy.T @ x for x, dy in pairs) / 2
    assert float(factors.S[0]) == pytest.approx(float(torch.linalg.svdvals(gradient)[0]), rel=1e-2)


def test_called_in_inference_mode():
    """What comes out can be trained all the same."""
    model, loader = build("llama"), batches("llama")
    with torch.inference_mode():
        peft_model = init(model, loader)
    peft_model(**batches("llama")[0]).loss.backward()
    assert sum(p.grad is not None for p in peft_model.parameters()) == 28


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_float16_gradients_do_not_vanish(scale):
    """B22: small losses are scaled up before backward in float16."""
    torch.manual_seed(0)
    model = MLP((64, 96, 80, 12))
    loader = mlp_batches(width=64)
    gradients = exact_gradients(model, ["layers.0", "layers.1"], loader)
    half = copy.deepcopy(model).half()
    factors = loraga.estimate_factors(
        half,
        [{"inputs": b["inputs"].half(), "labels": b["labels"]} for b in loader],
        ["layers.0", "layers.1"],
        rank=8,
        loss_fn=lambda m, b: nn.functional.cross_entropy(m(b["inputs"])["logits"].float(), b["labels"]) * scale,
    )
    for name, f in factors.items():
        assert captured(gradients[name], f) > 0.98
        assert float(f.S[0]) == pytest.approx(float(torch.linalg.matrix_norm(gradients[name], 2)) * scale, rel=0.02)


def test_float16_overflow_backs_off_and_weighs_batches_the_same():
    """A loss whose scaled gradient overflows is tried again smaller; the sum keeps every batch's weight."""
    model = MLP((64, 96, 80, 12))
    loader = mlp_batches(width=64)
    factor = {id(b["labels"]): 1.0 if i % 2 else 64.0 for i, b in enumerate(loader)}

    def loss_of(m, b, dtype):
        # its value says nothing about its gradient: the scale chosen from it is far too large
        loss = nn.functional.cross_entropy(m(b["inputs"].to(dtype))["logits"].float(), b["labels"])
        return factor[id(b["labels"])] * (loss - loss.detach() + 1e-6)

    gradients = exact_gradients(model, ["layers.1"], loader, lambda m, b: loss_of(m, b, torch.float32))
    half = copy.deepcopy(model).half()
    f = loraga.estimate_factors(half, loader, ["layers.1"], rank=8, loss_fn=lambda m, b: loss_of(m, b, torch.float16))
    assert captured(gradients["layers.1"], f["layers.1"]) > 0.98
    top = float(torch.linalg.matrix_norm(gradients["layers.1"], 2))
    assert float(f["layers.1"].S[0]) == pytest.approx(top, rel=0.05)


# ------------------------------------------------------------------------------------------- what is reported


def test_report():
    peft_model = init(build("llama"), batches("llama"))
    report = peft_model.loraga_report
    assert len(report.layers) == 14 and not report.ordinary
    assert report.micro_batches == 4 and report.skipped_batches == 0 and set(report.seconds) >= {"gradients", "factors"}
    for layer in report.layers:
        assert layer.status == "initialised" and 0 < layer.captured_energy <= 1 and layer.updates == 4
        assert len(layer.spectrum) == layer.directions == R and layer.spectrum == sorted(layer.spectrum, reverse=True)
    assert "q_proj" in str(report)


def test_state_bytes_show_that_no_gradient_sized_buffer_exists():
    import transformers as hf

    wide = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=1024,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(wide)
    ids = torch.randint(0, 50, (1, 16))
    report = init(model, [{"input_ids": ids, "labels": ids}]).loraga_report
    weights = 4 * sum(x.shape[0] * x.shape[1] for x in report.layers)
    assert report.state_bytes < 0.2 * weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_caller_does_not_matter(dtype):
    model, loader = build("llama"), batches("llama")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        factors = loraga.estimate_factors(model, loader, ["up_proj"], rank=4)
    finally:
        torch.set_default_dtype(before)
    for name, f in loraga.estimate_factors(model, loader, ["up_proj"], rank=4).items():
        assert torch.equal(f.U, factors[name].U)
