"""What the tap sees is the exact gradient, in every way a layer can be called; and it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from tiny import batches, build, exact_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from loraga.capture.isolation import isolated
from loraga.capture.taps import Taps


def seen_gradients(model, names, loss_of) -> dict[str, torch.Tensor]:
    """Sum of dyᵀ x by layer, as taps report them."""
    modules = dict(model.named_modules())
    sums: dict[str, torch.Tensor] = {}

    def sink(name, x, dy):
        sums[name] = sums.get(name, 0) + dy.double().T @ x.double()

    with isolated(model), Taps({name: modules[name] for name in names}, sink) as taps:
        taps.backward(loss_of(model))
    return sums


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between=torch.tanh, bias=True, conv=False, calls=1, kind=None):
        super().__init__()
        self.first = Conv1D(7, 5) if conv else nn.Linear(5, 7, bias=bias)
        self.second = nn.Linear(7, 7, bias=bias)
        self.between, self.calls, self.kind = between, calls, kind

    def plain(self):
        self.kind = None
        return self

    def block(self, x):
        x = self.between(self.first(x))
        for _ in range(self.calls):
            x = self.between(self.second(x))
        return x

    def forward(self, x):
        if self.kind is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")


def loss_of(model, x):
    return model(x).square().sum()


def truth(model, x, names=("first", "second")):
    model.requires_grad_(True)
    grads = torch.autograd.grad(loss_of(model, x), [model.get_submodule(n).weight for n in names])
    return {n: (g.T if isinstance(model.get_submodule(n), Conv1D) else g) for n, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"conv": True},
        {"between": lambda y: y.relu_()},  # B30: an in-place op right behind a target
        {"between": nn.ReLU(inplace=True), "conv": True},
        {"between": lambda y: y.mul_(2).tanh_()},
        {"calls": 3},  # B10: a module called several times per forward
        {"kind": "non-reentrant"},
        {"kind": "non-reentrant", "between": lambda y: y.relu_()},
        {"kind": "non-reentrant", "calls": 2},
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,  # the same in every process
)
def test_exact_gradient(options, shape):
    model, x = Net(**options), torch.randn(shape)
    if options.get("conv") and len(shape) == 1:
        x = x[None]  # Conv1D takes no vectors
    seen = seen_gradients(model, ["first", "second"], lambda m: loss_of(m, x))
    for name, g in truth(model, x).items():
        assert torch.allclose(seen[name].float(), g, rtol=1e-5, atol=1e-5 * float(g.abs().max()))


def test_reentrant_checkpointing_with_inputs_that_require_grad():
    model, x = Net(kind="reentrant"), torch.randn(4, 5, requires_grad=True)
    seen = seen_gradients(model, ["first", "second"], lambda m: loss_of(m, x))
    for name, g in truth(Net.plain(model), x).items():
        assert torch.allclose(seen[name].float(), g, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_gradient_checkpointing_of_transformers(name, reentrant):
    """Still effective (blocks run twice), also from eval mode and with frozen embeddings, and exact."""
    model, (batch,) = build(name), batches(name, 1)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".0." in n]
    expected = exact_gradients(model, layers, [batch])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.eval()
    runs = []
    handle = model.get_submodule(layers[0]).register_forward_pre_hook(lambda *_: runs.append(1))
    seen = seen_gradients(model, layers, lambda m: m(**batch).loss)
    handle.remove()
    assert len(runs) == 2
    for layer in layers:
        g = expected[layer]
        assert torch.allclose(seen[layer], g, rtol=1e-3, atol=1e-5 * float(g.abs().max()) + 1e-12)


def test_dropout_stays_off_where_checkpointing_needs_training_mode():
    """BART drops with the training flag of the very module that checkpoints; T5 and friends have LayerDrop."""
    import transformers as hf

    model = hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=50,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.5,
            encoder_layerdrop=0.5,
            decoder_layerdrop=0.5,
        )
    )
    model.gradient_checkpointing_enable()
    model.train()
    ids = torch.randint(3, 50, (2, 9))
    losses = []
    with isolated(model):
        for seed in range(4):
            torch.manual_seed(seed)
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach()))
    assert len(set(losses)) == 1
    assert model.model.encoder.layers[0].dropout == 0.5 and model.model.encoder.layerdrop == 0.5


def test_layers_that_share_an_input_share_its_storage():
    model, (batch,) = build("llama"), batches("llama", 1)
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    pointers = set()
    modules = dict(model.named_modules())
    with isolated(model), Taps({n: modules[n] for n in names}, lambda n, x, dy: pointers.add(x.data_ptr())) as taps:
        taps.backward(model(**batch).loss)
    assert len(pointers) == 1


def test_no_weight_gradient_is_computed():
    """The backward of a frozen linear layer runs one product, not two; nothing lands in `.grad`."""
    model, (batch,) = build("llama"), batches("llama", 1)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    seen = seen_gradients(model, names, lambda m: m(**batch).loss)
    assert len(seen) == len(names) and all(p.grad is None for p in model.parameters())
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "mm" in str(function):
                made.append(tuple(out.shape))
            return out

    modules = dict(model.named_modules())
    with isolated(model), Taps({n: modules[n] for n in names}, lambda *_: None) as taps:
        loss = model(**batch).loss
        with Watch():
            taps.backward(loss)
    assert made and not shapes & set(made)


def test_autocast_gives_both_in_the_dtype_the_layer_multiplied_in():
    model, x = Net(), torch.randn(4, 5)
    dtypes = set()

    def run(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().sum()

    with isolated(model), Taps({"first": model.first}, lambda n, x, dy: dtypes.update({x.dtype, dy.dtype})) as taps:
        taps.backward(run(model))
    assert dtypes == {torch.bfloat16}


def test_keyword_call_and_expanded_gradient():
    class Keyword(Net):
        def forward(self, x):
            return self.second(input=self.first(input=x))

    model, x = Keyword(), torch.randn(4, 5)
    seen = seen_gradients(model, ["first", "second"], lambda m: m(x).sum())  # dy is one number, expanded
    model.requires_grad_(True)
    grads = torch.autograd.grad(model(x).sum(), [model.first.weight, model.second.weight])
    assert torch.allclose(seen["first"].float(), grads[0], rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_no_map_of_tensors_is_named():
    lstm = nn.LSTM(3, 4)
    with pytest.raises(TypeError, match=r"'rnn' .LSTM."), isolated(lstm), Taps({"rnn": lstm}, lambda *_: None):
        lstm(torch.randn(2, 1, 3))


def test_nothing_is_left_behind():
    model, x = Net(), torch.randn(4, 5)
    model.first.weight.grad = torch.ones(7, 5)
    outside = torch.ones(7, requires_grad=True)
    model.second.requires_grad_(False)
    model.second.eval()
    before = {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    seen_gradients(model, ["first"], lambda m: (m(x) * outside).sum())
    assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before
    assert torch.equal(model.first.weight.grad, torch.ones(7, 5)) and model.first.weight.requires_grad
    assert not model.second.weight.requires_grad
    assert outside.grad is None  # tensors of the caller's own collect nothing either
    with pytest.raises(ZeroDivisionError):
        seen_gradients(model, ["first"], lambda m: 1 / 0)
    assert {n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_enabled_inside(mode):
    model, x = Net(), torch.randn(4, 5)
    with mode():
        seen = seen_gradients(model, ["first"], lambda m: loss_of(m, x.clone()))
    assert torch.allclose(seen["first"].float(), truth(model, x)["first"], rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_and_dropout_stand_still():
    """B19."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.9), nn.Linear(7, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(8, 5)
    a = seen_gradients(model, ["0"], lambda m: m(x).square().sum())["0"]
    b = seen_gradients(model, ["0"], lambda m: m(x).square().sum())["0"]
    assert torch.equal(a, b) and model[1].training and model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Encoder(nn.Module):
    """torch's own transformer layers, which in eval mode and with nothing to train would take a path of their own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return self.encoder(x, src_key_padding_mask=padding)[:, :3, :5]


def test_torch_transformer_layers_keep_to_their_ordinary_path():
    model, x = Encoder(), torch.randn(2, 5, 8)
    names = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    before = torch.backends.mha.get_fastpath_enabled()
    seen = seen_gradients(model.train(), names, lambda m: loss_of(m, x))
    assert torch.backends.mha.get_fastpath_enabled() is before
    for name, g in truth(model.eval(), x, names).items():
        assert torch.allclose(seen[name].float(), g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))


def test_float64_models_are_seen_in_float32():
    model, x = Net().double(), torch.randn(4, 5, dtype=torch.float64)
    dtypes = set()
    with isolated(model), Taps({"first": model.first}, lambda n, x, dy: dtypes.update({x.dtype, dy.dtype})) as taps:
        taps.backward(loss_of(model, x))
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_reentrant_checkpointing_inside_a_module_of_ones_own(name):
    """The embeddings at which gradients start are those of a part."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(name)

        def forward(self, **batch):
            return self.inner(**batch)

    model, (batch,) = Wrapped(), batches(name, 1)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".0." in n]
    expected = exact_gradients(model, layers, [batch])
    model.inner.gradient_checkpointing_enable({"use_reentrant": True})
    for module in model.modules():
        module._forward_hooks.clear()  # transformers 5 makes embeddings require gradients by itself, 4 does not
    seen = seen_gradients(model, layers, lambda m: m(**batch).loss)
    for layer, g in expected.items():
        assert torch.allclose(seen[layer], g, rtol=1e-3, atol=1e-5 * float(g.abs().max()) + 1e-12)
    assert not any(m._forward_hooks for m in model.modules())
