"""Search for block sizes on the GPU at hand, on request only: `python -m loraga.kernels.dev tune`.

Every candidate is checked against the table's present entry before it is timed, so a miscompiled one cannot win. The
winners replace the entries of this compute capability in tuning.json, beside the name of the device.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from tqdm.auto import tqdm

from loraga.kernels import accumulate, thin, tuning
from loraga.kernels.common import arch_of

_TOKENS, _WIDTH = 4096, 4096


def candidates(kernel: str, columns: int) -> Iterator[dict[str, int]]:
    """Block sizes worth trying, in a fixed order."""
    rows, inner, warps, stages = (32, 64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3, 4)
    if kernel == "accumulate":
        for m, n, t, w, s in itertools.product((64, 128), (64, 128, 256), (32, 64), warps, (3, 4)):
            yield dict(BLOCK_M=m, BLOCK_N=n, BLOCK_T=t, GROUP=8, num_warps=w, num_stages=s)
        return
    for outer, depth, w, s in itertools.product(rows, inner, warps, stages):
        if outer * columns <= 2**15:  # float32 sums have to fit into registers
            if kernel == "fold":
                yield dict(BLOCK_M=outer, BLOCK_T=depth, BLOCK_K=columns, BLOCK_I=16, num_warps=w, num_stages=s)
            else:
                yield dict(BLOCK_T=outer, BLOCK_N=depth, BLOCK_K=columns, num_warps=w, num_stages=s)


def workload(kernel: str, dtype: torch.dtype, columns: int, device: torch.device) -> Callable[[], Tensor]:
    """A call of the launcher with operands of a 7B model's size; returns its result."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    a = normal(1, _TOKENS, _WIDTH)
    if kernel == "accumulate":
        g, dy = torch.zeros(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device), normal(_TOKENS, _WIDTH)

        def run() -> Tensor:
            g.zero_()
            accumulate.accumulate(g, a[0], dy)
            return g

        return run
    if kernel == "draw":
        return lambda: thin.project(a, None, seeds=[1], k=columns)
    if kernel == "project":
        b = normal(1, _WIDTH, columns)
        return lambda: thin.project(a, b, out_dtype=dtype)
    p = normal(1, _TOKENS, columns)
    return lambda: thin.fold(a, p)


def fastest(kernel: str, dtype: torch.dtype, columns: int, present: dict[str, int], stop: float) -> dict[str, int]:
    """The candidate that takes the least time among those that give what the table's entry gives."""
    run = workload(kernel, dtype, columns, torch.device("cuda"))
    with tuning.using(kernel, present):
        expected = run().float()
        best, least = present, triton.testing.do_bench(run)
    for config in candidates(kernel, columns):
        if time.monotonic() > stop:
            break
        with tuning.using(kernel, config):
            try:
                error = (run().float() - expected).norm() / expected.norm()
                taken = triton.testing.do_bench(run) if error < 1e-2 else float("inf")
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
                continue
        if taken < least:
            best, least = config, taken
    return best


def tune(seconds: float) -> None:
    """Search for at most about `seconds` and rewrite tuning.json.

    Raises:
        RuntimeError: there is no CUDA device, or one whose kind borrows another's entries.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("Tuning measures, and there is no CUDA device here.")
    device = torch.device("cuda", torch.cuda.current_device())
    if arch_of(device) not in tuning.ARCHITECTURES:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} (sm_{arch_of(device)}) runs the entries of "
            f"sm_{tuning.known(arch_of(device))}, which are tuned on such a device: {list(tuning.ARCHITECTURES)}."
        )
    arch = str(arch_of(device))
    table = json.loads(tuning.TABLE.read_text())
    jobs = [
        (kernel, dtype, columns)
        for kernel in table["kernels"]
        for dtype in (torch.bfloat16, torch.float32)
        for columns, _ in tuning.entries(kernel, dtype, int(arch))
    ]
    for kernel, dtype, columns in tqdm(jobs, desc="loraga: tuning", unit="entry"):
        rows = table["kernels"][kernel][str(8 * dtype.itemsize)][arch]
        stop = time.monotonic() + seconds / len(jobs)
        rows[str(columns)] = fastest(kernel, dtype, columns, rows[str(columns)], stop)
    table["devices"][arch] = torch.cuda.get_device_name(device)
    tuning.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    tuning.table.cache_clear()
