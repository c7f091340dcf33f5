"""Ahead-of-time compilation of recorded launches, and what their machine code is made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import triton
from triton.backends.compiler import GPUTarget

from loraga.kernels.common import INTERPRETED
from loraga.kernels.dev import sass
from loraga.kernels.dev.devices import MULTIPROCESSORS
from loraga.kernels.dev.launches import Launch
from loraga.kernels.dev.workloads import Build, Case, builds


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes, and what it consists of.

    Attributes:
        kernel, label (`str`): its name, and the first case that launches it.
        operands (`str`): element types of its tensors.
        arch (`int`): compute capability, such as 90.
        uses (`int`): launches of it in all cases.
        programs (`int`): of the first launch.
        num_warps, registers, shared, local (`int`): warps, registers a thread, bytes of shared memory a block, and
            bytes of stack and local memory a thread, which registers are spilled to.
        resident (`int`): blocks that fit on one multiprocessor.
        tensor (`int`): products on tensor cores in the main loop.
        loop (`int`): instructions of the main loop; 0 where there is no loop.
        loads, wide_loads (`int`): loads from global memory in the main loop, or in the whole kernel where there is no
            loop; those of 16 bytes a thread or more.
        asynchronous (`int`): of these loads, those that go to shared memory and pass no register.
        wide_integers (`int`): 64-bit integer instructions in the main loop, which addresses need.
        generic (`int`): accesses in the whole kernel that find out at run time which memory is meant.
        spills (`int`): accesses to local memory in the whole kernel.
    """

    kernel: str
    label: str
    operands: str
    arch: int
    uses: int
    programs: int
    num_warps: int
    registers: int
    shared: int
    local: int
    resident: int
    tensor: int
    loop: int
    loads: int
    wide_loads: int
    asynchronous: int
    wide_integers: int
    generic: int
    spills: int

    @property
    def faults(self) -> tuple[str, ...]:
        """What must not be in any kernel, in words."""
        found = {
            "spills registers": self.local > 0 or self.spills > 0,
            "does not fit on a multiprocessor": self.resident < 1,
            "accesses memory through generic addresses": self.generic > 0,
        }
        return tuple(words for words, is_so in found.items() if is_so)


def compile_build(build: Build, arch: int) -> Usage:
    """Compile for compute capability `arch` and read the machine code.

    Raises:
        RuntimeError: kernels are interpreted.
    """
    if INTERPRETED:
        raise RuntimeError("Kernels cannot be compiled while they are interpreted; unset TRITON_INTERPRET.")
    launch = build.launch
    compiled = triton.compile(launch.source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    code, taken = sass.read(compiled.asm["cubin"])
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    columns = int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    loop = code.main_loop
    part = loop if loop.instructions else code
    return Usage(
        kernel=launch.kernel,
        label=build.label,
        operands=_operands(launch),
        arch=arch,
        uses=build.uses,
        programs=math.prod(launch.grid),
        num_warps=warps,
        registers=taken.registers,
        shared=shared,
        local=taken.local,
        resident=MULTIPROCESSORS[arch].resident(warps, taken.registers, shared, columns),
        tensor=loop.count(lambda i: i.is_tensor),
        loop=len(loop.instructions),
        loads=part.count(lambda i: i.is_global_load),
        wide_loads=part.count(lambda i: i.is_wide_load),
        asynchronous=part.count(lambda i: i.is_asynchronous),
        wide_integers=loop.count(lambda i: i.is_wide_integer),
        generic=code.count(lambda i: i.is_generic),
        spills=code.count(lambda i: i.is_local),
    )


def _operands(launch: Launch) -> str:
    """Element types of the tensors, those of equal neighbours once."""
    types = [kind.lstrip("*k") for kind in launch.signature.values() if kind.startswith("*")]
    return " ".join(kind for i, kind in enumerate(types) if i == 0 or types[i - 1] != kind)


def compile_all(archs: Sequence[int], chosen: Sequence[Case] | None = None, every: bool = True) -> Iterator[Usage]:
    """Compile what `chosen` cases (all of them) need, for each of `archs`; two at a time. `every` is as in `builds`.

    ptxas, a process of its own, is most of the work.
    """
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for arch in archs:
            yield from pool.map(partial(compile_build, arch=arch), builds(arch, chosen, every))
