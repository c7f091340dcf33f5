"""How time and peak memory of an initialisation grow, and how well `loraga plan` foretells the memory.

    python benchmarks/growth.py --output benchmarks/results/growth-cpu.json

Small Llamas in float32, one thing varied at a time: tokens per micro-batch, width, depth, rank, number of
micro-batches; each point in a process of its own, forked when libraries are loaded and before anything is computed.
Exponents are slopes of a least-squares line through the logarithms, with its R2. Memory is resident memory at its peak
above the level before the model was built, weights included, after a small initialisation in the same process; large
blocks go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_=131072, glibc), so that it is memory in use
and not what the allocator kept. Beside it stands what `loraga plan` predicts for the same model and batch.
    python benchmarks/growth.py --table FILE     its tables, and nothing else
    python benchmarks/growth.py --plots FILE     its plots, a PNG beside it for each thing varied
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import _llama
import _machine
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from whole_run import PeakMemory, batches, text

import loraga
from loraga.integrations.hf_models import without_weights
from loraga.plan.plan import CHECKPOINTED, plan

MMAP_THRESHOLD = "131072"
VOCABULARY = 4096


@dataclass(frozen=True)
class Point:
    """A model, a batch and what is run on it."""

    width: int = 512
    depth: int = 4
    rank: int = 16
    tokens: int = 512
    micro_batches: int = 2
    case: str = "initialisation"
    checkpointing: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        heads = self.width // 64
        return self.width, 2 * self.width + self.width // 2, self.depth, heads, heads // 2, VOCABULARY

    @property
    def rows(self) -> int:
        return max(1, self.tokens // 256)

    @property
    def length(self) -> int:
        return self.tokens // self.rows


BASE = Point()
# the rank is felt where sketches pay, that is in wide layers
WIDE = Point(width=1536, depth=1)
SWEEPS = {
    "tokens": [replace(BASE, tokens=tokens) for tokens in (256, 512, 1024, 2048)],
    "width": [replace(BASE, width=width) for width in (256, 512, 768, 1024)],
    "depth": [replace(BASE, depth=depth) for depth in (1, 2, 4, 8)],
    "rank": [replace(WIDE, rank=rank) for rank in (16, 32, 64)],
    "micro_batches": [replace(BASE, micro_batches=count) for count in (1, 2, 4, 8)],
}
# each against its prediction, growth or not
OTHERS = [
    replace(BASE, tokens=1024, checkpointing=True),
    replace(BASE, tokens=1024, case="training"),
    replace(BASE, tokens=1024, case="training", checkpointing=True),
]


def lora_config(rank: int):
    return LoraConfig(r=rank, lora_alpha=4 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def initialise(model, data, rank: int) -> None:
    loraga.fast_init(model, data, lora_config(rank), show_progress_bar=False)


def train(model, data, rank: int) -> None:
    peft_model = get_peft_model(model, lora_config(rank)).train()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-4)
    for batch in data:
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(point: Point) -> dict:
    """Seconds and peak bytes of one point, in this process."""
    warnings.simplefilter("ignore")
    run = {"initialisation": initialise, "training": train}[point.case]
    small = LlamaForCausalLM(_llama.config(256, 512, 2, 4, 2, VOCABULARY))
    data = batches(small, point.micro_batches, point.rows, point.length)
    run(small, [{key: value[:, :64] for key, value in batch.items()} for batch in data[:2]], BASE.rank)
    del small
    with PeakMemory("cpu") as memory:
        model = LlamaForCausalLM(_llama.config(*point.shape))
        if point.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        began = time.perf_counter()
        run(model, data, point.rank)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": memory.bytes}


def predict(point: Point) -> dict:
    """The peak that `loraga plan` foretells."""
    model = without_weights(_llama.config(*point.shape), "AutoModelForCausalLM", torch.float32)
    planned = plan(
        model, lora_config(point.rank), rows=point.rows, length=point.length, micro_batches=point.micro_batches
    )
    what = {"initialisation": "initialisation", "training": "LoRA training step"}[point.case]
    return {
        "predicted_bytes": planned.peaks[what + (CHECKPOINTED if point.checkpointing else "")],
        "weight_bytes": planned.weight_bytes,
        "state_bytes": planned.state_bytes,
        "flops": planned.micro_batches * (planned.model_flops + planned.update_flops),
    }


def fit(xs: list[float], ys: list[float]) -> dict[str, float]:
    """Exponent and R2 of y = c x^exponent, by least squares through the logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (xs, ys))
    x, y = x - x.mean(), y - y.mean()
    exponent = (x @ y) / (x @ x)
    return {"exponent": float(exponent), "r2": float(1 - (y - exponent * x).square().sum() / (y @ y))}


