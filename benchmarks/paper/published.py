"""The published numbers beside ours.

    python benchmarks/paper/published.py
    python benchmarks/paper/published.py --results benchmarks/results/paper-*.json

Published: LoRA-GA (arXiv 2407.05000), as reprinted in the LoRA-MGPO paper; accuracy in percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

GLUE = ("mnli", "sst2", "cola", "qnli", "mrpc")
HEADS = {"mnli": "MNLI", "sst2": "SST-2", "cola": "CoLA", "qnli": "QNLI", "mrpc": "MRPC", "gsm8k": "GSM8K"}
# method of the harness (None: not offered here), name in the paper, mean and deviation over 3 seeds in GLUE's order
PUBLISHED_GLUE: tuple[tuple[str | None, str, tuple[str, ...]], ...] = (
    ("full", "Full", ("86.33 ± 0.00", "94.75 ± 0.21", "80.70 ± 0.24", "93.19 ± 0.22", "84.56 ± 0.73")),
    ("lora", "LoRA", ("85.30 ± 0.04", "94.04 ± 0.11", "69.35 ± 0.05", "92.96 ± 0.09", "68.38 ± 0.01")),
    ("pissa", "PiSSA", ("85.75 ± 0.07", "94.07 ± 0.06", "74.27 ± 0.39", "93.15 ± 0.14", "76.31 ± 0.51")),
    ("rslora", "rsLoRA", ("85.73 ± 0.10", "94.19 ± 0.23", "72.32 ± 1.12", "93.12 ± 0.09", "52.86 ± 2.27")),
    (None, "LoRA+", ("85.81 ± 0.09", "93.85 ± 0.24", "77.53 ± 0.20", "93.14 ± 0.03", "74.43 ± 1.39")),
    ("dora", "DoRA", ("85.67 ± 0.09", "94.04 ± 0.53", "72.04 ± 0.94", "93.04 ± 0.06", "68.08 ± 0.51")),
    (None, "AdaLoRA", ("85.45 ± 0.11", "93.69 ± 0.20", "69.16 ± 0.24", "91.66 ± 0.05", "68.14 ± 0.28")),
    ("lora-ga-mirror", "LoRA-GA", ("85.70 ± 0.09", "94.11 ± 0.18", "80.57 ± 0.20", "93.18 ± 0.06", "85.29 ± 0.24")),
)
PUBLISHED_GSM8K: tuple[tuple[str | None, str, str], ...] = (
    ("full", "Full", "59.36"),
    ("lora", "LoRA", "42.08"),
    ("pissa", "PiSSA", "44.54"),
    ("rslora", "rsLoRA", "45.62"),
    (None, "LoRA+", "52.11"),
    ("dora", "DoRA", "53.07"),
    (None, "AdaLoRA", "50.72"),
    ("lora-ga-mirror", "LoRA-GA", "53.60"),
)


def measured(results: Sequence[dict], task: str, method: str | None) -> str:
    """The cell of our own column: mean and range over the seeds, in percent."""
    if method is None:
        return "not offered"
    found = [
        100 * row["accuracy"]
        for result in results
        for row in result["rows"]
        if (row["task"], row["method"]) == (task, method)
    ]
    if not found:
        return "not measured"
    return f"{fmean(found):.2f} ({min(found):.2f} to {max(found):.2f}; {len(found)} seeds)"


def glue_table(results: Sequence[dict]) -> str:
    """Markdown: a row per method, two columns per task."""
    lines = [
        "| method | " + " | ".join(f"{HEADS[task]} published | measured" for task in GLUE) + " |",
        "|---|" + "---|---|" * len(GLUE),
    ]
    for method, name, cells in PUBLISHED_GLUE:
        row = [f"{cell} | {measured(results, task, method)}" for task, cell in zip(GLUE, cells, strict=True)]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def gsm8k_table(results: Sequence[dict]) -> str:
    """Markdown: a row per method."""
    lines = ["| method | GSM8K published | measured |", "|---|---|---|"]
    lines += [f"| {name} | {cell} | {measured(results, 'gsm8k', method)} |" for method, name, cell in PUBLISHED_GSM8K]
    return "\n".join(lines)


def load(files: Sequence[Path]) -> list[dict]:
    """Result files of real runs.

    Raises:
        ValueError: a file is a stand-in's: its accuracies mean nothing.
    """
    results = [json.loads(file.read_text()) for file in files]
    for file, result in zip(files, results, strict=True):
        if result["stand_in"]:
            raise ValueError(f"{file} holds the result of a stand-in, whose accuracies mean nothing; run without it.")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="*", type=Path, default=[])
    results = load(parser.parse_args(arguments).results)
    print(f"{glue_table(results)}\n\n{gsm8k_table(results)}")


if __name__ == "__main__":
    main()
