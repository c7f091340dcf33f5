"""Each kernel beside the best composition of torch and cuBLAS: time, share of the machine's ceilings, error.

    python benchmarks/roofline.py --output results.json               on a GPU: all rows, a few minutes
    python benchmarks/roofline.py --sizes tiny --output results.json  anywhere; kernel rows say why not
    python benchmarks/roofline.py --wins results.json                rewrite loraga/kernels/wins.json from a result file

Ceilings are measured in the same run: a large device copy (bytes read plus bytes written) and a large bfloat16 matrix
product. Bytes count each operand read once and each result written once, so a share of the copy ceiling of 1 is the
least time there is for an op bound by memory. Errors are against float64, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _machine
import torch
from torch import Tensor

from loraga.estimators import LayerSpec, Streaming
from loraga.linalg import truncated_svd
from loraga.ops import declared
from loraga.ops import triton as dispatch

WINS = Path(__file__).parents[1] / "loraga" / "kernels" / "wins.json"
# (tokens, m, n, rank of the sketch's triplets): layers of Llama-2-7B, Llama-3-8B (k, v of GQA) and MiniLM
SIZES = {
    "full": [
        (1024, 4096, 4096, 16),
        (8192, 4096, 4096, 16),
        (8192, 11008, 4096, 16),
        (8192, 4096, 11008, 16),
        (8192, 1024, 4096, 16),
        (8192, 4096, 4096, 64),
        (4096, 384, 1536, 16),
    ],
    "tiny": [(256, 96, 128, 4)],
}


@dataclass
class Case:
    """One op at one size. `rival` is what torch offers for the same thing where that is not the reference itself."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    run: Callable[[], Any]
    large: tuple[Tensor, ...]  # the operands that the dispatcher weighs
    moved: int
    flops: int
    error: Callable[[Any], float] | None = None
    rival: Callable[[], Any] | None = None


def cases(sizes: list[tuple[int, int, int, int]], device: torch.device) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    sample = slice(0, 64)  # rows of the result that are held against float64
    seen: set[tuple[Any, ...]] = set()  # what depends on fewer sizes than the products comes once
    for tokens, m, n, rank in sizes:
        k = max(4 * rank, rank + 64)
        for dtype in (torch.bfloat16, torch.float32):
            shape = {"tokens": tokens, "m": m, "n": n, "k": k}
            item = dtype.itemsize
            x, dy = normal(tokens, n, dtype=dtype), normal(tokens, m, dtype=dtype)
            v, q, z = normal(n, k + 8), normal(m, k), normal(k, n)
            zv, c = normal(k, k), normal(k, k)
            left = dy[:, sample].double().mT @ (x.double() @ v.to(dtype).double())
            left[:, :k] += q[sample].double() @ zv.double()
            yield Case(
                "left_product",
                shape,
                dtype,
                lambda x=x, dy=dy, v=v, q=q, zv=zv: declared.left_product(x, dy, v, onto=(q, zv)),
                (x, dy),
                item * tokens * (m + n) + 4 * (n * (k + 8) + m * (2 * k + 8)),
                2 * tokens * (k + 8) * (m + n) + 2 * m * k * k,
                lambda out, truth=left: relative(out[sample], truth),
            )
            right = (dy.double() @ q.to(dtype).double()).mT @ x[:, sample].double() + c.double() @ z[:, sample].double()
            yield Case(
                "right_product",
                shape,
                dtype,
                lambda x=x, dy=dy, q=q, c=c, z=z: declared.right_product(x, dy, q, onto=(c, z)),
                (x, dy),
                item * tokens * (m + n) + 4 * (m * k + 2 * n * k),
                2 * tokens * k * (m + n) + 2 * n * k * k,
                lambda out, truth=right: relative(out[:, sample], truth),
            )
            g = torch.zeros(m, n, dtype=torch.bfloat16, device=device)
            product = dy[:, sample].double().mT @ x.double()

            def accumulated(g: Tensor = g, x: Tensor = x, dy: Tensor = dy) -> Tensor:
                declared.accumulate_(g, x, dy)
                return g

            def accumulation_error(out: Tensor, truth: Tensor = product, run: Callable = accumulated) -> float:
                out.zero_()
                return relative(run()[sample], truth)

            yield Case(
                "accumulate_",
                shape,
                dtype,
                accumulated,
                (x, dy, g),
                item * tokens * (m + n) + 4 * m * n,
                2 * tokens * m * n,
                accumulation_error,
                (lambda g=g, x=x, dy=dy: g.addmm_(dy.t(), x)) if dtype == g.dtype else None,
            )
            state = [normal(m, k), normal(k, n), normal(m, 8)]
            fresh = [normal(m, k), normal(k, n), normal(m, k + 8)]
            if dtype == torch.float32 and (m, n, k) not in seen:
                seen.add((m, n, k))
                yield Case(
                    "commit_",
                    shape,
                    dtype,
                    lambda s=state, f=fresh: declared.commit_(*s, *f),
                    (state[0], state[1]),
                    4 * (3 * m * k + 3 * k * n + 4 * m * 8),
                    0,
                )
                y = normal(m, k)
                yield Case(
                    "orthonormalize",
                    {"m": m, "k": k},
                    dtype,
                    lambda y=y: declared.orthonormalize(y, refine=True),
                    (y,),
                    8 * m * k,
                    8 * m * k * k,
                    orthogonality,
                    lambda y=y: torch.linalg.qr(y).Q,
                )
                out = torch.empty(n, k, device=device)
                yield Case(
                    "test_matrix_",
                    {"n": n, "k": k},
                    dtype,
                    lambda out=out: declared.test_matrix_(out, 1),
                    (out,),
                    4 * n * k,
                    0,
                )
            if (m, n, rank, dtype) not in seen:
                seen.add((m, n, rank, dtype))
                yield svd_case(m, n, rank, dtype, device)


