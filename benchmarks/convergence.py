"""Who converges, and at which learning rate: every method over a sweep and three seeds, on real data.

    python benchmarks/convergence.py --output benchmarks/results/convergence-cpu.json
    python benchmarks/convergence.py --table benchmarks/results/convergence-cpu.json
    python benchmarks/convergence.py --plot benchmarks/results/convergence-cpu.json

Two tasks, nothing downloaded: MiniLM (pretrained weights from a package) learns which module a docstring comes from;
a byte-level Llama, pretrained here on the prose that ships with Python, is fine-tuned to its source code. Every method
gets the same model, batches in the same order, optimiser, schedule and number of steps, per seed; every adapter has the
same rank and scaling. A sweep goes on
beyond its first rates until the best one lies inside, and says so where it does not.
`--size gpu` is the same with larger models, for one GPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _bytes
import _convergence_report as report
import _machine
import _methods
import docstrings
import minilm
from _methods import Adapter
from training import EVALUATION_BATCH, evaluation_batches, training_batches
from transformers import get_cosine_schedule_with_warmup

Batch = dict[str, Tensor]
COMPARED = tuple(method for method in _methods.TITLES if method != "dora")
DOCSTRINGS, SOURCE = "docstrings", "source code"
RANK, ALPHA = 16, 64  # of every adapter: s = 4
RSLORA_ALPHA = 16  # what rsLoRA is usually trained with; its s = alpha / sqrt(r) is 4, too
WARMUP = 0.03  # share of the steps, as in the LoRA-GA paper's settings; then a cosine to zero
DIGITS = 6  # of a loss in the result file; the numbers are computed from what stands there


@dataclass(frozen=True)
class Plan:
    """How much is done for one task. Learning rates are named by their place `i` on the grid of `rate`."""

    steps: int
    batch: int
    evaluate_at: tuple[int, ...]  # steps, from 0
    held_out: int  # texts, or windows of source code
    init_batches: int  # of the training batches, for the methods that look at data
    full_rates: tuple[int, ...]
    adapter_rates: tuple[int, ...]
    layers: int
    words: int = 0  # docstrings: of a text
    width: int = 0  # source code: of the Llama
    length: int = 0  # source code: bytes of a window
    pretraining_steps: int = 0
    pretraining_batch: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    extensions: int = 3  # how many rates a sweep may go beyond its grid


PLANS = {
    "cpu": {
        DOCSTRINGS: Plan(
            steps=24,
            batch=16,
            evaluate_at=(0, 4, 8, 12, 18, 24),
            held_out=96,
            init_batches=4,
            full_rates=(-7, -6, -5),
            adapter_rates=(-6, -5, -4),
            layers=2,
            words=10,
        ),
        SOURCE: Plan(
            steps=80,
            batch=8,
            evaluate_at=(0, 5, 10, 20, 30, 40, 60, 80),
            held_out=64,
            init_batches=8,
            full_rates=(-7, -6, -5),
            adapter_rates=(-7, -6, -5),
            layers=2,
            width=128,
            length=64,
            pretraining_steps=1000,
            pretraining_batch=16,
        ),
    },
    "gpu": {
        DOCSTRINGS: Plan(
            steps=80,
            batch=32,
            evaluate_at=(0, 5, 10, 20, 30, 40, 60, 80),
            held_out=256,
            init_batches=8,
            full_rates=(-10, -9, -8, -7, -6),
            adapter_rates=(-9, -8, -7, -6, -5),
            layers=6,
            words=24,
        ),
        SOURCE: Plan(
            steps=150,
            batch=16,
            evaluate_at=(0, 5, 10, 20, 40, 70, 100, 150),
            held_out=64,
            init_batches=8,
            full_rates=(-10, -9, -8, -7, -6),
            adapter_rates=(-9, -8, -7, -6, -5),
            layers=6,
            width=512,
            length=256,
            pretraining_steps=2000,
            pretraining_batch=64,
        ),
    },
}


def rate(i: int) -> float:
    """The grid of all sweeps: 1 and 3 times the powers of ten, with 1 at `i = 0`."""
    return float(f"{(1, 3)[i % 2]}e{i // 2}")


@dataclass(frozen=True)
class Task:
    """One problem: the model of a seed, the training batches of a seed, and what is held out."""

    model: Callable[[int], nn.Module]
    batches: Callable[[int], list[Batch]]
    held_out: list[Batch]
    adapter: Adapter
    note: str


def docstring_task(plan: Plan) -> Task:
    minilm.quiet()
    tokenizer, data = minilm.load_tokenizer(), docstrings.load()
    train, test = (
        [(" ".join(text.split()[: plan.words]), label) for text, label in rows] for rows in (data.train, data.test)
    )

    def model(seed: int) -> nn.Module:
        whole = minilm.load_model(len(docstrings.MODULES), seed)
        whole.bert.encoder.layer = whole.bert.encoder.layer[: plan.layers]
        whole.config.num_hidden_layers = plan.layers
        return whole

    return Task(
        model=model,
        batches=lambda seed: training_batches(train, tokenizer, plan.batch, plan.steps, seed),
        held_out=evaluation_batches(test[: plan.held_out], tokenizer),
        adapter=Adapter(RANK, ALPHA, ("query", "key", "value", "dense"), ("classifier",), token_labels=False),
        note=f"the first {plan.layers} of MiniLM's 6 pretrained layers and a fresh head, {len(docstrings.MODULES)} "
        f"classes, {len(train)} texts of at most {plan.words} words, {plan.held_out} held out",
    )


def _llama(plan: Plan) -> nn.Module:
    heads = max(plan.width // 64, 4)
    return _bytes.build(plan.width, 2 * plan.width, plan.layers, heads, heads // 2, seed=0)


def pretrain(plan: Plan, weights: Path, device: str) -> float:
    """Train the byte Llama on prose, write its weights, return its last loss."""
    _quiet_worker(device)
    text, model = _bytes.prose(), _llama(plan).to(device)

    def batch(step: int) -> Batch:
        return to_device(_bytes.draw(text, plan.pretraining_batch, plan.length, 10**6 + step), device)

    loss = _bytes.pretrain(model, batch, plan.pretraining_steps)
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, weights)
    return loss


def source_task(plan: Plan, weights: Path) -> Task:
    train, test = _bytes.source_code()
    held_out = _bytes.draw(test, plan.held_out, plan.length, 10**7)

    def model(seed: int) -> nn.Module:
        pretrained = _llama(plan)
        pretrained.load_state_dict(torch.load(weights, weights_only=True))
        return pretrained

    def batches(seed: int) -> list[Batch]:
        return [_bytes.draw(train, plan.batch, plan.length, 10**5 * seed + step) for step in range(plan.steps)]

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Task(
        model=model,
        batches=batches,
        held_out=[
            {key: rows[i : i + EVALUATION_BATCH] for key, rows in held_out.items()}
            for i in range(0, plan.held_out, EVALUATION_BATCH)
        ],
        adapter=Adapter(RANK, ALPHA, targets),
        note=f"byte-level Llama, {plan.layers} layers of width {plan.width}, pretrained {plan.pretraining_steps} steps "
        f"on prose; source code in windows of {plan.length} bytes, {plan.held_out} held out from other files",
    )


@functools.lru_cache(maxsize=1)
def task_of(name: str, plan: Plan, weights: Path) -> Task:
    """`weights` is the file that `pretrain` wrote; the docstrings do not need it."""
    return docstring_task(plan) if name == DOCSTRINGS else source_task(plan, weights)


def adapter_of(task: Task, method: str) -> Adapter:
    """The task's adapter; for rsLoRA the same scaling in its own way."""
    return replace(task.adapter, alpha=RSLORA_ALPHA, use_rslora=True) if method == "rslora" else task.adapter


