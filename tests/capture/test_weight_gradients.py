"""Gradients that autograd forms: taken one at a time, summed exactly, and the model left as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from memory import LiveBytes, Queues
from tiny import captured, objective_excess
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import loraga
from loraga.capture.isolation import isolated
from loraga.capture.run import Batches, Request, estimate
from loraga.capture.taps import Taps
from loraga.capture.weight_gradients import WeightGradient, WeightGradientHooks, separate_parameters, weight_matrix
from loraga.config import InitConfig
from loraga.distributed.ranks import Ranks
from loraga.estimators import Dense, LayerSpec, StagingRing

CLASSES, RANK = 23, 4


class Outer(nn.Module):
    """A layer of nobody's kind: its weight enters twice, not as a product with the input."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n) / n**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight @ self.weight.T)


class EveryKind(nn.Module):
    """Every kind of layer with a weight matrix; the output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, 16)
        self.conv1 = nn.Conv1d(16, 18, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.conv3 = nn.Conv3d(2, 6, (1, 3, 1), padding=(0, 1, 0))
        self.norm = nn.LayerNorm(18)
        self.outer = Outer(18)
        self.up = nn.Linear(18, 16)
        self.head = nn.Linear(16, CLASSES, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.table(tokens).mT)  # (B, 18, T)
        h = self.middle(h)
        h = self.outer(self.outer(self.norm(h.mT)))  # called twice
        return self.head(self.up(h))

    def middle(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.conv2(h.unflatten(1, (6, 3))).flatten(1, 2)
        return h + torch.tanh(self.conv3(h.unflatten(1, (2, 3, 3)))).flatten(1, 3).unflatten(1, (3, 18)).sum(1)


WHOLE = ["table", "conv1", "conv2", "conv3", "outer"]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(batch).flatten(0, 1).float(), batch.roll(-1, 1).flatten())


def batches(count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, CLASSES, (4, 7), generator=g) for _ in range(count)]


def true_gradients(model: nn.Module, loader: list[torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Mean gradients in float64, each layer's own: its weight is no other layer's here."""
    import copy

    twin = copy.deepcopy(model).double()
    weights = []
    for name in names:
        module = twin.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().clone())
        weights.append(module.weight)
    sums = [torch.zeros_like(w) for w in weights]
    for batch in loader:
        logits = twin(batch).flatten(0, 1)
        grads = torch.autograd.grad(cross_entropy(logits, batch.roll(-1, 1).flatten()), weights)
        sums = [s + g / len(loader) for s, g in zip(sums, grads, strict=True)]
    return {name: s.flatten(1) for name, s in zip(names, sums, strict=True)}


def state_of(model: nn.Module) -> list:
    modules = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    parameters = [
        (id(p), p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone().tolist()), p.tolist())
        for p in model.parameters()
    ]
    return [modules, parameters, [p._post_accumulate_grad_hooks for p in model.parameters()]]


