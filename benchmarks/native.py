"""The native core's batched small problems beside torch.linalg (LAPACK, cuSOLVER): milliseconds and accuracy.

    python benchmarks/native.py --output benchmarks/results/native-cpu.json
    python benchmarks/native.py --device cuda --batches 1 32 --repeats 3 --output benchmarks/results/native-h200.json

Matrices are what a run meets: Gram matrices of sketches with unit columns, of condition 1e8 in float64 and 1e4 in
float32, and cores Qᵀ G V of gradients whose spectrum falls by six decades. Errors are against float64 LAPACK on the
CPU, the worst of the batch: `cholesky_inverse` ‖X (gram + shift) Xᵀ − I‖, `small_svd` the singular values relative to
the largest and ‖UᵀU − I‖, entrywise.
Each case is warmed up once; times are the median and the 20th and 80th percentile, a whole batch a call.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _machine
import torch
from torch import Tensor

from loraga.ops import native_core, reference

SHIFTS = {torch.float64: 1e-15, torch.float32: 1e-7}  # shares of the trace, as in orthonormalisation and basis


@functools.cache
def with_spectrum(batch: int, k: int, decades: float) -> Tensor:
    g = torch.Generator().manual_seed(k)
    u, v = (torch.linalg.qr(torch.randn(batch, k, k, dtype=torch.float64, generator=g)).Q for _ in range(2))
    return u * torch.logspace(0, -decades, k, dtype=torch.float64) @ v.mT


def grams(batch: int, k: int, dtype: torch.dtype) -> Tensor:
    tall = with_spectrum(batch, k, 4 if dtype == torch.float64 else 2)
    tall = tall / tall.norm(dim=-2, keepdim=True)
    return (tall.mT @ tall).to(dtype)


def inverse_errors(gram: Tensor, inverse: Tensor) -> dict[str, float]:
    shift = SHIFTS[gram.dtype]
    gram, inverse = gram.double().cpu(), inverse.double().cpu()
    identity = torch.eye(gram.shape[-1], dtype=torch.float64)
    shifted = gram + shift * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * identity
    return {"residual": float((inverse @ shifted @ inverse.mT - identity).abs().max())}


def svd_errors(core: Tensor, factors: tuple[Tensor, ...]) -> dict[str, float]:
    u, s, _ = (factor.double().cpu() for factor in factors[:3])
    true = torch.linalg.svdvals(core.double().cpu())
    return {
        "values": float(((s - true).abs() / true[:, :1]).max()),
        "orthogonality": float((u.mT @ u - torch.eye(u.shape[-1])).abs().max()),
    }


def cases(
    device: torch.device,
) -> list[tuple[str, str, Callable[[int, int], Tensor], Callable[[Tensor], Any], Callable]]:
    """Op, implementation, its input by (batch, k), the call, and what is wrong with the result."""

    def cores(batch: int, k: int) -> Tensor:
        return with_spectrum(batch, k, 6).float()

    found: list[tuple[str, str, Callable[[int, int], Tensor], Callable[[Tensor], Any], Callable]] = []
    for dtype, shift in SHIFTS.items():
        op = f"cholesky_inverse {str(dtype).removeprefix('torch.')}"
        make = functools.partial(grams, dtype=dtype)
        ours = functools.partial(native_core.cholesky_inverse, shift=shift)
        found.append((op, "loraga", make, lambda a, ours=ours: ours(a)[0], inverse_errors))
        theirs = functools.partial(reference.cholesky_inverse, shift=shift)
        found.append((op, "torch", make, theirs, inverse_errors))
    found += [
        ("small_svd", "loraga", cores, native_core.jacobi_svd, svd_errors),
        ("small_svd", "torch float64", cores, reference.small_svd, svd_errors),
    ]
    drivers = ("gesvd", "gesvdj", "gesvda") if device.type == "cuda" else (None,)
    for driver in drivers:
        found.append(
            (
                "small_svd",
                f"torch float32{f' {driver}' if driver else ''}",
                cores,
                lambda a, driver=driver: torch.linalg.svd(a, driver=driver),
                svd_errors,
            )
        )
    return found


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def measure(device: torch.device, sizes: list[int], batches: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    for op, implementation, make, call, wrong in cases(device):
        for k in sizes:
            for batch in batches:
                matrices = make(batch, k).contiguous().to(device)
                errors = wrong(matrices, call(matrices))
                times = milliseconds(lambda call=call, matrices=matrices: call(matrices), device, repeats)
                row = {
                    "op": op,
                    "implementation": implementation,
                    "k": k,
                    "batch": batch,
                    "milliseconds": statistics.median(times),
                    "milliseconds_20": times[len(times) // 5],
                    "milliseconds_80": times[len(times) * 4 // 5],
                    **errors,
                }
                print(json.dumps(row), file=sys.stderr)
                yield row


def table(result: dict) -> str:
    """Markdown: a row per size, a column per implementation: milliseconds, and the worst error."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["op"] == op]
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        lines += [f"| {op}: k, batch | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for k, batch in dict.fromkeys((row["k"], row["batch"]) for row in rows):
            cells = []
            for name in names:
                (row,) = [r for r in rows if (r["implementation"], r["k"], r["batch"]) == (name, k, batch)]
                error = max(row[key] for key in ("residual", "values", "orthogonality") if key in row)
                cells.append(f"{row['milliseconds']:.2f} ms ({error:.0e})")
            lines.append(f"| {k}, {batch} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 80, 128, 256], help="k")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    device = torch.device(args.device)
    reason = native_core.why_unavailable(device)
    if reason is not None:
        parser.error(reason)
    result: dict[str, Any] = {**_machine.describe(), "native": native_core.build_info(), "rows": []}
    for row in measure(device, args.sizes, args.batches, args.repeats):
        result["rows"].append(row)
        if args.output:
            _machine.save(result, args.output)
    _machine.save(result, args.output)


if __name__ == "__main__":
    main()