@functools.cache
def falling(m: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A matrix with a slowly falling spectrum, and its squared singular values in falling order, float64.

    As eigenvalues of its smaller Gram matrix, exact to all digits that count here: a GPU takes seconds for them, and
    minutes for the singular values themselves.
    """
    generator = torch.Generator(device).manual_seed(0)
    inner = min(m, n, 512)
    spectrum = (1 + torch.arange(inner, device=device)).float() ** -0.7
    left, right = (torch.randn(size, inner, generator=generator, device=device) for size in (m, n))
    g = ((left * spectrum) @ right.mT / inner).to(dtype)
    wide = g.double() if m <= n else g.double().mT
    return g, torch.linalg.eigvalsh(wide @ wide.mT).flip(0)


def svd_case(m: int, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Truncated SVD beside `torch.svd_lowrank` of twice the rank."""
    g, squares = falling(m, n, dtype, device)
    exact = squares[:rank].sum()

    def lost(factors: Any) -> float:
        u, vh = (factors.U, factors.Vh) if hasattr(factors, "Vh") else (factors[0][:, :rank], factors[2][:, :rank].mT)
        core = u.double().mT @ g.double() @ vh.double().mT
        return float(1 - core.square().sum() / exact)

    q = min(2 * rank, m, n)
    return Case(
        "subspace",
        {"m": m, "n": n, "rank": rank},
        dtype,
        lambda: truncated_svd(g, rank, seed=1),
        (g[None],),
        10 * g.numel() * g.element_size(),
        0,
        lost,
        lambda: torch.svd_lowrank(g.float(), q=q, niter=4),
    )


def relative(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).abs().max() / truth.abs().max())


def orthogonality(q: Tensor) -> float:
    return float(torch.linalg.matrix_norm(q.double().mT @ q.double() - torch.eye(q.shape[1], device=q.device), 2))


