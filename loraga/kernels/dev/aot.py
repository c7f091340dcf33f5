"""Ahead-of-time compilation of every kernel and tuning entry: no GPU needed, spills seen before a user meets them."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraga.kernels import accumulate, commit, random, thin
from loraga.kernels.common import INTERPRETED, Build, sum_builds

FAMILIES = (accumulate, thin, random, commit)
# Shared memory that one program may take, bytes: 86, 89 and 120 run the entries of 80 with less than an A100 has.
SHARED_LIMIT = {80: 99 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, bytes of shared memory a program, bytes spilled a thread."""

    label: str
    arch: int
    num_warps: int
    registers: int
    shared: int
    spilled: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.arch]


def builds(arch: int) -> Iterator[Build]:
    """Every kernel as its launcher may call it on `arch`."""
    for family in FAMILIES:
        yield from family.builds(arch)
    yield from sum_builds()


def compile_number(arch: int, index: int) -> Usage:
    """`compile_build` of the build with this number, for a pool of processes: kernels themselves do not travel."""
    return compile_build(next(itertools.islice(builds(arch), index, None)), arch)


def compile_build(build: Build, arch: int) -> Usage:
    """Compile for compute capability `arch` (such as 90) and read what the machine code takes."""
    if INTERPRETED:
        raise RuntimeError("Kernels cannot be compiled while they are interpreted; unset TRITON_INTERPRET.")
    names = build.kernel.arg_names
    options = {name: value for name, value in build.config.items() if name in ("num_warps", "num_stages")}
    constants = build.constants | {name: value for name, value in build.config.items() if name not in options}
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = {  # allocations begin at multiples of 16 bytes
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in build.multiples and signature[name] != "constexpr")
    }
    compiled = triton.compile(
        ASTSource(
            fn=build.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        ),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(build.label, arch, compiled.metadata.num_warps, registers, int(compiled.metadata.shared), spilled)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread, as the CUDA tools read them from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        said = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        )
    found: dict[str, Any] = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump did not name the resources of the kernel: {said.stdout}")
    return found["REG"], found["STACK"] + found["LOCAL"]


def _cuobjdump() -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else "cuobjdump"
