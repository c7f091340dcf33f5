"""Small models with adapters that were started from known gradients, and how tests look at them."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraga.config import InitConfig
from loraga.factors import Factors
from loraga.integrations import peft as integration
from loraga.start.starts import triplets

STARTS = ("mirror", "zero-b")
MODELS = ("llama", "gpt2", "mlp")
RANK = 4
DRIFT = 2e-5


class MLP(nn.Module):
    """A plain module: rectangular layers, and an output layer of five that it does not tell anyone about."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        **options,
    )
    return LlamaForCausalLM(config)


def base_model(kind: str = "llama") -> nn.Module:
    """The same weights for the same kind, in eval mode."""
    torch.manual_seed(0)
    if kind == "llama":
        return llama().eval()
    if kind == "sequential":  # one that a process without this file can unpickle
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 20, bias=False)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.15)
        return GPT2LMHeadModel(config).eval()
    return MLP().eval()


def inputs(kind: str = "llama") -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind in ("mlp", "sequential"):
        return torch.randn(7, 24, generator=generator)
    return torch.randint(0, 64, (3, 11), generator=generator)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


def config(**options) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", **options})


def starts_for(
    peft_model: PeftModel, start: str = "mirror", adapter_name: str = "default", seed: int = 5, **options
) -> dict:
    """Starts from random gradients. Their size is such that s B0 A0 of one half would change the function a lot."""
    init = InitConfig(**{"start": start, "stable_gamma": 1.0, **options})
    generator = torch.Generator().manual_seed(seed)
    starts = {}
    for slot in integration.find_slots(peft_model, adapter_name)[0]:
        gradient = torch.randn(*slot.shape, generator=generator, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        factors = Factors(U, S, Vh).to(torch.float32).truncated(triplets(init, slot.rank, slot.shape))
        starts[slot.name] = integration.start_of(slot, factors, init, seed)
    return starts


def write(peft_model: PeftModel, start: str = "mirror", adapter_name: str = "default", seed: int = 5) -> None:
    adapter = integration.Adapter.of(peft_model, adapter_name)
    integration.write_start(adapter, starts_for(peft_model, start, adapter_name, seed))


def started(base: nn.Module, start: str = "mirror", adapter_name: str = "default", **options) -> PeftModel:
    """`base` with an adapter that has a start; "plain" leaves PEFT's own."""
    peft_model = integration.inject(base, config(**options), adapter_name)
    if start != "plain":
        write(peft_model, start, adapter_name)
    return peft_model.eval()


def disturb(peft_model: nn.Module, seed: int = 1) -> None:
    """As if trained for a while."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def trained(base: nn.Module, start: str, **options) -> PeftModel:
    peft_model = started(base, start, **options)
    disturb(peft_model)
    return peft_model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = DRIFT) -> None:
    error = relative(a, b)
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def fingerprint(model: nn.Module) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"state": state, "flags": flags, "modules": [id(m) for m in model.modules()]}


def unchanged(model: nn.Module, before: dict) -> None:
    after = fingerprint(model)
    assert after["flags"] == before["flags"] and after["modules"] == before["modules"]
    same_tensors(after["state"], before["state"])


def same_tensors(after: dict, before: dict) -> None:
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def weights_of_base(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that is not the adapter's, under the names the base model has for it."""
    state = model.state_dict()
    kept = {name: value for name, value in state.items() if "lora_" not in name}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone() for name, value in kept.items()
    }


def structure_of(model: PeftModel) -> dict:
    """All of a model but the numbers in it: what others may rely on in a LoRA made by PEFT."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "parameters": {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: b.shape for name, b in model.named_buffers()},
        "state": list(model.state_dict()),
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if "hooks" in key and isinstance(hooks, dict)]
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "configs": {name: (type(c), c.to_dict()) for name, c in model.peft_config.items()},
    }
