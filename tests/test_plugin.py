"""PEFT's own LoRA-GA calls with `apply_to_peft`.

The first part asserts what PEFT's own tests of LoRA-GA do. They can be run as they are, too, from a checkout of PEFT:

    python -c "import sys, pytest, loraga; loraga.apply_to_peft(); sys.exit(pytest.main(sys.argv[1:]))" \
        PATH/tests/test_lora_ga.py
"""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from zoo import (
    MLP,
    R,
    assert_same,
    batches,
    build,
    captured,
    config,
    everything_about,
    exact_gradients,
    halves,
    mlp_batches,
    objective_excess,
)

import loraga
from loraga.integrations import plugin

if not hasattr(peft, "preprocess_loraga"):
    pytest.skip("this PEFT has no LoRA-GA (it came with 0.19)", allow_module_level=True)

# as user code has it: imported before the plugin is applied
from peft import LoraGAConfig, preprocess_loraga
from peft.tuners.lora import loraga as peft_loraga

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
ATTRIBUTE = "_peft_loraga_grad"


@pytest.fixture(autouse=True)
def applied():
    loraga.apply_to_peft()
    yield
    loraga.restore_peft()


def lora_ga(direction: str = "ArB2r", scale: str = "stable", **kwargs) -> LoraConfig:
    options = LoraGAConfig(direction=direction, scale=scale)
    return config(init_lora_weights="lora_ga", lora_ga_config=options, **kwargs)


def step_of(model: nn.Module, loader: list[dict]):
    """A user's callback: forward and backward of every batch."""

    def train_step(model: nn.Module = model) -> None:
        for batch in loader:
            model(**batch)["loss"].backward()

    return train_step


def start(model: nn.Module, loader: list[dict], lora: LoraConfig | None = None, **kwargs) -> PeftModel:
    lora = lora or lora_ga()
    preprocess_loraga(model, lora, step_of(model, loader), **kwargs)
    return get_peft_model(model, lora)