def table(result: dict) -> str:
    """Markdown: the exponents, and every point with its prediction."""
    lines = ["| grows with | exponent of time | R2 | exponent of memory | R2 |", "|---|---|---|---|---|"]
    for name, sweep in result["sweeps"].items():
        fits = [f"{sweep[key]['exponent']:.2f} | {sweep[key]['r2']:.3f}" for key in ("seconds", "peak_bytes")]
        lines.append(f"| {name.replace('_', '-')} | {' | '.join(fits)} |")
    lines += ["", "| width x depth | r | tokens x micro-batches | what | seconds | peak memory | predicted | off by |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        what = row["case"] + (", checkpointed" if row["checkpointing"] else "")
        lines.append(
            f"| {row['width']} x {row['depth']} | {row['rank']} | {row['tokens']} x {row['micro_batches']} | {what} "
            f"| {row['seconds']:.2f} | {row['peak_bytes'] / 1e6:.0f} MB | {row['predicted_bytes'] / 1e6:.0f} MB "
            f"| {row['predicted_bytes'] / row['peak_bytes'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def plots(result: dict, folder: Path) -> None:
    """growth-NAME.png for each thing varied: time, and memory beside its prediction."""
    from matplotlib.figure import Figure

    for name, sweep in result["sweeps"].items():
        rows = [result["rows"][i] for i in sweep["rows"]]
        xs = [row[name] for row in rows]
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        time_axes, memory_axes = figure.subplots(1, 2)
        label = f"measured, ~ x^{sweep['seconds']['exponent']:.2f}"
        time_axes.plot(xs, [row["seconds"] for row in rows], "o-", label=label)
        label = f"measured, ~ x^{sweep['peak_bytes']['exponent']:.2f}"
        memory_axes.plot(xs, [row["peak_bytes"] / 1e6 for row in rows], "o-", label=label)
        memory_axes.plot(xs, [row["predicted_bytes"] / 1e6 for row in rows], "k+--", label="predicted by loraga plan")
        for axes, what in ((time_axes, "seconds"), (memory_axes, "peak memory, MB")):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(xs, [str(x) for x in xs])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel({"tokens": "tokens per micro-batch"}.get(name, name.replace("_", "-")))
            axes.set_ylabel(what)
            axes.grid(True, color="0.9")
            axes.legend(frameon=False)
        figure.savefig(folder / f"growth-{name.replace('_', '-')}.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a result file and do nothing else")
    parser.add_argument("--plots", type=Path, help="draw the plots of a result file and do nothing else")
    args = parser.parse_args()
    if args.table or args.plots:
        result = json.loads((args.table or args.plots).read_text())
        if args.plots:
            plots(result, args.plots.parent)
        else:
            print(table(result))
        return
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != MMAP_THRESHOLD:  # read by the allocator when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD})
    began = time.perf_counter()
    described = _machine.describe()
    points = list(dict.fromkeys([point for sweep in SWEEPS.values() for point in sweep] + OTHERS))
    rows = []
    text()  # read once for all processes
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for point, measured in zip(points, pool.imap(measure, points), strict=True):
            rows.append({**asdict(point), **measured})
            print(f"{point}: {measured['seconds']:.2f} s", file=sys.stderr)
    for point, row in zip(points, rows, strict=True):
        row |= predict(point)
    result = {**described, "rows": rows, "sweeps": {}}
    for name, sweep in SWEEPS.items():
        indices = [points.index(point) for point in sweep]
        xs = [rows[i][name] for i in indices]
        fits = {key: fit(xs, [rows[i][key] for i in indices]) for key in ("seconds", "peak_bytes")}
        result["sweeps"][name] = {"rows": indices, **fits}
    result["seconds_in_all"] = time.perf_counter() - began
    _machine.save(result, args.output)
    if args.output:
        plots(result, args.output.parent)
        print(table(result))


if __name__ == "__main__":
    main()
