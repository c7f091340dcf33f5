"""Put the tables of the committed results into the documents:  python benchmarks/tables.py

A table stands between `<!-- table: RESULT -->` and `<!-- end -->`, RESULT being a file of `results/` without its
ending; `<!-- table: RESULT: a, b -->` takes only the rows that begin with a or b.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "numerics.md",
    ROOT / "docs" / "time-model.md",
]
# which module prints the table of a result
PRINTED_BY = {
    "accuracy-cpu": "accuracy",
    "convergence-cpu": "_convergence_report",
    "growth-cpu": "growth",
    "native-cpu": "native",
    "operations-cpu": "operations",
    "time-model": "time_model",
    "time-model-layers": "time_model",
    "whole-run-cpu": "whole_run",
    "whole-run-xeon": "whole_run",
}
PLACE = re.compile(r"(<!-- table: ([\w-]+)(?:: ([^>]*))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(result: str, rows: str | None = None) -> str:
    """Markdown of `results/{result}.json`; of all rows, or of those that begin with one of `rows`."""
    module = importlib.import_module(PRINTED_BY[result])
    lines = module.table(json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())).splitlines()
    if rows is not None:
        chosen = rows.split(", ")
        lines = lines[:2] + [line for line in lines[2:] if line.split(" | ")[0].removeprefix("| ") in chosen]
    return "\n".join(lines)


def filled(text: str) -> str:
    """`text` with every table as its result file has it now."""
    return PLACE.sub(lambda found: f"{found[1]}\n{table(found[2], found[3])}\n\n{found[4]}", text)


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
