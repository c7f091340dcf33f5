"""`python -m loraga.kernels.dev`: compile the kernels of real initialisations, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

_COLUMNS = (  # heading, width, field
    ("warps", 6, "num_warps"),
    ("regs", 5, "registers"),
    ("shared", 7, "shared"),
    ("spilled", 8, "local"),
    ("per SM", 7, "resident"),
    ("loop", 5, "loop"),
    ("tensor", 7, "tensor"),
    ("loads", 6, "loads"),
    ("16 B", 5, "wide_loads"),
    ("async", 6, "asynchronous"),
    ("int64", 6, "wide_integers"),
    ("generic", 8, "generic"),
    ("uses", 5, "uses"),
)
_LEGEND = """
per SM: blocks that fit on a multiprocessor. loop: instructions of the main loop. In it: tensor: products on tensor
cores; loads: from global memory, 16 B: of them those of 16 bytes a thread, async: those that pass no register; int64:
64-bit integer instructions. generic: accesses in the whole kernel that find out at run time which memory is meant.
uses: launches in all cases (loraga/kernels/dev/workloads.py)."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loraga.kernels.dev", description=__doc__)
    parser.add_argument("arch", type=int, nargs="*", help="compute capabilities, such as 90 (all that are known)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE, too")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported, below
    from loraga.kernels.dev import aot
    from loraga.kernels.dev.devices import ARCHITECTURES

    unknown = [arch for arch in options.arch if arch not in ARCHITECTURES]
    if unknown:
        print(f"unknown architectures {unknown}; known are {list(ARCHITECTURES)}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    bad = 0
    shown = None
    for usage in aot.compile_all(options.arch or ARCHITECTURES):
        row = asdict(usage)
        if usage.arch != shown:
            print(f"\nsm_{usage.arch}\n{'kernel':<22}" + "".join(f"{name:>{width}}" for name, width, _ in _COLUMNS))
            shown = usage.arch
        line = f"{usage.kernel.strip('_').removesuffix('_kernel'):<22}"
        line += "".join(f"{row[field]:>{width}}" for _, width, field in _COLUMNS)
        print(f"{line}  {usage.operands}: {usage.label}", flush=True)
        for fault in usage.faults:
            print(f"   ^ {fault}", flush=True)
        bad += bool(usage.faults)
        rows.append(row)
    print(_LEGEND)
    print(f"{bad} of {len(rows)} binaries have a fault" if bad else f"{len(rows)} binaries, none has a fault")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
