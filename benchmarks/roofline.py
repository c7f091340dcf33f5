"""Each kernel beside the same op in torch and cuBLAS: time, share of the machine's ceilings, error.

    python benchmarks/roofline.py --output results.json               on a GPU: all rows, a few minutes
    python benchmarks/roofline.py --sizes tiny --output results.json  anywhere; kernel rows say why not

First each kernel is checked as at its first use; one that fails gets no row of its own. Ceilings are measured in the
same run: a large device copy (bytes read plus bytes written) and a large bfloat16 matrix product. Bytes count each
operand read once and each result written once, so a share of the copy ceiling of 1 is the least time there is for an op
bound by memory. Errors are against float64, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _machine
import torch
from torch import Tensor

from loraga.estimators import LayerSpec, Streaming, sketch_width
from loraga.linalg import truncated_svd
from loraga.ops import declared
from loraga.ops.selection import TORCH, TRITON
from loraga.ops.triton import selection

GROUP = 8  # layers of one shape that are updated together
PROBES = 16
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
    moved: int
    flops: int
    error: Callable[[Any], float] | None = None
    rival: Callable[[], Any] | None = None


def cases(sizes: list[tuple[int, int, int, int]], device: torch.device) -> Iterator[Case]:
    seen: set[tuple[Any, ...]] = set()  # what depends on fewer sizes comes once
    for tokens, m, n, rank in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            yield accumulation_case(tokens, m, n, dtype, device)
            if (m, n, rank, dtype) not in seen:
                yield svd_case(m, n, rank, dtype, device)
            seen.add((m, n, rank, dtype))
        if (m, n, rank) not in seen:
            yield from update_cases(m, n, rank, device)
        seen.add((m, n, rank))


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)


def accumulation_case(tokens: int, m: int, n: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A micro-batch onto a bfloat16 buffer, beside the product alone, which adds NaN and Inf, too."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (normal(generator, tokens, width, dtype=dtype) for width in (n, m))
    g = torch.zeros(m, n, dtype=torch.bfloat16, device=device)
    sample = slice(0, 64)  # rows of the result that are held against float64
    truth = dy[:, sample].double().mT @ x.double()

    def accumulated() -> Tensor:
        declared.accumulate_(g, x, dy)
        return g

    def error(out: Tensor) -> float:
        out.zero_()
        return relative(accumulated()[sample], truth)

    return Case(
        "accumulate_",
        {"tokens": tokens, "m": m, "n": n},
        dtype,
        accumulated,
        dtype.itemsize * tokens * (m + n) + 4 * m * n,
        2 * tokens * m * n,
        error,
        (lambda: g.addmm_(dy.t(), x)) if dtype == g.dtype else None,
    )


def update_cases(m: int, n: int, rank: int, device: torch.device) -> Iterator[Case]:
    """The ops of a streaming update of a group of layers."""
    generator = torch.Generator(device).manual_seed(0)
    k, b = sketch_width(rank), GROUP
    state, fresh = (
        [normal(generator, b, m, k), normal(generator, b, k, n), normal(generator, b, columns, m).mT]
        for columns in (PROBES, k + PROBES)
    )
    state[2] = state[2].contiguous()
    shape = {"layers": b, "m": m, "n": n, "k": k}
    yield Case(
        "commit_",
        shape,
        torch.float32,
        lambda: declared.commit_(*state, *fresh),
        # the new state is read and written, `left` read once for NaN and Inf, and its probes once more
        4 * b * (2 * m * k + 3 * k * n + m * (k + PROBES) + 3 * m * PROBES),
        0,
    )
    for rows in dict.fromkeys((m, n)):
        y = normal(generator, b, k, rows).mT  # both blocks of an update are stored by columns
        yield Case(
            "basis",
            {"layers": b, "m": rows, "k": k},
            torch.float32,
            lambda y=y: declared.basis(y),
            8 * y.numel(),
            8 * y.numel() * k,
            orthogonality,
            lambda y=y: torch.linalg.qr(y).Q,
        )
    out = torch.empty(n, k, device=device)
    yield Case("test_matrix_", {"n": n, "k": k}, torch.float32, lambda: declared.test_matrix_(out, 1), 4 * n * k, 0)


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
        10 * g.numel() * g.element_size(),
        0,
        lost,
        lambda: torch.svd_lowrank(g.float(), q=q, niter=4),
    )


def relative(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).abs().max() / truth.abs().max())


def orthogonality(q: Tensor) -> float:
    skew = q.double().mT @ q.double() - torch.eye(q.shape[-1], device=q.device)
    return float(torch.linalg.matrix_norm(skew, 2).max())


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


def both(figures: Callable[[], dict[str, float]], op: str | None, problems: dict[str, str]) -> dict[str, Any]:
    """`figures` with torch in place of every kernel, and with the kernels, or why there are none: other rows are worth
    having. `op` is the one that is measured, `None` for all together."""
    with selection.trial(dict.fromkeys(selection.ops, TORCH)):
        found: dict[str, Any] = {"torch": figures()}
    reasons = list(problems.values()) if op is None else [problems[op]]
    if all(reasons):
        return found | {"kernel": f"not measured: {reasons[0]}"}
    usable = {name: TORCH if problem else TRITON for name, problem in problems.items()}
    with selection.trial(usable):
        try:
            found["kernel"] = figures()
        except Exception as error:
            found["kernel"] = f"failed: {type(error).__name__}: {error}"[:500]
    return found


def checked(device: torch.device) -> dict[str, str]:
    """By op, what is wrong with its kernel on `device`: an empty string if nothing is."""
    if device.type != "cuda":
        return dict.fromkeys(selection.ops, "no CUDA device")
    return {op: selection.unmeasured(op, device).reason for op in selection.ops}


def measure(case: Case, device: torch.device, limits: dict[str, float], problems: dict[str, str]) -> dict[str, Any]:
    """The reference, the kernel and the rival of one case, on the same operands."""
    row: dict[str, Any] = {"op": case.op, **case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {"bytes": case.moved}
    row |= {"flops": case.flops}

    def figures() -> dict[str, float]:
        taken = seconds(case.run, device)
        found = {"seconds": taken, "copy_share": case.moved / taken / limits["copy"]}
        found["matmul_share"] = case.flops / taken / limits["matmul"]
        return found if case.error is None else found | {"error": case.error(case.run())}

    row |= both(figures, case.op, problems)
    if case.rival is not None:
        row["rival"] = {"seconds": seconds(case.rival, device)}
        if case.error is not None and case.op != "accumulate_":
            row["rival"]["error"] = case.error(case.rival())
    return row


def update_share(device: torch.device, tokens: int, width: int, problems: dict[str, str]) -> dict[str, Any]:
    """Streaming updates of a group beside the layers' own forward and activation backward, and their launches."""
    generator = torch.Generator(device).manual_seed(0)
    xs, dys = ([normal(generator, tokens, width, dtype=torch.bfloat16) for _ in range(GROUP)] for _ in range(2))
    w = normal(generator, width, width, dtype=torch.bfloat16)
    row: dict[str, Any] = {"layers": GROUP, "tokens": tokens, "width": width, "rank": 16}
    row["layer_seconds"] = seconds(lambda: [(x @ w.t(), dy @ w) for x, dy in zip(xs, dys, strict=True)], device)

    def figures() -> dict[str, float]:
        group = Streaming.together([LayerSpec(f"layer {i}", width, width, 16, i, device) for i in range(GROUP)])
        Streaming.absorb(group, xs, dys)
        taken = seconds(lambda: Streaming.absorb(group, xs, dys), device)
        found = {"seconds": taken, "share": taken / row["layer_seconds"]}
        if device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                Streaming.absorb(group, xs, dys)
                torch.cuda.synchronize()
            # calls of the runtime, such as cudaLaunchKernel, are events of the host beside those that they start
            started = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            found["launches"] = sum(event.count for event in started)
            found["gpu_seconds"] = sum(event.self_device_time_total for event in started) / 1e6
        return found

    return row | both(figures, None, problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--ops", nargs="*", choices=selection.ops)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    problems = checked(device)
    print(json.dumps({"checks": problems}), flush=True)
    limits = ceilings(device)
    result: dict[str, Any] = {**_machine.describe(), "checks": problems, "ceilings": limits, "rows": []}
    widths = [(1024, 4096), (8192, 4096)] if args.sizes == "full" else [(256, 256)]
    result["updates"] = [update_share(device, tokens, width, problems) for tokens, width in widths]
    for case in cases(SIZES[args.sizes], device):
        if not args.ops or case.op in args.ops:
            result["rows"].append(measure(case, device, limits, problems))
            print(json.dumps(result["rows"][-1]), flush=True)
            if args.output:
                _machine.save(result, args.output)
    _machine.save(result, args.output)


if __name__ == "__main__":
    main()
