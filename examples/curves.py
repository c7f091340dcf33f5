"""Draws the demo's runs: accuracy and loss against steps, and what each learning rate led to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from findings import FULL, LORA, LORA_GA, best_rate, final_accuracy, mean_curve, select, swept_rates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from training import Run

COLOUR = {FULL: "#333333", LORA_GA: "#0b66c3", LORA: "#d9660a"}


def _settings(runs: Sequence[Run], rate: float, sweep_seed: int) -> list[tuple[str, float, str]]:
    """Method, learning rate and line style of the curves worth drawing."""
    drawn = [(FULL, rate, "-"), (LORA_GA, rate, "-"), (LORA, rate, "-")]
    best = best_rate(runs, LORA, sweep_seed)
    if best != rate:
        drawn.append((LORA, best, "--"))
    high = swept_rates(runs, LORA_GA)[-1]
    if high != rate:
        drawn.append((LORA_GA, high, ":"))
    return drawn


def _against_steps(axes: Axes, runs: Sequence[Run], rate: float, sweep_seed: int, column: int) -> None:
    """`column` 1 draws accuracy, 2 draws loss: the mean over seeds, and a band between the seeds."""
    for method, lr, style in _settings(runs, rate, sweep_seed):
        group = select(runs, method, lr)
        curve = mean_curve(group)
        note = "" if lr == rate else ", its best" if method == LORA else f", {lr / rate:.0f} x"
        axes.plot(
            curve[0],
            curve[column],
            style,
            color=COLOUR[method],
            linewidth=2,
            marker="o",
            markersize=4,
            label=f"{method}, lr {lr:.0e}{note}",
        )
        single = [run.accuracy if column == 1 else run.loss for run in group]
        low, high = zip(*((min(v), max(v)) for v in zip(*single, strict=True)), strict=True)
        axes.fill_between(curve[0], low, high, color=COLOUR[method], alpha=0.13, linewidth=0)
    axes.set_xticks(runs[0].steps)
    axes.set_xlabel("training steps")
    axes.grid(alpha=0.25)


def _against_rate(axes: Axes, runs: Sequence[Run], rate: float, sweep_seed: int) -> None:
    for method in (LORA, LORA_GA):
        swept = [run for run in runs if run.method == method and run.seed == sweep_seed]
        swept.sort(key=lambda run: run.lr)
        axes.plot(
            [run.lr for run in swept],
            [run.accuracy[-1] for run in swept],
            "-o",
            color=COLOUR[method],
            linewidth=2,
            markersize=5,
        )
        axes.annotate(
            method,
            (swept[0].lr, swept[0].accuracy[-1]),
            xytext=(8, -14),
            textcoords="offset points",
            color=COLOUR[method],
        )
    level = final_accuracy([run for run in select(runs, FULL, rate) if run.seed == sweep_seed])
    axes.plot([rate], [level], "s", color=COLOUR[FULL], markersize=7)
    axes.annotate(FULL, (rate, level), xytext=(8, -4), textcoords="offset points", color=COLOUR[FULL])
    rates = sorted({run.lr for run in runs})
    axes.set_xscale("log")
    axes.set_xticks(rates)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}\n{value / rate:.0f} x"))
    axes.set_xlabel("learning rate, and as a multiple of full fine-tuning's")
    axes.grid(alpha=0.25)


def draw(runs: Sequence[Run], file: Path, *, rate: float, sweep_seed: int, chance: float, subtitle: str) -> None:
    """Write the PNG.

    Args:
        runs (`Sequence[Run]`): all of them.
        file (`Path`): where to.
        rate (`float`): full fine-tuning's learning rate.
        sweep_seed (`int`): the seed that went through every learning rate.
        chance (`float`): accuracy of always naming the most frequent class; a thin line.
        subtitle (`str`): model, data and machine in a line.
    """
    figure = Figure(figsize=(15, 5.4), dpi=120, layout="constrained")
    accuracy, loss, rates = figure.subplots(1, 3)
    _against_steps(accuracy, runs, rate, sweep_seed, column=1)
    _against_steps(loss, runs, rate, sweep_seed, column=2)
    _against_rate(rates, runs, rate, sweep_seed)
    for axes in (accuracy, rates):
        axes.set_ylim(0, None)
        axes.axhline(chance, color="#999999", linewidth=1, linestyle=(0, (2, 3)))
        axes.text(0.01, chance, "always the largest class", ha="left", va="bottom", fontsize=8, color="#777777",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    accuracy.set_title("accuracy on held-out texts (higher is better)", fontsize=11)
    loss.set_title("loss on held-out texts (lower is better)", fontsize=11)
    last = runs[0].steps[-1]
    rates.set_title(f"accuracy after {last} steps, by learning rate (seed {sweep_seed})", fontsize=11)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    figure.suptitle(f"Which module does a docstring come from?  {subtitle}", fontsize=12)
    figure.savefig(file)