def seconds(run: Callable[[], Any], device: torch.device, budget: float = 0.15) -> float:
    """Median of one call; operands of 7B layers do not fit into the L2 cache, so each call reads them anew."""
    run()
    started, times = time.perf_counter(), []
    while len(times) < 5 or (time.perf_counter() - started < budget and len(times) < 200):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            run()
            times.append(time.perf_counter() - before)
    return statistics.median(times)


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy, operations a second of a bfloat16 matrix product."""
    big, side = (2**30, 8192) if device.type == "cuda" else (2**24, 512)
    source = torch.ones(big // 4, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).bfloat16()
    return {
        "copy": 2 * big / seconds(lambda: target.copy_(source), device),
        "matmul": 2 * side**3 / seconds(lambda: a @ a, device),
    }


def both(figures: Callable[[], dict[str, float]], device: torch.device) -> dict[str, Any]:
    """`figures` of the reference, and of the kernel or why there are none: other rows are worth having."""
    os.environ["LORAGA_TRITON"] = "0"
    found: dict[str, Any] = {"torch": figures(), "kernel": "not measured: no CUDA device"}
    if device.type == "cuda":
        os.environ["LORAGA_TRITON"] = "1"
        try:
            found["kernel"] = figures()
        except Exception as error:
            found["kernel"] = f"failed: {type(error).__name__}: {error}"[:500]
    return found


def measure(case: Case, device: torch.device, limits: dict[str, float]) -> dict[str, Any]:
    """The reference, the kernel and the rival of one case, on the same operands."""
    row: dict[str, Any] = {"op": case.op, **case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {"large_bytes": sum(t.numel() * t.element_size() for t in case.large), "bytes": case.moved}
    row |= {"flops": case.flops}

    def figures() -> dict[str, float]:
        taken = seconds(case.run, device)
        found = {"seconds": taken, "copy_share": case.moved / taken / limits["copy"]}
        found["matmul_share"] = case.flops / taken / limits["matmul"]
        return found if case.error is None else found | {"error": case.error(case.run())}

    row |= both(figures, device)
    if case.rival is not None:
        row["rival"] = {"seconds": seconds(case.rival, device)}
        if case.error is not None and case.op != "accumulate_":
            row["rival"]["error"] = case.error(case.rival())
    return row


def update_share(device: torch.device, tokens: int, width: int) -> dict[str, Any]:
    """A streaming update beside the layer's own forward and activation backward, and what it is made of: launches."""
    x, dy = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
    w = torch.randn(width, width, device=device).bfloat16()
    row: dict[str, Any] = {"tokens": tokens, "width": width, "rank": 16}
    row["layer_seconds"] = seconds(lambda: (x @ w.t(), dy @ w), device)

    def figures() -> dict[str, float]:
        estimator = Streaming(LayerSpec("layer", width, width, 16, 1, device), 4)
        estimator.update(x, dy)
        taken = seconds(lambda: estimator.update(x, dy), device)
        found = {"seconds": taken, "share": taken / row["layer_seconds"]}
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                estimator.update(x, dy)
                torch.cuda.synchronize()
            # calls of the runtime, such as cudaLaunchKernel, are events of the host beside those that they start
            started = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            found["launches"] = sum(event.count for event in started)
            found["gpu_seconds"] = sum(event.self_device_time_total for event in started) / 1e6
        return found

    return row | both(figures, device)


def won(result: dict[str, Any]) -> dict[str, Any]:
    """wins.json from a result file: per op and width of its operands the ranges of sizes in which the kernel won.

    Sizes between two measured wins count as won; beyond the measured ones nothing does, and a kernel whose error is
    more than three times the reference's never wins.
    """
    sizes: dict[tuple[str, str], list[tuple[int, bool]]] = {}
    for row in result["rows"]:
        if not isinstance(row.get("kernel"), dict):
            continue
        faster = row["kernel"]["seconds"] < min(row[name]["seconds"] for name in ("torch", "rival") if name in row)
        sound = row["kernel"].get("error", 0.0) <= 3 * row["torch"].get("error", 0.0) + 1e-6
        bits = str(8 * getattr(torch, row["dtype"]).itemsize)
        sizes.setdefault((row["op"], bits), []).append((row["large_bytes"], faster and sound))
    table: dict[str, Any] = {}
    for (op, bits), measured in sizes.items():
        ranges: list[list[int]] = []
        lost = {size for size, win in measured if not win}
        last = False
        for size in sorted({size for size, _ in measured}):
            win = size not in lost
            if win and last:
                ranges[-1][1] = size
            elif win:
                ranges.append([size, size])
            last = win
        if ranges:
            table.setdefault(op, {}).setdefault(str(result["arch"]), {})[bits] = ranges
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--ops", nargs="*", choices=list(dispatch.LAUNCHERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--wins", type=Path, help="rewrite wins.json from this result file and do nothing else")
    args = parser.parse_args()
    if args.wins:
        measured = won(json.loads(args.wins.read_text()))
        table = json.loads(WINS.read_text())
        for op, archs in measured.items():
            table.setdefault(op, {}).update(archs)
        WINS.write_text(json.dumps(table, indent=1) + "\n")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = ceilings(device)
    major, minor = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    result: dict[str, Any] = {**_machine.describe(), "arch": 10 * major + minor, "ceilings": limits, "rows": []}
    widths = [(4096, 4096), (1024, 4096)] if args.sizes == "full" else [(256, 256)]
    result["updates"] = [update_share(device, tokens, width) for tokens, width in widths]
    for case in cases(SIZES[args.sizes], device):
        if not args.ops or case.op in args.ops:
            result["rows"].append(measure(case, device, limits))
            print(json.dumps(result["rows"][-1]), flush=True)
            if args.output:
                _machine.save(result, args.output)
    _machine.save(result, args.output)


if __name__ == "__main__":
    main()
