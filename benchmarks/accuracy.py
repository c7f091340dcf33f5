"""How close the estimators come to the exact SVD of the exact gradient, and what the sketch's choices buy.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy-cpu.json

Real MiniLM weights on docstrings of the standard library (16-way classification; masked tokens) and a briefly trained
byte-level Llama: layers of the first, a middle and the last block; 1, 4 and 16 micro-batches; adapter rank 16, of 8
pairs; the 16 micro-batches also dealt out to 2 to 16 ranks, whose sketches are merged.
Per variant: excess of the LoRA-GA objective over the best possible, and energy lost, mean and worst layer, in percent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _bytes
import _machine

from loraga.capture.isolation import isolated
from loraga.capture.taps import Taps
from loraga.estimators import Dense, Estimate, LayerSpec, Streaming, finish, streaming
from loraga.factors import Factors

Pairs = list[tuple[Tensor, Tensor]]
BATCHES = (1, 4, 16)
RANK = 16  # of the adapter, and so many triplets: half of them for A, half for B


def minilm(task: str) -> tuple[nn.Module, Callable[[int], dict]]:
    import docstrings
    from minilm import load_model, load_tokenizer, weights_dir
    from transformers import BertForMaskedLM

    tokenizer, rows = load_tokenizer(), docstrings.load().train

    def encode(i: int) -> tuple[dict, list[int]]:
        some = [rows[j % len(rows)] for j in range(24 * i, 24 * i + 24)]
        texts = [text for text, _ in some]
        return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt")), [label for _, label in some]

    def classified(i: int) -> dict:
        batch, labels = encode(i)
        return {**batch, "labels": torch.tensor(labels)}

    def masked(i: int) -> dict:
        batch, _ = encode(i)
        ids = batch["input_ids"]
        hide = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(i)) < 0.15) & (
            batch["attention_mask"] > 0
        )
        labels = torch.where(hide, ids, -100)
        return {**batch, "labels": labels, "input_ids": torch.where(hide, tokenizer.mask_token_id, ids)}

    if task == "classification":
        return load_model(16, seed=0), classified
    return BertForMaskedLM.from_pretrained(weights_dir(), local_files_only=True), masked


def llama() -> tuple[nn.Module, Callable[[int], dict]]:
    model = _bytes.build(512, 1024, layers=3, heads=8, kv_heads=4, seed=0)
    text = _bytes.as_tensor(b"".join(file.read_bytes() for file in _bytes.stdlib_files()[:200]))

    def batch(i: int) -> dict:
        return _bytes.draw(text, 8, 128, i)

    _bytes.pretrain(model, lambda step: batch(10**6 + step), 30)
    return model, batch


def record(model: nn.Module, batch: Callable[[int], dict], blocks: tuple[int, ...]) -> dict[str, Pairs]:
    """(x, dy) of every linear layer in some blocks, for 16 micro-batches."""
    targets = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{i}." in name for i in blocks)
    }
    pairs: dict[str, Pairs] = {name: [] for name in targets}
    with isolated(model), Taps(targets, lambda name, x, dy: pairs[name].append((x.clone(), dy.clone()))) as taps:
        for i in range(max(BATCHES)):
            taps.backward(model(**batch(i)).loss)
    return pairs


# what gives the model, its micro-batches by number, and the blocks that are looked at; the longest first
MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], dict], tuple[int, ...]]]] = {
    "llama bytes": lambda: (*llama(), (0, 1, 2)),
    "minilm classification": lambda: (*minilm("classification"), (0, 2, 5)),
    "minilm masked tokens": lambda: (*minilm("masked tokens"), (0, 2, 5)),
}


def shortfall(g: Tensor, s: Tensor, factors: Factors) -> tuple[float, float]:
    """What triplets fall short of the best: excess of the LoRA-GA objective, share of the energy lost.

    g is the exact gradient in float64, s all its singular values. Half of the triplets are for A, half for B.
    """
    pairs = len(factors.S) // 2
    a, b = factors.Vh[:pairs].double(), factors.U[:, pairs:].double()
    residual = (g - b @ (b.T @ g) - (g @ a.T) @ a).norm()
    held = (factors.U.double().T @ g @ factors.Vh.double().T).square().sum()
    return float(residual / s[2 * pairs :].norm() - 1), 1 - float(held / s[: 2 * pairs].square().sum())


def fed(make: Callable[[LayerSpec, int], Any], spec: LayerSpec, stream: Pairs) -> Any:
    """An estimator that has taken in all of `stream`."""
    estimator = make(spec, len(stream))
    for x, dy in stream:
        estimator.update(x, dy)
    return estimator


def estimated(make: Callable[[LayerSpec, int], Streaming | Dense], spec: LayerSpec, stream: Pairs) -> Estimate:
    return finish({spec.name: fed(make, spec, stream)}, {spec.name: 1.0})[spec.name]


def sketched(
    spec: LayerSpec, stream: Pairs, width: Callable[[int], int] | None = None, steps: int | None = None
) -> Estimate:
    """By a sketch of other than its usual `width` for q triplets, with other than the usual number of power `steps`."""
    before = streaming.sketch_width, streaming.power_steps
    try:
        streaming.sketch_width = width or before[0]
        streaming.power_steps = before[1] if steps is None else lambda micro_batches: steps
        return estimated(Streaming, spec, stream)
    finally:
        streaming.sketch_width, streaming.power_steps = before


def merged(world: int, spec: LayerSpec, stream: Pairs) -> Estimate:
    """By `world` ranks that share the micro-batches, played in one process: what each asks to be summed is summed."""
    ranks = [fed(Streaming, spec, stream[rank::world]) for rank in range(world)]
    for exchange in zip(*(Streaming.merging([rank], 1.0) for rank in ranks), strict=True):
        total = torch.stack(exchange).sum(dim=0)
        for part in exchange:
            part.copy_(total)
    return finish({spec.name: ranks[0]}, {spec.name: 1.0})[spec.name]


VARIANTS: dict[str, Callable[[LayerSpec, Pairs], Estimate]] = {
    "streaming (default)": partial(estimated, Streaming),
    "streaming, no power step": partial(sketched, steps=0),
    "streaming, one power step each": partial(sketched, steps=1),
    "streaming, k = 2q": partial(sketched, width=lambda q: 2 * q),
    "streaming, k = q + 32": partial(sketched, width=lambda q: q + 32),
    "dense float32": partial(estimated, lambda spec, micro_batches: Dense(spec)),
    "dense bfloat16": partial(estimated, lambda spec, micro_batches: Dense(spec, torch.bfloat16)),
}
# with X and dY as a bfloat16 model would have them, and the exact gradient from the same
HALF = {"streaming, bfloat16 model": partial(estimated, Streaming)}
# these for the largest number of micro-batches only, which all ranks share
MERGED = {f"streaming, merged from {world} ranks": partial(merged, world) for world in (2, 4, 8, 16)}


def table(result: dict) -> str:
    """Markdown: a row per variant; the worst over models, for each number of micro-batches."""
    lines = [
        "| variant | " + " | ".join(f"{count} micro-batch{'es' if count > 1 else ''}" for count in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for variant in dict.fromkeys(row["variant"] for row in result["rows"]):
        cells = []
        for count in BATCHES:
            rows = [r for r in result["rows"] if r["variant"] == variant and r["micro_batches"] == count]
            if not rows:
                cells.append("")
                continue
            keys = ("objective_excess_mean", "objective_excess_worst", "energy_lost_worst")
            cells.append(" / ".join(f"{max(max(row[key] for row in rows), 0):.2f}" for key in keys))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(model_name: str) -> list[dict]:
    """All rows of one model, on one thread: the operations are too small for more."""
    torch.set_num_threads(1)
    rows = []
    pairs = record(*MODELS[model_name]())
    for count, dtype in itertools.product(BATCHES, (torch.float32, torch.bfloat16)):
        streams = {name: [(x.to(dtype), dy.to(dtype)) for x, dy in stream[:count]] for name, stream in pairs.items()}
        exact = {
            name: torch.stack([dy.double().T @ x.double() for x, dy in stream]).sum(dim=0)
            for name, stream in streams.items()
        }
        values = {name: torch.linalg.svdvals(g) for name, g in exact.items()}
        variants = HALF if dtype == torch.bfloat16 else VARIANTS | (MERGED if count == max(BATCHES) else {})
        for variant, estimate in variants.items():
            excess, lost, energy = [], [], []
            for name, stream in streams.items():
                g, s = exact[name], values[name]
                result = estimate(LayerSpec(name, *g.shape, RANK, 7, g.device), stream)
                more, less = shortfall(g, s, result.factors)
                excess.append(more)
                lost.append(less)
                energy.append(abs(result.energy / float(s.square().sum()) - 1))
            rows.append(
                {
                    "model": model_name,
                    "micro_batches": count,
                    "r": RANK,
                    "variant": variant,
                    "layers": len(excess),
                    "objective_excess_mean": 100 * statistics.fmean(excess),
                    "objective_excess_worst": 100 * max(excess),
                    "energy_lost_mean": 100 * statistics.fmean(lost),
                    "energy_lost_worst": 100 * max(lost),
                    "energy_estimate_error_worst": 100 * max(energy),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    processes = min(len(os.sched_getaffinity(0)), len(MODELS))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(measure, MODELS) for row in found]
    _machine.save({**_machine.describe(), "threads": 1, "unit": "percent", "rows": rows}, args.output)
    if args.output:
        print(table({"rows": rows}))


if __name__ == "__main__":
    main()
