"""How close the estimators come to the exact SVD of the exact gradient, and what the sketch's choices buy.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy-cpu.json

Real MiniLM weights on docstrings of the standard library (16-way classification; masked tokens) and a briefly trained
byte-level Llama: layers of the first, a middle and the last block; 1, 4 and 16 micro-batches; adapter ranks 4 and 8.
Per variant: excess of the LoRA-GA objective over the best possible, and energy lost, mean and worst layer, in percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _bytes
import _machine

from loraga.estimators import Dense, LayerSpec, Streaming, finish, streaming
from loraga.factors import Factors
from loraga.quiet import quiet
from loraga.taps import Taps

Pairs = list[tuple[Tensor, Tensor]]
BATCHES = (1, 4, 16)
RANKS = (4, 8)


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
    with quiet(model), Taps(targets, lambda name, x, dy: pairs[name].append((x.clone(), dy.clone()))) as taps:
        for i in range(max(BATCHES)):
            taps.backward(model(**batch(i)).loss)
    return pairs


def models() -> dict[str, tuple[nn.Module, Callable[[int], dict], tuple[int, ...]]]:
    """Model, micro-batch by number, and the blocks that are looked at, by name."""
    return {
        "minilm classification": (*minilm("classification"), (0, 2, 5)),
        "minilm masked tokens": (*minilm("masked tokens"), (0, 2, 5)),
        "llama bytes": (*llama(), (0, 1, 2)),
    }


def shortfall(g: Tensor, s: Tensor, factors: Factors) -> tuple[float, float]:
    """What 2r triplets fall short of the best: excess of the LoRA-GA objective, share of the energy lost.

    g is the exact gradient in float64, s all its singular values.
    """
    rank = len(factors.S) // 2
    a, b = factors.Vh[:rank].double(), factors.U[:, rank:].double()
    residual = (g - b @ (b.T @ g) - (g @ a.T) @ a).norm()
    held = (factors.U.double().T @ g @ factors.Vh.double().T).square().sum()
    return float(residual / s[2 * rank :].norm() - 1), 1 - float(held / s[: 2 * rank].square().sum())


def variants() -> Iterator[tuple[str, Callable[[LayerSpec, int], Streaming | Dense], Callable[[], None]]]:
    """Name, estimator and what to set before: width of the sketch and power steps, the default first."""
    width, steps = streaming.sketch_width, streaming.power_steps

    def setting(k: Callable[[int], int], p: Callable[[int | None], int]) -> Callable[[], None]:
        def apply() -> None:
            streaming.sketch_width, streaming.power_steps = k, p

        return apply

    yield "streaming (default)", Streaming, setting(width, steps)
    yield "streaming, no power step", Streaming, setting(width, lambda n: 0)
    yield "streaming, one power step each", Streaming, setting(width, lambda n: 1)
    yield "streaming, k = 2q", Streaming, setting(lambda q: 2 * q, steps)
    yield "streaming, k = q + 32", Streaming, setting(lambda q: q + 32, steps)
    yield "dense float32", lambda spec, n: Dense(spec), setting(width, steps)
    yield "dense bfloat16", lambda spec, n: Dense(spec, torch.bfloat16), setting(width, steps)


def table(result: dict) -> str:
    """Markdown: a row per variant; the worst over models and ranks, for each number of micro-batches."""
    lines = [
        "| variant | " + " | ".join(f"{count} micro-batch{'es' if count > 1 else ''}" for count in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for variant in dict.fromkeys(row["variant"] for row in result["rows"]):
        cells = []
        for count in BATCHES:
            rows = [r for r in result["rows"] if r["variant"] == variant and r["micro_batches"] == count]
            keys = ("objective_excess_mean", "objective_excess_worst", "energy_lost_worst")
            cells.append(" / ".join(f"{max(max(row[key] for row in rows), 0):.2f}" for key in keys))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="of the adapter")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    rows = []
    for model_name, (model, batch, blocks) in models().items():
        pairs = record(model, batch, blocks)
        for count in BATCHES:
            exact = {
                name: sum(
                    (dy.double().T @ x.double() for x, dy in stream[:count]), torch.zeros((), dtype=torch.float64)
                )
                for name, stream in pairs.items()
            }
            values = {name: torch.linalg.svdvals(g) for name, g in exact.items()}
            for rank in args.ranks:
                for variant, make, prepare in variants():
                    prepare()
                    excess, lost, energy = [], [], []
                    for name, stream in pairs.items():
                        g, s = exact[name], values[name]
                        spec = LayerSpec(name, *g.shape, 2 * rank, 7, g.device)
                        estimator = make(spec, count)
                        for x, dy in stream[:count]:
                            estimator.update(x, dy)
                        result = finish({name: estimator}, {name: 1.0})[name]
                        more, less = shortfall(g, s, result.factors)
                        excess.append(more)
                        lost.append(less)
                        energy.append(abs(result.energy / float(s.square().sum()) - 1))
                    rows.append(
                        {
                            "model": model_name,
                            "micro_batches": count,
                            "r": rank,
                            "variant": variant,
                            "layers": len(excess),
                            "objective_excess_mean": 100 * statistics.fmean(excess),
                            "objective_excess_worst": 100 * max(excess),
                            "energy_lost_mean": 100 * statistics.fmean(lost),
                            "energy_lost_worst": 100 * max(lost),
                            "energy_estimate_error_worst": 100 * max(energy),
                        }
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr)
    next(variants())[2]()
    _machine.save({**_machine.describe(), "unit": "percent", "rows": rows}, args.output)


if __name__ == "__main__":
    main()
