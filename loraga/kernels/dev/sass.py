"""What the machine code of a kernel consists of, read from its listing.

ptxas promises nothing: a product may become plain multiply-adds, a load may become four narrow ones, and a pointer may
lose the kind of memory that it points to. The CUDA tools, which Triton brings along, list what became of the source.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
_TENSOR = re.compile(r"(H|I|D|Q|O|B|HG|IG|QG|BG|UTCH|UTCI|UTCQ|UTCO)MMA\b")
# Loops of at most so many instructions wait for a barrier.
_WAIT = 6
_BULK = re.compile(r"UTMALDG|UBLKCP|UTMACCTL")  # copies by the tensor memory accelerator: wide and asynchronous


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address (`int`): its place.
        name (`str`): with all modifiers.
        target (`int`, *optional*): where it jumps to, if it is a jump.
        goes_on (`bool`): whether the next instruction may follow it.
    """

    address: int
    name: str
    target: int | None = None
    goes_on: bool = True

    @property
    def is_tensor(self) -> bool:
        """A product on tensor cores."""
        return _TENSOR.match(self.name) is not None

    @property
    def is_global_load(self) -> bool:
        """A load from global memory, into registers or into shared memory."""
        return self.name.startswith(("LDG.", "LDGSTS.")) or _BULK.match(self.name) is not None

    @property
    def is_wide_load(self) -> bool:
        """A load from global memory of 16 bytes a thread or more."""
        return self.is_global_load and (".128" in self.name or _BULK.match(self.name) is not None)

    @property
    def is_asynchronous(self) -> bool:
        """A copy from global to shared memory that passes no register."""
        return self.name.startswith("LDGSTS") or _BULK.match(self.name) is not None

    @property
    def is_generic(self) -> bool:
        """An access that finds out while it runs which memory its address means."""
        return re.match(r"(LD|ST|ATOM)(\.|$)", self.name) is not None

    @property
    def is_local(self) -> bool:
        """An access to a thread's own memory, where registers are spilled to."""
        return self.name.startswith(("LDL", "STL"))

    @property
    def is_wide_integer(self) -> bool:
        """Integer arithmetic of 64 bits, in one instruction or as the upper half of two: that of addresses."""
        return re.match(r"U?(IMAD|IADD3?|LEA|ISETP)\b", self.name) is not None and (
            re.search(r"\.(WIDE|X|64|S64|U64|EX)\b", self.name) is not None
        )


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, in order."""

    instructions: tuple[Instruction, ...]

    @staticmethod
    def parse(listing: str) -> Code:
        """Of a listing by `cuobjdump -sass`."""
        found = []
        for address, predicate, name, operands in _LINE.findall(listing):
            jump = re.search(r"^(.*?)\b0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
            always = not predicate and (jump is None or not jump[1].strip())
            ends = jump is not None or name.startswith(("EXIT", "RET", "BRX", "JMX", "JMP"))
            found.append(Instruction(int(address, 16), name, int(jump[2], 16) if jump else None, not (ends and always)))
        return Code(tuple(found))

    def count(self, is_one: Callable[[Instruction], bool]) -> int:
        """How many instructions are such."""
        return sum(map(is_one, self.instructions))

    @functools.cached_property
    def loops(self) -> tuple[Code, ...]:
        """The natural loops: every path to the end of one leads through its beginning.

        A jump back alone is no sign of a loop: code that waits for a barrier stands behind the end of the kernel, and
        jumps back from there.
        """
        place = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        after: list[list[int]] = []
        for i, instruction in enumerate(self.instructions):
            target = place.get(instruction.target) if instruction.target is not None else None
            following = [i + 1] if instruction.goes_on and i + 1 < len(self.instructions) else []
            after.append(following + ([target] if target is not None else []))
        before: list[list[int]] = [[] for _ in after]
        for i, targets in enumerate(after):
            for target in targets:
                before[target].append(i)
        found, everything = [], _reached([0], after)
        for start in sorted({t for i, targets in enumerate(after) for t in targets if t <= i}):
            reached = _reached([0], after, without=start)
            ends = [i for i in before[start] if i >= start and i in everything - reached]
            if ends:
                body = _reached(ends, before, without=start) & everything | {start}
                found.append(Code(tuple(self.instructions[i] for i in sorted(body))))
        return tuple(found)

    @property
    def main_loop(self) -> Code:
        """Of the loops that contain no other, that with most products on tensor cores, then the longest.

        Empty if there is no loop. What only waits for a barrier is none.
        """
        loops = [loop for loop in self.loops if len(loop.instructions) > _WAIT]
        starts = [loop.instructions[0].address for loop in loops]
        inner = [
            loop
            for loop, own in zip(loops, starts, strict=True)
            if not any(start != own and any(i.address == start for i in loop.instructions) for start in starts)
        ]
        return max(
            inner, key=lambda loop: (loop.count(lambda i: i.is_tensor), len(loop.instructions)), default=Code(())
        )


def _reached(starts: Sequence[int], edges: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """All nodes that paths from `starts` lead to, where no path goes through node `without`."""
    reached: set[int] = set()
    waiting = [start for start in starts if start != without]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(follower for follower in edges[node] if follower != without)
    return reached


@dataclass(frozen=True)
class Resources:
    """What one thread takes: registers, and bytes of stack and local memory."""

    registers: int
    local: int


def read(cubin: bytes) -> tuple[Code, Resources]:
    """Instructions and resources of a compiled kernel.

    Raises:
        RuntimeError: the CUDA tools cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = _said(["-sass", str(path)])
        usage = _said(["--dump-resource-usage", str(path)])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = Code.parse(listing)
    if found.keys() != {"REG", "STACK", "LOCAL"} or not code.instructions:
        raise RuntimeError(f"cuobjdump did not list the kernel and its resources: {usage}\n{listing[:1000]}")
    return code, Resources(found["REG"], found["STACK"] + found["LOCAL"])


def _said(arguments: Sequence[str]) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool) if tool.exists() else "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
