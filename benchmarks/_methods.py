"""Every compared way to fine-tune: how its model starts, and which scaling it trains with.

Ours are LoRA-GA with three offsets and LoRA-One; PEFT's are LoRA, rsLoRA, DoRA, PiSSA, EVA and its own LoRA-GA. All see
the same batches and the same rank and alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import loraga

Batches = Sequence[dict[str, Tensor]]

TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA (PEFT)",
    "eva": "EVA (PEFT)",
    "lora-ga-anchor": "LoRA-GA, anchor",
    "lora-ga-subtract": "LoRA-GA, subtract",
    "lora-ga-zero-b": "LoRA-GA, zero-b",
    "peft-lora-ga": "LoRA-GA (PEFT)",
    "lora-one": "LoRA-One",
}
# LoRA-GA and LoRA-One are published with the scaling of rsLoRA, alpha / sqrt(r); the others with alpha / r.
RSLORA = ("rslora", "lora-ga-anchor", "lora-ga-subtract", "lora-ga-zero-b", "peft-lora-ga", "lora-one")
OFFSETS = {"lora-ga-anchor": "anchor", "lora-ga-subtract": "subtract", "lora-ga-zero-b": "zero-b"}
PEFT_INITS: dict[str, bool | str] = {"pissa": "pissa", "eva": "eva", "peft-lora-ga": "lora_ga"}


@dataclass(frozen=True)
class Adapter:
    """What the adapters of one comparison have in common.

    Args:
        rank (`int`), alpha (`int`): r and alpha of all of them.
        targets (`tuple[str, ...]`): suffixes of the layers' names.
        trained_in_full (`tuple[str, ...]`): modules outside the adapters that are trained too, such as a new head.
        token_labels (`bool`): labels have the shape of the tokens, so EVA may mask with them.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    trained_in_full: tuple[str, ...] = ()
    token_labels: bool = True
    task_type: str | None = None

    def scaling(self, method: str) -> float | None:
        """s, the factor on B A; `None` for full fine-tuning."""
        if method == "full":
            return None
        return self.alpha / (math.sqrt(self.rank) if method in RSLORA else self.rank)

    def config(self, method: str) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            modules_to_save=list(self.trained_in_full) or None,
            task_type=self.task_type,
            use_rslora=method in RSLORA,
            use_dora=method == "dora",
            init_lora_weights=PEFT_INITS.get(method, True),
            lora_ga_config=LoraGAConfig() if method == "peft-lora-ga" else None,
            eva_config=EvaConfig(use_label_mask=self.token_labels) if method == "eva" else None,
        )


def start(method: str, model: nn.Module, batches: Batches, adapter: Adapter, *, seed: int) -> nn.Module:
    """The model of one method before its first step; `model` is used up.

    Args:
        method (`str`): a key of `TITLES`.
        model (`nn.Module`): all of it trainable, on its device.
        batches (`Sequence[dict[str, Tensor]]`): what the methods that look at data may see, on the same device.
        adapter (`Adapter`): rank, alpha, targets.
        seed (`int`): of everything random; the global generators are left alone.

    Raises:
        ValueError: the method is not known.
    """
    if method not in TITLES:
        raise ValueError(f"method {method!r} is not known; known are {', '.join(TITLES)}.")
    if method == "full":
        return model
    config = adapter.config(method)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method in OFFSETS or method == "lora-one":
            name = "lora-one" if method == "lora-one" else "lora-ga"
            init = loraga.InitConfig(method=name, offset=OFFSETS.get(method))
            return loraga.fast_init(model, batches, config, init=init, seed=seed, show_progress_bar=False)
        if method == "peft-lora-ga":
            preprocess_loraga(model, config, lambda: _accumulate(model, batches))
        started = get_peft_model(model, config)
        if method == "eva":
            initialize_lora_eva_weights(started, batches, show_progress_bar=False)
        return started


def _accumulate(model: nn.Module, batches: Batches) -> None:
    for batch in batches:
        model(**batch).loss.backward()


def describe(method: str, adapter: Adapter, started: nn.Module) -> dict[str, object]:
    """What a method used, read off its started model where that can say it; for the result file."""
    used: dict[str, object] = {
        "title": TITLES[method],
        "trainable_parameters": sum(p.numel() for p in started.parameters() if p.requires_grad),
    }
    if method != "full":
        scalings = [m.scaling["default"] for m in started.modules() if hasattr(m, "lora_A") and m.scaling]
        used |= {
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "scaling_rule": "alpha / sqrt(r)" if method in RSLORA else "alpha / r",
            "scaling": adapter.scaling(method),
            "scaling_of_layers": [min(scalings), max(scalings)],
            "layers": len(scalings),
        }
    report = getattr(started, "loraga_report", None)
    if report is not None:
        used["init"] = report.config
    return used