# ---------------------------------------------------------------------------------------------------- through the API
@pytest.mark.parametrize("estimator", ["dense", "streaming"])
def test_factors_of_layers_that_are_not_linear(estimator):
    model, loader = EveryKind(), batches()
    names = [*WHOLE, "up"]
    exact = true_gradients(model, loader, names)
    found = loraga.estimate_factors(model, loader, [*names, "norm"], RANK, estimator=estimator, loss_fn=loss_of)
    assert list(found) == ["table", "conv1", "conv2", "conv3", "outer", "up"]  # the model's order; a norm has no matrix
    for name, g in exact.items():
        assert (found[name].U.shape[0], found[name].Vh.shape[1]) == tuple(g.shape)
        # bfloat16 buffers (dense) round each sum to 0.4 %
        assert captured(g, found[name]) > 0.999
        assert objective_excess(g, found[name], RANK // 2) < (0.01 if estimator == "dense" else 1e-3)
        assert torch.allclose(found[name].S.double(), torch.linalg.svdvals(g)[:RANK], rtol=0.01, atol=1e-6)


def test_a_tied_weight_gives_the_embeddings_own_gradient():
    """The output layer's share of a tied weight's gradient is none of the embedding's adapter's business."""
    model, loader = EveryKind(), batches()
    g = true_gradients(model, loader, ["table"])["table"]
    found = loraga.estimate_factors(model, loader, ["table"], RANK, loss_fn=loss_of)["table"]
    assert captured(g, found) > 0.9999 and torch.allclose(found.S.double(), torch.linalg.svdvals(g)[:RANK], rtol=1e-3)


@pytest.mark.parametrize("wrong", [None, "loader", "loss", "rank"])
def test_the_model_is_left_as_it_was(wrong):
    model, loader = EveryKind(), batches()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.full_like(model.conv2.weight, 3.0)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    before = state_of(model)

    def broken(loader):
        yield loader[0]
        raise RuntimeError("the disk is gone")

    def loss(model, batch):
        result = loss_of(model, batch)
        result.backward()
        return result

    if wrong is None:
        loraga.estimate_factors(model, loader, WHOLE, RANK, loss_fn=loss_of)
    elif wrong == "loader":
        with pytest.raises(RuntimeError, match="disk"):
            loraga.estimate_factors(model, broken(loader), WHOLE, RANK, loss_fn=loss_of)
    elif wrong == "loss":
        with pytest.raises(ValueError, match="backward itself"):
            loraga.estimate_factors(model, loader, WHOLE, RANK, loss_fn=loss)
    else:
        with pytest.raises(ValueError, match=r"'conv3'.*has 6 singular directions.*rank=7"):
            loraga.estimate_factors(model, loader, ["conv3"], 7, loss_fn=loss_of)
    assert state_of(model) == before


def test_a_batch_with_nan_is_left_out_and_a_layer_that_is_not_called_is_named():
    model, loader = EveryKind(), batches(4)
    poisoned = [False, True, False, False]

    def loss(model, batch):
        factor = torch.nan if poisoned.pop(0) else 1.0
        return loss_of(model, batch) * factor

    model.idle = nn.Conv1d(5, 5, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = loraga.estimate_factors(model, loader, [*WHOLE, "idle"], RANK, loss_fn=loss)
    texts = [str(w.message) for w in said]
    assert any("idle (never called" in text for text in texts)
    assert any("1 of 4 micro-batches gave NaN" in text for text in texts)
    exact = true_gradients(model, [loader[0], *loader[2:]], WHOLE)
    for name, g in exact.items():
        assert captured(g, found[name]) > 0.999
        assert torch.allclose(found[name].S.double(), torch.linalg.svdvals(g)[:RANK], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, loader = EveryKind(), batches()
    exact = true_gradients(model.to(dtype), loader, WHOLE)
    found = loraga.estimate_factors(
        model, loader, WHOLE, RANK, loss_fn=lambda m, b: loss_of(m, b) * (1e-4 if dtype == torch.float16 else 1.0)
    )
    for name, g in exact.items():
        assert captured(g, found[name]) > (0.98 if dtype == torch.bfloat16 else 0.999)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, loader = EveryKind(), batches()
    exact = true_gradients(model, loader, ["conv1", "outer"])

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            layers = self.layers
            h = layers.table(tokens).mT.detach().requires_grad_()
            h = checkpoint(layers.conv1, h, use_reentrant=reentrant)
            h = layers.middle(h)
            h = checkpoint(
                layers.outer,
                checkpoint(layers.outer, layers.norm(h.mT), use_reentrant=reentrant),
                use_reentrant=reentrant,
            )
            return layers.head(layers.up(h))

    found = loraga.estimate_factors(Checkpointed(), loader, ["conv1", "outer"], RANK, loss_fn=loss_of)
    for name, g in exact.items():
        factors = found[f"layers.{name}"]
        assert captured(g, factors) > 0.9999
        assert torch.allclose(factors.S.double(), torch.linalg.svdvals(g)[:RANK], rtol=1e-3)


def test_sparse_gradients_of_an_embedding():
    model = nn.Sequential(nn.Embedding(CLASSES, 16, sparse=True), nn.Linear(16, CLASSES))
    dense = nn.Sequential(nn.Embedding(CLASSES, 16), nn.Linear(16, CLASSES))
    dense.load_state_dict(model.state_dict())
    ours, theirs = (loraga.estimate_factors(m, batches(), ["0"], RANK, loss_fn=loss_of)["0"] for m in (model, dense))
    assert torch.allclose(ours.S, theirs.S, rtol=1e-5) and torch.allclose(ours.U, theirs.U, atol=1e-4)


def test_a_convolution_under_an_adapter_of_its_own():
    from peft import LoraConfig, get_peft_model

    model, loader = EveryKind(), batches()
    exact = true_gradients(model, loader, ["conv1", "table"])
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["conv1", "table"], init_lora_weights=False))
    found = loraga.estimate_factors(peft_model, loader, ["conv1", "table"], RANK, loss_fn=loss_of)
    assert set(found) == {"base_model.model.conv1", "base_model.model.table"}
    for name, g in exact.items():
        assert captured(g, found[f"base_model.model.{name}"]) > 0.9999


def test_fast_init_still_says_which_layers_it_does_not_write():
    from peft import LoraConfig

    with pytest.warns(UserWarning, match=r"ordinary LoRA start: conv2 \(Conv2d with groups=3: PEFT's adapter mixes"):
        lora = LoraConfig(r=3, target_modules=["conv2", "up"])
        model = loraga.fast_init(EveryKind(), batches(), lora, loss_fn=loss_of, show_progress_bar=False)
    assert [layer.name for layer in model.loraga_report.initialised] == ["up"]


@pytest.mark.parametrize("estimator", ["dense", "streaming"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_is_held_for_a_layer_that_is_not_linear(estimator, dtype):
    model = EveryKind()
    config = InitConfig(estimator=estimator, buffer_dtype=dtype)
    request = Request(
        wanted={"conv1": RANK}, targets={}, weights={"conv1": WeightGradient(model.conv1)}, init=config, seed=0
    )
    seen = estimate(model, request, Batches(batches(), loss_of), Ranks())
    per_number = 2 if (estimator, dtype) == ("dense", "auto") else 4
    assert seen.state_bytes == model.conv1.weight.numel() * per_number


# ------------------------------------------------------------------------------------------------------ piece by piece
class UnknownParameter(nn.Parameter):
    """As libraries of quantized weights make them: what its numbers mean is theirs to know."""


class UnknownTensor(torch.Tensor):
    """A tensor of another library, which `nn.Parameter` leaves of its own class."""


def layer_with(weight: nn.Parameter) -> nn.Module:
    layer = nn.Linear(3, 4)
    layer._parameters["weight"] = weight
    return layer


def test_which_weights_are_matrices():
    assert weight_matrix(nn.Conv2d(3, 4, 2)) is not None and weight_matrix(nn.Bilinear(3, 4, 5)) is not None
    for module in (
        nn.LayerNorm(4),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 4, 2),
        nn.Conv2d(3, 4, 2, device="meta"),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)),
        layer_with(UnknownParameter(torch.randn(4, 3))),
        layer_with(nn.Parameter(torch.randn(4, 3).as_subclass(UnknownTensor))),
    ):
        assert weight_matrix(module) is None
    with (
        pytest.raises(ValueError, match=r"'norm' \(LayerNorm\)"),
        separate_parameters({"norm": WeightGradient(nn.LayerNorm(4))}),
    ):
        pass