def to_device(batch: Batch, device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """Mean loss over the held-out rows; `None` if it is not finite."""
    model.eval()
    rows = [len(batch["labels"]) for batch in batches]
    loss = sum(model(**batch).loss.item() * n for batch, n in zip(batches, rows, strict=True)) / sum(rows)
    return round(loss, DIGITS) if math.isfinite(loss) else None


def train(
    model: nn.Module, batches: Sequence[Batch], held_out: Sequence[Batch], lr: float, evaluate_at: Sequence[int]
) -> list[float | None]:
    """AdamW on whatever requires a gradient, one step per batch; the held-out loss after each of `evaluate_at` steps.

    No weight decay, no clipping; linear warm-up and a cosine to zero. From the first loss that is not finite, `None`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * len(batches)), len(batches))
    losses: list[float | None] = []
    for step, batch in enumerate(batches, start=1):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in evaluate_at:
            losses.append(held_out_loss(model, held_out))
            if losses[-1] is None:
                break
    return losses + [None] * (len(evaluate_at) - len(losses))


def sweep(
    name: str, plan: Plan, weights: Path, method: str, places: tuple[int, ...], must: tuple[int, ...], device: str
) -> dict:
    """One method on one task: all seeds over `places` and `must`, then further until the best rate lies inside.

    Each seed's start is made once and copied for every rate.

    Returns:
        `dict`: what the method used, and per learning rate one curve of held-out losses per seed.
    """
    _quiet_worker(device)
    task = task_of(name, plan, weights)
    held_out = [to_device(batch, device) for batch in task.held_out]
    batches = {seed: [to_device(batch, device) for batch in task.batches(seed)] for seed in plan.seeds}
    adapter = adapter_of(task, method)
    starts = {
        seed: _methods.start(
            method, task.model(seed).to(device), batches[seed][: plan.init_batches], adapter, seed=seed
        )
        for seed in plan.seeds
    }
    used = _methods.describe(method, adapter, starts[plan.seeds[0]])
    later = plan.evaluate_at[1:]
    before = {seed: held_out_loss(starts[seed], held_out) for seed in plan.seeds}  # the same for all rates
    curves: dict[int, list[list[float | None]]] = {}

    def run(i: int) -> None:
        curves[i] = [
            [before[seed], *train(copy.deepcopy(starts[seed]), batches[seed], held_out, rate(i), later)]
            for seed in plan.seeds
        ]
        print(f"{name}, {method}, {rate(i):.0e}: {report.mean_final(curves[i]):.4f}", file=sys.stderr, flush=True)

    for i in sorted({*places, *must}):
        run(i)
    for _ in range(plan.extensions):
        # what the comparison at full fine-tuning's rate added lies in the grid too: gaps are filled on the way
        beyond = next((i for i in _neighbours(_best(curves)) if i not in curves), None)
        if beyond is None:
            break
        run(beyond)
    best = _best(curves)
    missing = [i for i in _neighbours(best) if i not in curves]
    return {
        "note": task.note,
        **used,
        "best_at_edge": bool(missing),
        "runs": [{"rate": rate(i), "loss": curves[i]} for i in sorted(curves)],
    }


def _best(curves: dict[int, list[list[float | None]]]) -> int:
    return min(curves, key=lambda i: report.mean_final(curves[i]))


def _neighbours(i: int) -> tuple[int, int]:
    return i - 1, i + 1


def _quiet_worker(device: str) -> None:
    minilm.quiet()
    if device == "cpu":
        torch.set_num_threads(1)


def compare(plans: dict[str, Plan], methods: Sequence[str], processes: int, device: str) -> dict:
    """All tasks and methods, `processes` sweeps at a time; full fine-tuning first, for the others meet at its rate."""
    tasks: dict[str, dict] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        weights = Path(folder) / "llama.pt"
        full, pretraining_loss = {}, None
        if DOCSTRINGS in plans:
            plan = plans[DOCSTRINGS]
            full[DOCSTRINGS] = pool.submit(sweep, DOCSTRINGS, plan, weights, "full", plan.full_rates, (), device)
        if SOURCE in plans:
            plan = plans[SOURCE]
            pretraining_loss = pool.submit(pretrain, plan, weights, device).result()
            full[SOURCE] = pool.submit(sweep, SOURCE, plan, weights, "full", plan.full_rates, (), device)
        waiting = {}
        for name, plan in plans.items():
            found = full[name].result()
            best = report.best_run(found)["rate"]
            must = tuple(i for i in range(-20, 5) if rate(i) == best)
            for method in methods:
                if method != "full":
                    waiting[name, method] = pool.submit(
                        sweep, name, plan, weights, method, plan.adapter_rates, must, device
                    )
        for name, plan in plans.items():
            results = {m: (full[name] if m == "full" else waiting[name, m]).result() for m in ("full", *methods)}
            notes = {entry.pop("note") for entry in results.values()}
            tasks[name] = {
                "note": notes.pop(),
                "plan": asdict(plan),
                "steps": list(plan.evaluate_at),
                "seeds": list(plan.seeds),
                "methods": results,
            }
            if name == SOURCE:
                tasks[name]["pretraining_loss"] = pretraining_loss
            tasks[name]["numbers"] = report.numbers(tasks[name])
    return tasks


def to_json(result: dict) -> str:
    """Indented, with every list of plain values on one line."""
    text = json.dumps(result, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PLANS, default="cpu")
    parser.add_argument("--processes", type=int, help="sweeps at a time (default: one per core; 4 on a GPU)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a result file and do nothing else")
    parser.add_argument("--plot", type=Path, help="draw the plots of a result file beside it and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(report.table(json.loads(args.table.read_text())))
        return
    if args.plot:
        print("\n".join(str(file) for file in report.plot(json.loads(args.plot.read_text()), args.plot)))
        return
    device = "cuda" if args.size == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--size gpu needs a GPU that torch can use")
    processes = args.processes or (4 if device == "cuda" else len(os.sched_getaffinity(0)))
    result = {
        **_machine.describe(),
        "threads": 1 if device == "cpu" else torch.get_num_threads(),
        "processes": processes,
        "size": args.size,
        "optimizer": f"AdamW, no weight decay, no clipping, {WARMUP:.0%} warm-up, cosine to zero",
        "tasks": compare(PLANS[args.size], COMPARED, processes, device),
    }
    for name, task in result["tasks"].items():
        for method, row in task["numbers"]["methods"].items():
            if row["best_at_edge"]:
                print(f"warning: {name}, {method}: the best learning rate is at the edge of its sweep", file=sys.stderr)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(to_json(result))
        print(report.table(result))
    else:
        print(to_json(result))


if __name__ == "__main__":
    main()
