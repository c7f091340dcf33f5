"""What merging the sketches of several ranks costs in accuracy.

    python benchmarks/merge.py --output benchmarks/results/merge-cpu.json

The models, layers and 16 micro-batches of `accuracy.py`, dealt out to 1, 2, 4, 8 and 16 ranks. The ranks are played in
one process: what each asks to be summed is summed, as the all-reduce would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import _machine
import torch
from accuracy import RANKS, Pairs, models, record, shortfall

from loraga.estimators import Estimate, LayerSpec, Streaming, finish

WORLDS = (1, 2, 4, 8, 16)


def merged(spec: LayerSpec, stream: Pairs, world: int) -> Estimate:
    """The estimate of `world` ranks that share the micro-batches of `stream`."""
    ranks = []
    for rank in range(world):
        share = stream[rank::world]
        ranks.append(Streaming(spec, len(share)))
        for x, dy in share:
            ranks[-1].update(x, dy)
    if world > 1:
        for exchange in zip(*(Streaming.merging([rank], 1.0) for rank in ranks), strict=True):
            total = torch.stack(exchange).sum(dim=0)
            for part in exchange:
                part.copy_(total)
    return finish({"layer": ranks[0]}, {"layer": 1.0})["layer"]


def table(result: dict) -> str:
    """Markdown: a row per number of ranks, the worst over models and adapter ranks."""
    lines = ["| ranks | objective excess, mean | worst layer | energy lost, worst layer |", "|---|---|---|---|"]
    for world in WORLDS:
        rows = [row for row in result["rows"] if row["world"] == world]
        keys = ("objective_excess_mean", "objective_excess_worst", "energy_lost_worst")
        lines.append(f"| {world} | " + " | ".join(f"{max(row[key] for row in rows):.2f} %" for key in keys) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    rows = []
    for model_name, (model, batch, blocks) in models().items():
        pairs = record(model, batch, blocks)
        exact = {
            name: torch.stack([dy.double().T @ x.double() for x, dy in stream]).sum(dim=0)
            for name, stream in pairs.items()
        }
        values = {name: torch.linalg.svdvals(g) for name, g in exact.items()}
        for r in RANKS:
            for world in WORLDS:
                excess, lost = [], []
                for name, stream in pairs.items():
                    g, s = exact[name], values[name]
                    factors = merged(LayerSpec(name, *g.shape, 2 * r, 7, g.device), stream, world).factors
                    more, less = shortfall(g, s, factors)
                    excess.append(more)
                    lost.append(less)
                rows.append(
                    {
                        "model": model_name,
                        "world": world,
                        "r": r,
                        "layers": len(excess),
                        "objective_excess_mean": 100 * statistics.fmean(excess),
                        "objective_excess_worst": 100 * max(excess),
                        "energy_lost_worst": 100 * max(lost),
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
    _machine.save({**_machine.describe(), "unit": "percent", "rows": rows}, args.output)


if __name__ == "__main__":
    main()