def test_the_sink_puts_everything_back_and_frees_each_gradient():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    layers[1].weight.requires_grad_(True)
    layers[1].weight.grad = torch.full((4, 4), 7.0)
    grad = layers[1].weight.grad
    parameters = {str(i): layers[i].weight for i in (0, 1)}
    seen: list[tuple[str, bool, bool]] = []

    def receive(name, gradient):
        others = [p.grad is None for p in layers.parameters()]
        seen.append((name, all(others), gradient.requires_grad or torch.is_grad_enabled()))

    with pytest.raises(RuntimeError, match="stop"), WeightGradientHooks(parameters, receive):
        assert all(p.requires_grad and p.grad is None for p in parameters.values())
        assert not layers[2].weight.requires_grad
        for _ in range(2):
            layers(torch.randn(3, 4)).square().sum().backward()
        raise RuntimeError("stop")
    assert seen == [("1", True, False), ("0", True, False)] * 2
    assert [layers[i].weight.requires_grad for i in range(3)] == [False, True, False]
    assert layers[0].weight.grad is None and layers[1].weight.grad is grad and grad.eq(7).all()
    layers(torch.randn(3, 4)).square().sum().backward()
    assert len(seen) == 4 and layers[0].weight.grad is None


@pytest.mark.parametrize("where", ["device", "host"])
def test_at_most_one_whole_gradient_and_the_ring_are_alive(where):
    """Counted op by op on a stack of equal layers: what a backward pass with the sink holds at its peak."""
    layers, width = 6, 384
    model = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(layers)))
    one = model[0].weight.numel() * 4
    ring = StagingRing(torch.device("cpu"), one // 3, Queues()) if where == "host" else None
    whole = {str(i): WeightGradient(layer) for i, layer in enumerate(model)}
    specs = {name: LayerSpec(name, width, width * 9, RANK, 0, torch.device("cpu")) for name in whole}
    sums = {name: Dense(spec, torch.float32, ring) for name, spec in specs.items()}
    x = torch.randn(1, width, 3, 3)
    exact = torch.autograd.grad(model(x).square().sum(), [layer.weight for layer in model])

    with (
        isolated(model),
        separate_parameters(whole) as weights,
        WeightGradientHooks(weights, lambda name, gradient: sums[name].add(gradient)),
        Taps({}, lambda *_: None, whole) as taps,
        LiveBytes() as live,
    ):
        taps.backward(model(x).square().sum())
    # besides: activations, and what the reference widens at a time (2**18 numbers)
    assert one <= live.peak < 1.5 * one, f"{live.peak / one:.2f} gradients"
    assert live.now < 0.05 * one
    for name, g in zip(whole, exact, strict=True):
        total = sums[name]._g if ring is None else ring.load(sums[name]._host)
        torch.testing.assert_close(total, g.flatten(1), rtol=1e-5, atol=1e-5)
    if ring is not None:
        assert ring.device_bytes <= one // 3


def test_the_count_sees_gradients_that_are_kept():
    """The check of the check: without the sink all gradients are alive."""
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
    with LiveBytes() as live:
        model(torch.randn(1, 64, 3, 3)).square().sum().backward()
    assert live.peak >= 4 * model[0].weight.numel() * 4