def output(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)["logits"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


def carriers(model: nn.Module) -> dict[str, plugin.SketchedGradient]:
    return {name: getattr(m, ATTRIBUTE) for name, m in model.named_modules() if hasattr(m, ATTRIBUTE)}


def snapshot_of(model: nn.Module) -> dict:
    return everything_about(model) | {"carriers": set(carriers(model))}


# ------------------------------------------------------------------------------- what PEFT's own tests ask for


class Square(nn.Sequential):
    """One 10 x 10 layer; the loss is the sum of its outputs, so that the gradient has rank 1."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(nn.Linear(10, 10, dtype=dtype))
        self.train()

    def step(self) -> None:
        for _ in range(4):
            self.zero_grad()
            self(torch.randn(2, 10, dtype=self[0].weight.dtype)).sum().backward()


def square_config(direction: str = "ArB2r", scale: str = "stable", **kwargs) -> LoraConfig:
    return lora_ga(direction, scale, **{"target_modules": ["0"], "use_rslora": False, **kwargs})


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_something_of_the_shape_of_the_weight_waits_at_the_layer_in_between():
    model = Square()
    preprocess_loraga(model, square_config(), model.step)
    assert getattr(model[0], ATTRIBUTE).shape == model[0].weight.shape
    peft_model = get_peft_model(model, square_config())
    assert not carriers(peft_model)


def test_a_missing_lora_ga_config_is_an_error_in_both_halves():
    model, missing = Square(), config(target_modules=["0"])
    with pytest.raises(ValueError, match="If you want to use LoRA-GA"):
        preprocess_loraga(model, missing, lambda: None)
    preprocess_loraga(model, square_config(), model.step)
    with pytest.raises(ValueError, match="lora_ga_config must be provided"):
        get_peft_model(model, config(target_modules=["0"], init_lora_weights="lora_ga"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_saved_adapter_is_right_on_the_changed_base(direction, scale, tmp_path):
    model, x = Square(), torch.randn(2, 10)
    preprocess_loraga(model, square_config(direction, scale), model.step)
    peft_model = get_peft_model(model, square_config(direction, scale))
    expected = answer(peft_model, x)
    peft_model.save_pretrained(tmp_path)
    close(answer(PeftModel.from_pretrained(model, tmp_path), x), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_converted_adapter_is_right_on_the_original_base(direction, scale, tmp_path):
    """With `random` and `weight_svd` too, which PEFT leaves out because its own draws differ."""
    model, x = Square(), torch.randn(2, 10)
    original = copy.deepcopy(model)
    preprocess_loraga(model, square_config(direction, scale), model.step)
    peft_model = get_peft_model(model, square_config(direction, scale))
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path / "start")
    with torch.no_grad():  # as if trained for a while
        peft_model.base_model.model[0].lora_B["default"].weight.add_(0.1)
    expected = answer(peft_model, x)
    peft_model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    close(answer(PeftModel.from_pretrained(original, tmp_path / "end"), x), expected)
    assert (expected - answer(Square(), x)).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_half_precision_keeps_its_dtype(dtype, tmp_path):
    model, x = Square(dtype), torch.randn(2, 10, dtype=dtype)
    before = answer(model, x)
    preprocess_loraga(model, square_config(), model.step)
    peft_model = get_peft_model(model, square_config(), autocast_adapter_dtype=False)
    layer = peft_model.base_model.model[0]
    assert {layer.lora_A["default"].weight.dtype, layer.lora_B["default"].weight.dtype} == {dtype}
    expected = answer(peft_model, x)
    close(expected.float(), before.float(), 2e-2)
    peft_model.save_pretrained(tmp_path)
    assert torch.allclose(answer(PeftModel.from_pretrained(model, tmp_path), x), expected, atol=1e-2)


@pytest.mark.parametrize("autocast", [True, False])
def test_what_is_subtracted_is_what_is_added(autocast):
    """The adapter's values as stored, in the dtype of the base, not those before rounding."""
    model = MLP().bfloat16()
    original = copy.deepcopy(model)

    def train_step() -> None:
        for batch in mlp_batches():
            model(batch["inputs"].bfloat16(), batch["labels"])["loss"].backward()

    preprocess_loraga(model, lora_ga(), train_step)
    peft_model = get_peft_model(model, lora_ga(), autocast_adapter_dtype=autocast)
    for index, layer in enumerate(peft_model.base_model.model.layers):
        A, B = (x.double() for x in halves(peft_model, f"layers.{index}"))
        expected = original.layers[index].weight.double() - layer.scaling["default"] * B @ A
        assert torch.equal(A, A.bfloat16().double())
        assert (layer.get_base_layer().weight == expected.bfloat16()).double().mean() > 0.99


class Mixed(nn.Module):
    """One layer that can be started, and two that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv2d, self.embedding = nn.Linear(10, 10), nn.Conv2d(3, 16, 3), nn.Embedding(50, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_other_kinds_of_layers_are_left_to_peft():
    model, lora = Mixed(), square_config(target_modules=["linear", "conv2d", "embedding"])
    preprocess_loraga(model, lora, lambda: model(torch.randn(3, 10)).square().sum().backward())
    assert set(carriers(model)) == {"linear"}
    assert answer(get_peft_model(model, lora), torch.randn(2, 10)).shape == (2, 10)
    with pytest.raises(ValueError, match="No supported layers found"):
        preprocess_loraga(Mixed(), square_config(target_modules=["conv2d", "embedding"]), lambda: None)


# ------------------------------------------------------------------------------- the right start


def model_and_batches(name: str) -> tuple[nn.Module, list[dict]]:
    return (MLP(), mlp_batches()) if name == "mlp" else (build(name), batches(name))


def unit_factors(peft_model: PeftModel, name: str) -> loraga.Factors:
    """A and B without the scale m^(1/4)/sqrt(16), where LoRA-GA's objective looks for them."""
    A, B = halves(peft_model, name)
    size = B.shape[0] ** 0.25 / 4
    return loraga.Factors(torch.cat([torch.zeros_like(B), B], dim=1) / size, torch.zeros(2 * R), A / size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_the_start_against_the_exact_svd_of_the_exact_gradient(name):
    model, loader = model_and_batches(name)
    original = copy.deepcopy(model)
    peft_model = start(model, loader)
    report = peft_model.loraga_report
    assert report.micro_batches == len(loader) and not report.ordinary
    exact = exact_gradients(original, [layer.name for layer in report.layers], loader)
    for layer in report.layers:
        gradient, factors = exact[layer.name], unit_factors(peft_model, layer.name)
        assert torch.allclose(factors.Vh @ factors.Vh.T, torch.eye(R), atol=1e-5), layer.name
        assert torch.allclose(
            factors.U.T @ factors.U, torch.diag(torch.tensor([0.0, 1.0])).kron(torch.eye(R)), atol=1e-5
        )
        assert objective_excess(gradient, factors, R) < 0.05, layer.name
        spectrum = torch.linalg.svdvals(gradient)[: 2 * R].tolist()
        assert layer.spectrum == pytest.approx(spectrum, rel=0.05), layer.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_the_function_stays_and_the_base_gives_what_the_adapter_takes(name):
    model, loader = model_and_batches(name)
    original = copy.deepcopy(model)
    kept = model.state_dict()  # aliases of the weights
    peft_model = start(model, loader)
    close(output(peft_model, loader[0]), output(original, loader[0]))
    assert all(torch.equal(value, kept[key]) for key, value in original.state_dict().items())
    assert {c.r for c in peft_model.peft_config.values()} == {R}
    for layer in peft_model.loraga_report.layers:
        inside = peft_model.base_model.model.get_submodule(layer.name)
        assert inside.r["default"] == R and type(inside.lora_A["default"]) is nn.Linear
        A, B = (x.double() for x in halves(peft_model, layer.name))
        weight = original.get_submodule(layer.name).weight.detach().double()
        delta = inside.scaling["default"] * B @ A
        expected = weight - (delta.T if isinstance(original.get_submodule(layer.name), Conv1D) else delta)
        assert (inside.get_base_layer().weight.double() - expected).norm() < 1e-6 * delta.norm()
        assert not inside.get_base_layer().weight.requires_grad


def test_factors_of_the_preprocessed_layers():
    """For the rank of the layer, by rank_pattern too, of the mean over backward calls."""
    model, loader = build("llama"), batches("llama")
    lora = lora_ga(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6})
    exact = exact_gradients(model, names := [n for n, m in model.named_modules() if n.endswith("_proj")], loader)
    preprocess_loraga(model, lora, step_of(model, loader))
    found = carriers(model)
    assert list(found) == names
    for name, carrier in found.items():
        rank = 2 if "q_proj" in name else 6 if name == "model.layers.1.mlp.up_proj" else R
        assert carrier.name == name and carrier.factors.rank == 2 * rank
        assert captured(exact[name], carrier.factors) > 0.95
    peft_model = get_peft_model(model, lora)
    assert peft_model.base_model.model.model.layers[1].mlp.up_proj.r["default"] == 6
    close(output(peft_model, loader[0]), output(build("llama"), loader[0]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_options_mean_what_fast_init_means(direction, scale):
    loader = mlp_batches()
    peft_model = start(MLP(), loader, lora_ga(direction, scale))
    ours = loraga.fast_init(
        MLP(),
        loader,
        config(),
        init=loraga.InitConfig(
            direction=direction, scale={"weight_svd": "weight-svd", "gd_scale": "gd"}.get(scale, scale)
        ),
        show_progress_bar=False,
    )
    for layer in ours.loraga_report.layers:
        for a, b in zip(halves(peft_model, layer.name), halves(ours, layer.name), strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
    close(output(peft_model, loader[0]), output(MLP(), loader[0]))


@pytest.mark.parametrize("targets", ["all-linear", None, r".*\.(q_proj|up_proj)", ["q_proj", "down_proj"]])
def test_targets_in_every_form(targets):
    """B27; and the user's config is not written to."""
    model, lora = build("llama"), lora_ga(target_modules=targets, exclude_modules=["layers.1.self_attn.q_proj"])
    before = copy.deepcopy(lora)
    preprocess_loraga(model, lora, step_of(model, batches("llama", 1)))
    assert lora == before
    found = carriers(model)
    peft_model = get_peft_model(model, lora)
    adapted = [n for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert list(found) == adapted and not carriers(peft_model)


def test_same_seed_same_bits():
    """B14: whatever the global generator holds."""
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(start(build("llama"), batches("llama"), lora_ga("random", "weight_svd")).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_the_scale_of_the_loss_does_not_matter(scale):
    """B1."""
    loader, model = mlp_batches(), MLP()

    def train_step() -> None:
        for batch in loader:
            (model(**batch)["loss"] * scale).backward()

    preprocess_loraga(model, lora_ga(), train_step)
    scaled, plain = get_peft_model(model, lora_ga()), start(MLP(), loader)
    for layer in plain.loraga_report.layers:
        for a, b in zip(halves(scaled, layer.name), halves(plain, layer.name), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_dora_starts_at_the_base_function():
    model, loader = MLP(), mlp_batches()
    close(output(start(model, loader, lora_ga(use_dora=True)), loader[0]), output(MLP(), loader[0]))


# ------------------------------------------------------------------------------- the user's step


class Repeated(nn.Module):
    """A layer called several times per forward, checkpointed in some way or not."""

    def __init__(self, kind: str = "plain", times: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.again, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 12)
        self.kind, self.times = kind, times

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.again(x))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.first(inputs)
        for _ in range(self.times):
            plain = self.kind == "plain"
            x = self.block(x) if plain else checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")
        logits = self.last(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("kind", ["plain", "non-reentrant", "reentrant"])
def test_each_backward_call_is_one_micro_batch(kind):
    """B10: not each call of a layer; also where checkpointing runs backward inside backward."""
    model, loader = Repeated(kind), mlp_batches()
    exact = exact_gradients(Repeated(), ["first", "again", "last"], loader)
    preprocess_loraga(model, lora_ga(target_modules=["first", "again", "last"]), step_of(model, loader))
    assert model.loraga_report.micro_batches == 4
    for name, carrier in carriers(model).items():
        spectrum = torch.linalg.svdvals(exact[name])[: 2 * R].tolist()
        assert carrier.factors.S.tolist() == pytest.approx(spectrum, rel=1e-3), name


def test_micro_batches_however_forward_and_backward_are_ordered():
    loader = mlp_batches()
    exact = exact_gradients(MLP(), ["layers.1"], loader)["layers.1"]
    spectrum = torch.linalg.svdvals(exact)[: 2 * R]

    def at_the_end(model: nn.Module) -> None:
        for loss in [model(**batch)["loss"] for batch in loader]:
            loss.backward()

    def in_one(model: nn.Module) -> None:
        sum(model(**batch)["loss"] for batch in loader).backward()

    def by_the_engine(model: nn.Module) -> None:
        torch.autograd.backward([model(**batch)["loss"] for batch in loader])

    for step, count in ((at_the_end, 4), (in_one, 1), (by_the_engine, 1)):
        model = MLP()
        preprocess_loraga(model, lora_ga(), lambda step=step, model=model: step(model))
        assert model.loraga_report.micro_batches == count
        expected = (spectrum * 4 / count).tolist()
        assert carriers(model)["layers.1"].factors.S.tolist() == pytest.approx(expected, rel=1e-3)


def test_an_in_place_activation_behind_a_target_works():
    """B30."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 96), nn.ReLU(inplace=True), nn.Linear(96, 12))

    def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"])

    model, (batch,) = net(), mlp_batches(1)
    preprocess_loraga(model, lora_ga(target_modules=["0", "2"]), lambda: loss_of(model, batch).backward())
    for name, gradient in exact_gradients(net(), ["0", "2"], [batch], loss_of).items():
        spectrum = torch.linalg.svdvals(gradient)[: 2 * R].tolist()
        assert carriers(model)[name].factors.S.tolist() == pytest.approx(spectrum, rel=1e-3)


class Noisy(MLP):
    """Dropout and BatchNorm, both of which would show in training mode."""

    def __init__(self) -> None:
        super().__init__((40, 40, 12))
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(40)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(self.drop(self.norm(inputs)), labels)


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_but_the_gradient_is_left_at_the_model(mode):
    """B11, B12, B19: gradients, modes, flags, buffers, hooks; and no weight gradient is computed."""
    model = Noisy().train(mode != "eval")
    model.norm.train(mode == "eval")
    model.layers[0].bias.requires_grad_(False)
    model.layers[1].weight.grad = torch.full_like(model.layers[1].weight, 7.0)
    before, seen = everything_about(model), []

    def train_step() -> None:
        assert not any(p.requires_grad for p in model.parameters())
        for batch in mlp_batches():
            model.zero_grad(set_to_none=False)
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            seen.append([p.grad for p in model.parameters() if p.grad is not None])

    preprocess_loraga(model, lora_ga(), train_step)
    assert_same(everything_about(model), before)
    assert seen == [[]] * 4
    exact = exact_gradients(Noisy().eval(), ["layers.0"], mlp_batches())["layers.0"]
    assert captured(exact, carriers(model)["layers.0"].factors) > 0.999


def test_the_step_may_choose_the_mode():
    model = Noisy().eval()
    before, drawn = everything_about(model), []

    def train_step() -> None:
        model.train()
        for _ in range(2):
            batch = mlp_batches(1)[0]
            drawn.append(model(**batch)["logits"].detach())
            model(**batch)["loss"].backward()

    preprocess_loraga(model, lora_ga(), train_step)
    assert not torch.equal(drawn[0], drawn[1])  # dropout was on
    after = everything_about(model)
    after["rng"] = before["rng"]  # the step drew, and PEFT leaves that to the step
    assert_same(after, before)


@pytest.mark.parametrize("where", ["at once", "amid", "in backward", "flags"])
def test_a_step_that_raises_leaves_the_model_as_it_was(where, tmp_path):
    """B31."""
    model, loader = Noisy().train(), mlp_batches()
    model.layers[1].requires_grad_(False)
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    before = snapshot_of(model)

    def train_step() -> None:
        if where == "at once":
            raise KeyError("mine")
        if where == "flags":
            model.requires_grad_(True).eval()
        loss = model(**loader[0])["loss"]
        if where == "in backward":
            loss.register_hook(lambda _: {}["mine"])
        loss.backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        preprocess_loraga(model, lora_ga(), train_step, cache_file=str(tmp_path / "cache"))
    after = snapshot_of(model)
    assert_same(after, before)
    assert after["carriers"] == set() and not list(tmp_path.iterdir()) and not hasattr(model, "loraga_report")


class Unused(MLP):
    """A target that no batch reaches, and one whose result goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.aside = nn.Linear(40, 30), nn.Linear(40, 30)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.aside(inputs)
        return super().forward(inputs, labels)


def test_layers_without_a_gradient_are_named_and_ordinary(tmp_path):
    """B9; from the cache as well."""
    model, cache = Unused(), str(tmp_path / "cache")
    named = r"unused \(never called.*aside \(called, but no gradient"
    with pytest.warns(UserWarning, match=named) as caught:
        preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()), cache)
    assert caught[0].filename == __file__
    assert set(carriers(model)) == {"layers.0", "layers.1", "layers.2"}
    peft_model = get_peft_model(model, lora_ga())
    A, B = halves(peft_model, "unused")
    assert A.any() and not B.any()
    close(output(peft_model, mlp_batches()[0]), output(Unused(), mlp_batches()[0]))
    with pytest.warns(UserWarning, match=named) as caught:
        preprocess_loraga(Unused(), lora_ga(), None, cache)
    assert caught[0].filename == __file__


def test_a_nan_micro_batch_is_left_out_and_named():
    model, loader = MLP(), mlp_batches()
    bad = {**loader[1], "inputs": torch.full_like(loader[1]["inputs"], torch.nan)}
    with pytest.warns(UserWarning, match="1 of 3 micro-batches gave NaN"):
        preprocess_loraga(model, lora_ga(), step_of(model, [loader[0], bad, loader[2]]))
    exact = exact_gradients(MLP(), ["layers.1"], [loader[0], loader[2]])["layers.1"]
    spectrum = torch.linalg.svdvals(exact)[: 2 * R].tolist()
    assert carriers(model)["layers.1"].factors.S.tolist() == pytest.approx(spectrum, rel=1e-3)


# ------------------------------------------------------------------------------- one clear error


def tied() -> nn.Module:
    model = MLP((40, 40, 40, 12))
    model.layers[1].weight = model.layers[0].weight
    return model


def int8() -> nn.Module:
    model = MLP()
    model.layers[1].weight = nn.Parameter(torch.ones(56, 96, dtype=torch.int8), requires_grad=False)
    return model


def quant_state() -> nn.Module:
    model = MLP()
    model.layers[0].quant_state = "4bit"
    return model


REFUSED = {
    "unknown scale": (MLP, {"scale": "gd"}, r"scale='gd'.*'weight_svd'"),
    "unknown direction": (MLP, {"direction": "foo"}, "direction='foo'.*'ArB2r'"),
    "rank too large": (MLP, {"r": 7}, r"'layers\.2'.*too small for r=7.*largest usable r here is 6"),
    "no target": (MLP, {"target_modules": ["nowhere"]}, r"No supported layers found.*'layers\.0'"),
    "no default": (MLP, {"target_modules": None}, "No supported layers found.*no default target_modules"),
    "tied": (tied, {}, r"changes base weights.*layers\.0.*layers\.1.*shares it"),
    "int8": (int8, {}, r"quantized weight of 'layers\.1'"),
    "quantized": (quant_state, {}, r"quantized weight of 'layers\.0'"),
    "parameters": (MLP, {"target_parameters": ["layers.1.weight"]}, "target_parameters.*fast_init"),
    "replication": (MLP, {"layer_replication": [(0, 1)]}, "layer_replication.*fast_init"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_step_runs(case):
    """B13, B18, B28, B29, B32, B35."""
    make, options, message = REFUSED[case]
    model = make()
    before = snapshot_of(model)
    with pytest.raises(ValueError, match=message):
        preprocess_loraga(model, lora_ga(**options), lambda: pytest.fail("the step ran"))
    assert_same(snapshot_of(model), before)


def test_gamma_must_be_positive():
    lora = lora_ga()
    lora.lora_ga_config.stable_gamma = 0
    with pytest.raises(ValueError, match="stable_gamma=0 must be"):
        preprocess_loraga(MLP(), lora, lambda: pytest.fail("the step ran"))


def test_a_model_with_adapters_is_refused():
    """B21, B36: the base would change under them."""
    peft_model = get_peft_model(MLP(), config())
    with pytest.raises(ValueError, match=r"carries adapters already.*fast_init"):
        preprocess_loraga(peft_model, lora_ga(), lambda: None)
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    peft_model = get_peft_model(model, config())
    expected = output(peft_model, mlp_batches()[0])
    with pytest.raises(ValueError, match=r"what adapter 'default' beside 'second' computes"):
        peft_model.add_adapter("second", lora_ga())
    assert torch.equal(output(peft_model, mlp_batches()[0]), expected)


def test_a_step_without_a_gradient_is_an_error():
    model = MLP()
    with pytest.raises(ValueError, match="None of the 3 target layers saw a gradient: none was called"):
        preprocess_loraga(model, lora_ga(), lambda: None)
    with pytest.raises(ValueError, match="gradient is zero at every target"):
        preprocess_loraga(model, lora_ga(), lambda: (0 * model(**mlp_batches()[0])["loss"]).backward())
    assert not carriers(model)


def test_a_larger_rank_needs_another_run_and_a_smaller_one_does_not():
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    smaller = get_peft_model(copy.deepcopy(model), lora_ga(r=2))
    assert halves(smaller, "layers.0", 2)[0].shape == (2, 40)
    with pytest.raises(ValueError, match=r"'layers\.0'.*ran for r=4, and the adapter has r=5; run it again"):
        get_peft_model(model, lora_ga(r=5))


def test_low_cpu_mem_usage_is_one_clear_error():
    """B33."""
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    with pytest.raises(ValueError, match="leave out low_cpu_mem_usage=True"):
        get_peft_model(model, lora_ga(), low_cpu_mem_usage=True)


def test_dropout_is_warned_of():
    """B24."""
    model = MLP()
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.1.*do not cancel") as caught:
        preprocess_loraga(model, lora_ga(lora_dropout=0.1), step_of(model, mlp_batches()))
    assert caught[0].filename == __file__


# ------------------------------------------------------------------------------- the cache file


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_cached_gradients_give_the_same_start_and_the_step_is_not_run(name, tmp_path):
    model, loader = model_and_batches(name)
    again, cache = copy.deepcopy(model), str(tmp_path / "new" / "folder" / "cache.pt")
    fresh = start(model, loader, cache_file=cache).state_dict()
    preprocess_loraga(again, lora_ga(), lambda: pytest.fail("the step ran"), cache_file=cache)
    cached = get_peft_model(again, lora_ga()).state_dict()
    assert all(torch.equal(value, cached[key]) for key, value in fresh.items())


def test_a_cache_file_needs_no_folder_and_is_smaller_than_the_gradients(tmp_path, monkeypatch):
    """B25."""
    monkeypatch.chdir(tmp_path)
    start(build("llama"), batches("llama", 1), cache_file="cache.pt")
    targets = sum(p.numel() for n, p in build("llama").named_parameters() if "_proj" in n)
    assert 0 < (tmp_path / "cache.pt").stat().st_size < 4 * targets / 4
    (tmp_path / "empty.pt").touch()  # PEFT takes an empty file for none
    start(MLP(), mlp_batches(), cache_file="empty.pt")
    assert (tmp_path / "empty.pt").stat().st_size > 0


def test_a_cache_that_does_not_fit_is_refused(tmp_path):
    """B26."""
    cache = str(tmp_path / "cache.pt")
    start(MLP(), mlp_batches(), cache_file=cache)
    (tmp_path / "text.pt").write_text("not a cache")
    torch.save([1], tmp_path / "list.pt")
    cases = (
        (
            MLP((40, 96, 64, 12)),
            lora_ga(),
            cache,
            r"another model: layer 'layers\.1' is \(64, 96\) here and \(56, 96\)",
        ),
        (MLP((40, 96, 56, 56, 12)), lora_ga(), cache, r"another model: layer 'layers\.2'"),
        (Unused(), lora_ga(), cache, "knows nothing of layer 'unused'"),
        (MLP(), lora_ga(r=5), cache, r"made for r=4 at layer 'layers\.0', and r=5 is asked for"),
        (MLP(), lora_ga(), tmp_path / "text.pt", "cannot be read"),
        (MLP(), lora_ga(), tmp_path / "list.pt", "no gradients by layer"),
    )
    for model, lora, file, message in cases:
        before = snapshot_of(model)
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*{message}.*Delete it"):
            preprocess_loraga(model, lora, lambda: pytest.fail("the step ran"), cache_file=file)
        assert_same(snapshot_of(model), before)
    start(MLP(), mlp_batches(), lora_ga(r=2, target_modules=["layers.0"]), cache_file=cache)  # fewer will do


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_gradients_that_peft_computed_itself_are_taken(name, tmp_path):
    """Its cache file, and what it left at the layers before the plugin was applied."""
    model, loader = model_and_batches(name)
    theirs, cache = copy.deepcopy(model), str(tmp_path / "cache.pt")
    lora = lora_ga(target_modules=["c_fc", "c_proj"] if name == "gpt2" else ["layers.0", "layers.1"])
    loraga.restore_peft()
    step = step_of(theirs, loader)
    preprocess_loraga(theirs, lora, lambda: step(theirs.eval()), cache_file=cache)  # PEFT trains with dropout
    assert all(isinstance(gradient, torch.Tensor) for gradient in carriers(theirs).values())
    loraga.apply_to_peft()
    names = list(carriers(theirs))
    exact = exact_gradients(model, names, loader)
    from_cache = start(copy.deepcopy(model), [], lora, cache_file=cache)
    for peft_model in (get_peft_model(theirs, lora), from_cache):
        close(output(peft_model, loader[0]), output(model, loader[0]))
        for layer in names:
            assert objective_excess(exact[layer], unit_factors(peft_model, layer), R) < 1e-3, layer


# ------------------------------------------------------------------------------- on and off


def functions() -> list:
    """Everything the plugin may touch: the public names, what the wrapper calls, the helper and the method."""
    inside = [cell.cell_contents for cell in preprocess_loraga.__closure__]
    names = [peft.preprocess_loraga, peft_loraga.preprocess_loraga, peft_loraga.get_target_modules]
    return [*names, *inside, peft_loraga.estimate_gradients, LoraLayer.lora_ga_init, LoraLayer.update_layer]


def test_applied_twice_is_once_and_restored_is_as_before():
    loraga.restore_peft()
    before = functions()
    loraga.restore_peft()  # harmless
    loraga.apply_to_peft()
    applied = functions()
    loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), applied, strict=True))
    assert sum(a is not b for a, b in zip(applied, before, strict=True)) == 3
    loraga.restore_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))


def test_whoever_imported_earlier_is_served_and_given_back():
    """This file imported it before anything was applied; PEFT's own gradient is a tensor."""
    model = MLP()
    preprocess_loraga(model, lora_ga(), step_of(model, mlp_batches()))
    assert all(isinstance(gradient, plugin.SketchedGradient) for gradient in carriers(model).values())
    later = MLP()
    peft_loraga.estimate_gradients(later, lora_ga(), step_of(later, mlp_batches()))
    for name, gradient in carriers(later).items():
        assert torch.equal(gradient.factors.U, carriers(model)[name].factors.U)
    loraga.restore_peft()
    with pytest.raises(ValueError, match=r"'layers\.0' was sketched.*only after get_peft_model"):
        get_peft_model(model, lora_ga())
    plain = MLP()
    explicit = lora_ga(target_modules=["layers.0"])
    preprocess_loraga(plain, explicit, step_of(plain, mlp_batches()))
    assert isinstance(getattr(plain.layers[0], ATTRIBUTE), torch.Tensor)


def test_gradients_are_on_although_peft_switches_them_off_around():
    model, loader = MLP(), mlp_batches()
    with torch.inference_mode():
        preprocess_loraga(model, lora_ga(), step_of(model, loader))
    assert carriers(model)
    assert not torch.is_inference(get_peft_model(model, lora_ga()).base_model.model.layers[0].weight)


@pytest.mark.parametrize(
    "version, why",
    [("0.18.1", "has no LoRA-GA; it came with 0.19"), ("0.22.0", "not known"), ("1.0.0.dev0", "not known")],
)
def test_an_unknown_peft_is_refused(version, why, monkeypatch):
    loraga.restore_peft()
    before = functions()
    monkeypatch.setattr(peft, "__version__", version)
    remedy = r".*Checked releases: 0\.19, 0\.20, 0\.21\..*fast_init"
    with pytest.raises(RuntimeError, match=rf"PEFT {re.escape(version)} {why}{remedy}" if "LoRA" in why else why):
        loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))


@pytest.mark.parametrize(
    "owner, name, other, why",
    [
        ("module", "estimate_gradients", lambda model, step: None, "another estimate_gradients"),
        ("module", "preprocess_loraga", lambda model: None, "another preprocess_loraga"),
        ("layer", "lora_ga_init", lambda self, adapter_name: None, r"another LoraLayer\.lora_ga_init"),
    ],
)
def test_a_peft_that_is_built_differently_is_refused(owner, name, other, why, monkeypatch):
    loraga.restore_peft()
    monkeypatch.setattr(peft_loraga if owner == "module" else LoraLayer, name, other)
    before = functions()
    with pytest.raises(RuntimeError, match=why):
        loraga.apply_to_peft()
    assert all(a is b for a, b in zip(functions(), before, strict=True))
