"""What the runs show, in words that follow the numbers, whoever wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from training import Run

FULL, LORA_GA, LORA = "full fine-tuning", "LoRA-GA", "plain LoRA"


def select(runs: Sequence[Run], method: str, lr: float) -> list[Run]:
    """The runs of one setting, one per seed."""
    return [run for run in runs if run.method == method and run.lr == lr]


def mean_curve(runs: Sequence[Run]) -> tuple[list[int], list[float], list[float]]:
    """Steps, accuracy and loss, averaged over seeds."""
    columns = list(zip(*(run.accuracy for run in runs), strict=True))
    losses = list(zip(*(run.loss for run in runs), strict=True))
    return runs[0].steps, [fmean(c) for c in columns], [fmean(c) for c in losses]


def final_accuracy(runs: Sequence[Run]) -> float:
    return fmean(run.accuracy[-1] for run in runs)


def swept_rates(runs: Sequence[Run], method: str) -> list[float]:
    return sorted({run.lr for run in runs if run.method == method})


def best_rate(runs: Sequence[Run], method: str, seed: int) -> float:
    """The learning rate with the best final held-out accuracy in the sweep, which one seed went through."""
    swept = [run for run in runs if run.method == method and run.seed == seed]
    return max(swept, key=lambda run: run.accuracy[-1]).lr


def difference(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[float, float]:
    """Final accuracy of `ours` minus `theirs` on the seeds both have, and the standard error of that difference.

    Both answered the same held-out texts, so the error comes from the differences text by text. It covers the choice
    of the texts, not the choice of the seeds.
    """
    other = {run.seed: run.right for run in theirs}
    pairs = [(run.right, other[run.seed]) for run in ours if run.seed in other]
    if not pairs:
        raise ValueError("the two settings have no seed in common")
    count = len(pairs[0][0])
    per_text = [fmean(float(a[i]) - float(b[i]) for a, b in pairs) for i in range(count)]
    mean = fmean(per_text)
    return mean, math.sqrt(fmean((d - mean) ** 2 for d in per_text) / count)


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """`"ahead of"`, `"behind"` or `"level with"` (less than two standard errors apart), with the difference."""
    mean, error = difference(ours, theirs)
    word = "level with" if abs(mean) < 2 * error or mean == 0 else "ahead of" if mean > 0 else "behind"
    return f"{word} {_name(theirs)} ({100 * mean:+.1f} ± {100 * error:.1f} points)"


def first_step_at(runs: Sequence[Run], accuracy: float) -> int | None:
    """The first evaluated step at which the mean accuracy reaches `accuracy`."""
    steps, accuracies, _ = mean_curve(runs)
    return next((step for step, value in zip(steps, accuracies, strict=True) if value >= accuracy), None)


def _name(runs: Sequence[Run]) -> str:
    return f"{runs[0].method} at {runs[0].lr:.0e}"


def findings(
    runs: Sequence[Run], *, rate: float, sweep_seed: int, chance: float, init_seconds: float, texts: int
) -> list[str]:
    """The sentences at the end of the demo.

    Args:
        runs (`Sequence[Run]`): all of them.
        rate (`float`): full fine-tuning's learning rate, at which the three methods are compared first.
        sweep_seed (`int`): the seed that went through every learning rate.
        chance (`float`): accuracy of always naming the most frequent class.
        init_seconds (`float`): what one `fast_init` took.
        texts (`int`): how many held-out texts there are.
    """
    full, ours, lora = (select(runs, method, rate) for method in (FULL, LORA_GA, LORA))
    last = ours[0].steps[-1]
    lora_best = select(runs, LORA, best_rate(runs, LORA, sweep_seed))
    ours_best = select(runs, LORA_GA, best_rate(runs, LORA_GA, sweep_seed))
    said = [
        f"At full fine-tuning's learning rate {rate:.0e}, after {last} steps: {LORA_GA} {final_accuracy(ours):.2f}, "
        f"{LORA} {final_accuracy(lora):.2f}, {FULL} {final_accuracy(full):.2f} of the held-out texts right "
        f"(always naming the largest class: {chance:.2f}).",
        f"There {LORA_GA} is {compare(ours, lora)} and {compare(ours, full)}.",
    ]

    middle = (len(ours[0].steps) - 1) // 2
    early = ours[0].steps[middle]
    values = [mean_curve(group)[1][middle] for group in (ours, lora, full)]
    said.append(
        f"Earlier, after {early} steps: {LORA_GA} {values[0]:.2f}, {LORA} {values[1]:.2f}, {FULL} {values[2]:.2f}."
    )

    if lora_best[0].lr == rate:
        said.append(f"In its own sweep {LORA} is best at that same learning rate.")
    else:
        early_best = mean_curve(lora_best)[1][middle]
        passed = first_step_at(lora_best, final_accuracy(ours))
        said.append(
            f"Plain LoRA at the best learning rate of its own sweep, {lora_best[0].lr:.0e}, reaches "
            f"{early_best:.2f} after {early} steps and {final_accuracy(lora_best):.2f} after {last}; it "
            + ("never has" if passed is None else f"has by step {passed}")
            + f" what {LORA_GA} at {rate:.0e} has in the end."
        )
    said.append(
        f"Each at its own best rate, {LORA_GA} at {ours_best[0].lr:.0e} is {compare(ours_best, lora_best)} in the end, "
        f"with a held-out loss of {mean_curve(ours_best)[2][-1]:.2f} against {mean_curve(lora_best)[2][-1]:.2f}."
    )

    high = select(runs, LORA_GA, swept_rates(runs, LORA_GA)[-1])
    if high[0].lr != rate:
        times = high[0].lr / rate
        gained, error = difference(high, ours)
        if final_accuracy(high) < 2 * chance:
            verdict = f"it learns nothing: {final_accuracy(high):.2f}. Do not carry LoRA's learning rates over."
        elif gained < -2 * error:
            verdict = f"it is worse: {final_accuracy(high):.2f}. Do not carry LoRA's learning rates over."
        else:
            verdict = f"it holds: {final_accuracy(high):.2f}."
        said.append(f"{LORA_GA} at {times:.0f} times full fine-tuning's learning rate ({high[0].lr:.0e}): {verdict}")

    step = fmean(run.seconds for run in runs if run.method == LORA) / len_of_training(runs)
    said.append(
        f"The initialisation took {init_seconds:.1f} s, as long as {init_seconds / step:.0f} of {LORA}'s training "
        "steps; the curves count training steps only."
    )
    seeds = sorted({run.seed for run in ours})
    said.append(
        f"Seeds: {len(seeds)} ({', '.join(map(str, seeds))}); the sweep used seed {sweep_seed} only, and chose on the "
        f"held-out texts themselves, which flatters the best of it. ± is one standard error over the {texts} texts; "
        "less than two of them apart counts as level."
    )
    return said


def len_of_training(runs: Sequence[Run]) -> int:
    """How many steps each run took."""
    return runs[0].steps[-1]


def table(runs: Sequence[Run]) -> str:
    """One row per setting: accuracy at every evaluated step, final loss, seconds of training; means over the seeds."""
    steps = runs[0].steps
    header = f"{'method':<17} {'lr':>7} {'seeds':>5} " + " ".join(f"@{step:<4}" for step in steps) + "  loss  seconds"
    rows = []
    for method in (FULL, LORA_GA, LORA):
        for lr in swept_rates(runs, method):
            group = select(runs, method, lr)
            _, accuracy, loss = mean_curve(group)
            rows.append(
                f"{method:<17} {lr:>7.0e} {len(group):>5} "
                + " ".join(f"{value:<5.3f}" for value in accuracy)
                + f"  {loss[-1]:.2f}  {fmean(run.seconds for run in group):>5.0f}"
            )
    return "\n".join([header, "-" * len(header), *rows])
