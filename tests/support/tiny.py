"""Small models of real architectures with random weights, and batches for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import transformers as hf
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import loraga

R = 4
STARTS = ("mirror", "zero-b")
WIDTH, INNER, VOCABULARY, CLASSES = 320, 448, 97, 16


def _llama(family: str = "Llama", **kwargs) -> nn.Module:
    """Of Llama's shape: grouped queries, a gated MLP."""
    config = getattr(hf, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
        **kwargs,
    )
    return getattr(hf, f"{family}ForCausalLM")(config)


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=8, bos_token_id=0, eos_token_id=0, use_cache=False
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=40,
            d_ff=INNER,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=8,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def _bert(labels: int = CLASSES) -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_labels=labels,
        )
    )


def _vit(labels: int = CLASSES) -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_labels=labels,
        )
    )


def _text(kind: str) -> Callable[[int, torch.Generator, int], dict[str, Tensor]]:
    def batch(rows: int, generator: torch.Generator, classes: int) -> dict[str, Tensor]:
        ids = torch.randint(2, VOCABULARY, (rows, 48), generator=generator)
        labels = torch.randint(0, classes, (rows,), generator=generator) if kind == "class" else ids
        return {"input_ids": ids, "labels": labels}

    return batch


def _image(rows: int, generator: torch.Generator, classes: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, classes, (rows,), generator=generator),
    }


_MODELS = {
    "llama": (_llama, _text("causal")),
    "qwen2": (lambda: _llama("Qwen2"), _text("causal")),
    "gpt2": (_gpt2, _text("causal")),
    "t5": (_t5, _text("causal")),
    "bert": (_bert, _text("class")),
    "vit": (_vit, _image),
}
ARCHITECTURES = tuple(_MODELS)


def build(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """The model in eval mode, the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _MODELS[name][0](**kwargs).eval()


def batches(name: str, count: int = 4, rows: int = 6, seed: int = 1, classes: int = CLASSES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [_MODELS[name][1](rows, generator, classes) for _ in range(count)]


class MLP(nn.Module):
    """A plain module, known to no library; rectangular layers; loss over (inputs, labels)."""

    def __init__(self, sizes: tuple[int, ...] = (40, 96, 56, 12), seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers[:-1]:
            inputs = torch.tanh(layer(inputs))
        logits = self.layers[-1](inputs)
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(logits, labels)
        return out


class FewAndNone(MLP):
    """Of the last target the gradient has 5 directions, and of `unused` none."""

    def __init__(self) -> None:
        super().__init__((40, 96, 56, 5))
        self.unused = nn.Linear(40, 30)


def mlp_batches(count: int = 4, rows: int = 64, width: int = 40, classes: int = 12, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "inputs": torch.randn(rows, width, generator=generator),
            "labels": torch.randint(0, classes, (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def exact_gradients(model: nn.Module, names: list[str], loader, loss_of=None) -> dict[str, Tensor]:
    """Mean over batches of dLoss/dW (m, n) in float64, by autograd on the weights themselves."""
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight for name in names}
    sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    count = 0
    for batch in loader:
        output = model(**batch) if loss_of is None else None
        loss = loss_of(model, batch) if loss_of is not None else output["loss"]
        for name, grad in zip(names, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True):
            if grad is not None:
                sums[name] += grad.double()
        count += 1
    return {
        name: (total.T if isinstance(modules[name], hf.pytorch_utils.Conv1D) else total) / count
        for name, total in sums.items()
    }


def objective_excess(gradient: Tensor, factors, rank: int) -> float:
    """LoRA-GA objective |G - (B Bᵀ G + G Aᵀ A)| with A = Vh[:r], B = U[:, r:2r], over the best possible, less one."""
    a, b = factors.Vh[:rank].double(), factors.U[:, rank : 2 * rank].double()
    best = torch.linalg.svdvals(gradient)[2 * rank :].norm()
    return float((gradient - b @ (b.T @ gradient) - (gradient @ a.T) @ a).norm() / best - 1)


def captured(gradient: Tensor, factors) -> float:
    """Energy of G on the left and right subspaces of the factors, over that of the best of their rank."""
    best = torch.linalg.svdvals(gradient)[: factors.rank].square().sum()
    return float((factors.U.double().T @ gradient @ factors.Vh.double().T).square().sum() / best)


def config(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": R, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear", **kwargs})


def init(model, loader, lora=None, **kwargs) -> PeftModel:
    return loraga.fast_init(model, loader, lora or config(), show_progress_bar=False, **kwargs)


def matrices(peft_model, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n) and B (m, r) of a linear layer."""
    layer = peft_model.base_model.model.get_submodule(name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def pairs(peft_model, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (p, n) and B0 (m, p) of a layer with an even rank, its r/2 pairs checked to be mirrored."""
    A, B = matrices(peft_model, name)
    (A0, A1), (B0, B1) = A.chunk(2), B.chunk(2, dim=1)
    assert torch.equal(A0, A1) and torch.equal(B0, -B1)
    return A0, B0


def described(model: nn.Module) -> dict:
    """A model, numbers aside: classes, modes, flags and hooks."""
    return {
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "kinds": {n: type(m) for n, m in model.named_modules()},
        "hooks": {
            (n, kind): [type(hook) for hook in hooks.values()]
            for n, m in model.named_modules()
            for kind, hooks in vars(m).items()
            if kind.endswith("hooks")
        },
    }


def everything_about(model: nn.Module) -> dict:
    """Weights, gradients, modes, flags and hooks, to be compared."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        **described(model),
        "rng": torch.get_rng_state(),
    }


def assert_same(a: dict, b: dict) -> None:
    for key in ("state", "grad"):
        assert a[key].keys() == b[key].keys()
        for name, value in a[key].items():
            other = b[key][name]
            assert (value is None and other is None) or torch.equal(value, other), name
    for key in ("flags", "modes", "kinds", "hooks"):
        assert a[key] == b[key], key
    assert torch.equal(a["rng"], b["rng"])


def assert_plain(started: PeftModel, plain: PeftModel) -> None:
    """A started adapter is what PEFT made of the same model and config: numbers of A and B are all that differs."""
    assert described(started) == described(plain)
    for n, m in plain.named_modules():
        own = set(vars(started.get_submodule(n)))
        assert own - vars(m).keys() <= {"loraga_report"} and own >= vars(m).keys(), n
    ours, theirs = started.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        assert "lora_" in name or torch.equal(ours[name], value), name
    assert {n: c.to_dict() for n, c in started.peft_config.items()} == {
        n: c.to_dict() for n, c in plain.peft_config.items()
    }
