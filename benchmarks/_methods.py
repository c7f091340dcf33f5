"""Every compared way to fine-tune: how its model starts, and which scaling it trains with.

Ours are LoRA-GA with both of its starts and LoRA-One; PEFT's are LoRA, rsLoRA, DoRA, PiSSA, EVA and its own LoRA-GA.
All see the same batches. Rank and scaling are the comparison's own choice.
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
    "lora-ga-mirror": "LoRA-GA, mirror",
    "lora-ga-zero-b": "LoRA-GA, zero-b",
    "peft-lora-ga": "LoRA-GA (PEFT)",
    "lora-one": "LoRA-One",
}
OURS = {
    "lora-ga-mirror": loraga.InitConfig(),
    "lora-ga-zero-b": loraga.InitConfig(start="zero-b"),
    "lora-one": loraga.InitConfig(method="lora-one"),
}
PEFT_INITS: dict[str, bool | str] = {"pissa": "pissa", "eva": "eva", "peft-lora-ga": "lora_ga"}


@dataclass(frozen=True)
class Adapter:
    """The adapter that a method starts.

    Args:
        rank (`int`), alpha (`int`): r, which is what the adapter stores, and alpha.
        targets (`tuple[str, ...]`): suffixes of the layers' names.
        trained_in_full (`tuple[str, ...]`): modules outside the adapters that are trained too, such as a new head.
        token_labels (`bool`): labels have the shape of the tokens, so EVA may mask with them.
        use_rslora (`bool`): s, the factor on B A, is alpha / sqrt(r) instead of alpha / r.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    trained_in_full: tuple[str, ...] = ()
    token_labels: bool = True
    task_type: str | None = None
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """s, the factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def config(self, method: str) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            modules_to_save=list(self.trained_in_full) or None,
            task_type=self.task_type,
            use_rslora=self.use_rslora,
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
        adapter (`Adapter`): rank, alpha, targets; full fine-tuning has none and ignores it.
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
        if method in OURS:
            return loraga.fast_init(model, batches, config, init=OURS[method], seed=seed, show_progress_bar=False)
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
            "scaling_rule": "alpha / sqrt(r)" if adapter.use_rslora else "alpha / r",
            "scaling": adapter.scaling,
            "scaling_of_layers": [min(scalings), max(scalings)],
            "layers": len(scalings),
        }
    report = getattr(started, "loraga_report", None)
    if report is not None:
        used["init"] = report.config
    return used
