"""What both parts of the paper harness share: options, the start of a method, the Trainer, the result file."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _machine
import _methods
from _methods import Adapter

METHODS = ("full", "lora", "pissa", "rslora", "dora", "lora-ga-mirror")
RSLORA = ("rslora", "peft-lora-ga", "lora-one")  # published with s = alpha / sqrt(r)
RESULTS = Path(__file__).parents[1] / "results"
Features = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Settings:
    """The published settings of one part; a stand-in keeps them and only has less of everything.

    Args:
        rate (`float`), batch (`int`), length (`int`): learning rate, rows per step, tokens per row at most.
        warmup (`float`): share of the steps; a cosine to zero follows. AdamW without weight decay, one epoch.
        rank (`int`), alpha (`int`): the paper's; see `adapter`.
        init_batches (`int`), init_batch (`int`): what the methods that look at data may see: batches, rows in each.
        micro_batch (`int`): rows at a time on the device; `batch` is reached by accumulation.
    """

    rate: float
    batch: int
    length: int
    micro_batch: int
    rank: int = 8
    alpha: int = 16
    warmup: float = 0.03
    init_batches: int = 8
    init_batch: int = 1

    def adapter(self, method: str, targets: tuple[str, ...], **more: Any) -> Adapter:
        """A method's adapter of the published rank and alpha.

        The paper's LoRA-GA is loraga's mirror of twice that rank: with rsLoRA and the same alpha its first step of Adam
        is the same, and no base weight changes.
        """
        ours = method in ("lora-ga-mirror", "lora-ga-zero-b")
        rank = 2 * self.rank if ours else self.rank
        return Adapter(rank, self.alpha, targets, use_rslora=ours or method in RSLORA, **more)


def parser(
    description: str | None, defaults: Settings, methods: Sequence[str], seeds: Sequence[int]
) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--stand-in", action="store_true", help="a tiny random model and made-up rows, no network")
    found.add_argument("--methods", nargs="+", choices=_methods.TITLES, default=list(methods))
    found.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    found.add_argument("--micro-batch", type=int, default=defaults.micro_batch, help="rows at a time on the device")
    found.add_argument("--output", type=Path, help="result file (default: in benchmarks/results; a stand-in: none)")
    return found


def parse(
    found: argparse.ArgumentParser, arguments: Sequence[str] | None, defaults: Settings
) -> tuple[argparse.Namespace, Settings]:
    """The options, checked, and the settings with the device's own micro-batch."""
    args = found.parse_args(arguments)
    if args.micro_batch < 1 or defaults.batch % args.micro_batch:
        found.error(f"--micro-batch {args.micro_batch} does not divide the batch of {defaults.batch} rows")
    return args, replace(defaults, micro_batch=args.micro_batch)


def datasets_module(what: str) -> ModuleType:
    """The optional package `datasets`.

    Raises:
        SystemExit: it is not installed; the message says how to go on.
    """
    try:
        import datasets
    except ImportError as error:
        raise SystemExit(
            f"{what} is read with the package `datasets`, which is not installed: `pip install datasets`, or see that "
            "everything runs without it with --stand-in."
        ) from error
    return datasets


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fine_tune(
    method: str,
    model: nn.Module,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    settings: Settings,
    *,
    seed: int,
    large: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """One method, one epoch over `features` with the Trainer; the trained model and what the method used.

    `large` means bfloat16 activations and gradient checkpointing; adapters keep their weights in float32.
    """
    set_seed(seed)
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).tolist()
    seen = [features[i] for i in order[: settings.init_batches * settings.init_batch]]
    model = model.to(device())
    batches = [
        {key: value.to(device()) for key, value in collate(seen[i : i + settings.init_batch]).items()}
        for i in range(0, len(seen), settings.init_batch)
    ]
    started = _methods.start(method, model, batches, adapter, seed=seed)
    used = _methods.describe(method, adapter, started)
    if large:  # otherwise nothing before the first adapter would require a gradient, and checkpointing would drop it
        started.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            learning_rate=settings.rate,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.batch // settings.micro_batch,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(settings.warmup * math.ceil(len(features) / settings.batch)),
            weight_decay=0.0,
            bf16=large,
            gradient_checkpointing=large,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to=[],
            label_names=["labels"],
            use_cpu=device().type == "cpu",
            disable_tqdm=not sys.stderr.isatty(),
            logging_steps=10,
        )
        trainer = Trainer(model=started, args=options, train_dataset=features, data_collator=collate)
        loss = trainer.train().training_loss
    return started, {**used, "training_loss": loss, "steps": trainer.state.global_step}


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    batch: int,
) -> list[str]:
    """Greedy answers to prompts given as tokens, without the prompt."""
    model.eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # a causal model goes on from the last token
    answers: list[str] = []
    try:
        for i in range(0, len(prompts), batch):
            inputs = tokenizer.pad({"input_ids": list(prompts[i : i + batch])}, return_tensors="pt").to(device())
            tokens = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            if not model.config.is_encoder_decoder:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
    return answers


def write(
    args: argparse.Namespace, part: str, settings: Settings, run: Callable[[Callable[[dict], None]], None]
) -> list[dict]:
    """Run one part and write its result file anew after every row, so that an interrupted run keeps what it has.

    Args:
        run (callable): run(add) calls add(row) for every finished training.
    """
    rows: list[dict] = []
    head = {**_machine.describe(), "part": part, "stand_in": args.stand_in, "settings": asdict(settings)}
    output = args.output or (None if args.stand_in else RESULTS / f"paper-{part}.json")

    def add(row: dict) -> None:
        rows.append(row)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
        print(", ".join(f"{key} {row[key]}" for key in ("task", "method", "seed", "accuracy")), file=sys.stderr)

    run(add)
    return rows
