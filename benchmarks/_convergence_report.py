"""The numbers of a convergence run, its table and its plots: all from the curves in the result file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

Curves = list[list[float | None]]  # per seed, per evaluation; None once a run has diverged

# Full fine-tuning black, plain LoRA and its scaling orange, PEFT's other starts greens, ours and LoRA-One blues.
COLOURS = {
    "full": "#333333",
    "lora": "#d9660a",
    "rslora": "#f2a65a",
    "pissa": "#1b7837",
    "eva": "#7fbf7b",
    "peft-lora-ga": "#a6761d",
    "lora-ga-mirror": "#0b66c3",
    "lora-ga-zero-b": "#08306b",
    "lora-one": "#7b3fa0",
}


def mean_curve(curves: Curves) -> list[float]:
    """Mean over the seeds; infinite where any of them has diverged."""
    return [
        fmean(math.inf if loss is None else loss for loss in column) if None not in column else math.inf
        for column in zip(*curves, strict=True)
    ]


def mean_final(curves: Curves) -> float:
    return mean_curve(curves)[-1]


def best_run(method: dict) -> dict:
    """The learning rate of a sweep with the lowest mean final loss."""
    return min(method["runs"], key=lambda run: mean_final(run["loss"]))


def run_at(method: dict, rate: float) -> dict:
    return next(run for run in method["runs"] if run["rate"] == rate)


def steps_to_reach(steps: Sequence[int], losses: Sequence[float | None], target: float) -> float | None:
    """Where a curve first comes down to `target`, on the straight line between two evaluations; `None` if never."""
    before: tuple[int, float] | None = None
    for step, loss in zip(steps, losses, strict=True):
        if loss is None or not math.isfinite(loss):
            return None
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """`"better"`, `"worse"`, or `"tie"`: the difference of the means is within the larger spread over the seeds."""
    if not all(map(math.isfinite, [*ours, *theirs])):
        return "tie" if fmean(ours) == fmean(theirs) else "worse" if not math.isfinite(fmean(ours)) else "better"
    difference = fmean(ours) - fmean(theirs)
    spread = max(max(ours) - min(ours), max(theirs) - min(theirs))
    return "tie" if abs(difference) <= spread else "better" if difference < 0 else "worse"


def _finals(run: dict) -> list[float]:
    return [math.inf if curve[-1] is None else curve[-1] for curve in run["loss"]]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def numbers(task: dict) -> dict:
    """What is reported of one task.

    Args:
        task (`dict`): its entry in the result file, with `steps` and `methods`.

    Returns:
        `dict`: `common_rate` (full fine-tuning's best), `target` (plain LoRA's mean final loss there), and per method
        the steps to the target at that rate (of the mean curve, and per seed) and the best of its sweep.
    """
    methods, steps = task["methods"], task["steps"]
    common = best_run(methods["full"])["rate"]
    lora = methods["lora"]
    target = mean_final(run_at(lora, common)["loss"])
    winner = min(methods, key=lambda m: mean_final(best_run(methods[m])["loss"]))
    rows = {}
    for name, method in methods.items():
        at_common, best = run_at(method, common), best_run(method)
        finals = _finals(best)
        rows[name] = {
            "steps_to_target": steps_to_reach(steps, mean_curve(at_common["loss"]), target),
            "steps_to_target_by_seed": [steps_to_reach(steps, curve, target) for curve in at_common["loss"]],
            "final_at_common_rate": _finite(mean_final(at_common["loss"])),
            "best_rate": best["rate"],
            "best_final": _finite(fmean(finals)),
            "best_final_by_seed": [_finite(value) for value in finals],
            "best_at_edge": method["best_at_edge"],
            "against_lora": verdict(finals, _finals(best_run(lora))),
            "against_lowest": verdict(finals, _finals(best_run(methods[winner]))),
        }
    return {"common_rate": common, "target": _finite(target), "lowest": winner, "methods": rows}


def _steps(row: dict) -> str:
    by_seed = row["steps_to_target_by_seed"]
    if row["steps_to_target"] is None:
        return "not reached"
    spread = "/".join("never" if value is None else f"{value:.0f}" for value in by_seed)
    return f"{row['steps_to_target']:.1f} ({spread})"


def _final(row: dict) -> str:
    if row["best_final"] is None:
        return "diverged"
    low, high = min(row["best_final_by_seed"]), max(row["best_final_by_seed"])
    return f"{row['best_final']:.4f} ({low:.4f} to {high:.4f})"


def table(result: dict) -> str:
    """Markdown: a table per task, a row per method."""
    blocks = []
    for name, task in result["tasks"].items():
        found = task["numbers"]
        seeds = len(task["seeds"])
        lines = [
            f"**{name}**: {task['note']}; {task['steps'][-1]} steps, {seeds} seeds.",
            "",
            f"| method | s | steps to {found['target']:.4f} at {found['common_rate']:.0e} (by seed) "
            "| best final loss (over seeds) | at rate | against LoRA | against the lowest |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, row in found["methods"].items():
            used = task["methods"][method]
            scaling = "" if used.get("scaling") is None else f"{used['scaling']:.2f}"
            edge = ", at the edge of the sweep" if row["best_at_edge"] else ""
            against = ["" if method == "lora" else row["against_lora"]]
            against.append("lowest" if method == found["lowest"] else row["against_lowest"])
            lines.append(
                f"| {used['title']} | {scaling} | {_steps(row)} | {_final(row)} | {row['best_rate']:.0e}{edge} "
                f"| {' | '.join(against)} |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plot(result: dict, file: Path) -> list[Path]:
    """A picture per task, beside `file`: curves at the common rate, and the final loss by rate. The files written."""
    from matplotlib.figure import Figure

    written = []
    for name, task in result["tasks"].items():
        found, steps = task["numbers"], task["steps"]
        figure = Figure(figsize=(12, 5), dpi=80, layout="constrained")
        left, right = figure.subplots(1, 2)
        for method, entry in task["methods"].items():
            style = {"color": COLOURS[method], "linewidth": 1.8, "marker": "o", "markersize": 3.5}
            if method == "rslora":  # lies on plain LoRA's curve where both have the same s
                style["linestyle"] = "--"
            curve = mean_curve(run_at(entry, found["common_rate"])["loss"])
            left.plot(steps, curve, label=entry["title"], **style)
            rates = [run["rate"] for run in entry["runs"]]
            right.plot(rates, [mean_final(run["loss"]) for run in entry["runs"]], **style)
            low, high = zip(*((min(_finals(run)), max(_finals(run))) for run in entry["runs"]), strict=True)
            right.vlines(rates, low, high, color=COLOURS[method], alpha=0.5, linewidth=1)
        left.axhline(found["target"], color="#999999", linewidth=1, linestyle=(0, (2, 3)))
        left.set_xlabel("training steps")
        left.set_title(f"held-out loss at {found['common_rate']:.0e}, full fine-tuning's best rate", fontsize=10)
        right.set_xscale("log")
        right.set_xlabel("learning rate")
        right.set_title(f"held-out loss after {steps[-1]} steps; bars: over the seeds", fontsize=10)
        start = max(mean_curve(run_at(entry, found["common_rate"])["loss"])[0] for entry in task["methods"].values())
        lowest = min(min(_finals(best_run(entry))) for entry in task["methods"].values())
        for axes in (left, right):
            # what rises above the start leaves the picture: a diverged run would flatten all the others
            axes.set_ylim(lowest - 0.05 * (start - lowest), start + 0.05 * (start - lowest))
            axes.grid(alpha=0.25)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
        figure.suptitle(f"{name}: mean of {len(task['seeds'])} seeds", fontsize=11)
        target = file.with_name(f"{file.stem}-{name.replace(' ', '-')}.png")
        figure.savefig(target)
        written.append(target)
    return written
