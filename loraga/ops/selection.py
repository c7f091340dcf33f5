"""Which implementation runs an op on a CUDA device: its Triton kernel, or torch.

The first of these that says something decides (docs/kernels.md, "Which implementation runs"): another rank that takes
torch, LORAGA_TRITON, what is known of the device, the file of `loraga calibrate`, the check of the kernel at its first
use. No choice depends on a measurement unless the user has run `loraga calibrate`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from loraga._messages import one_line
from loraga.ops.device_facts import DeviceFacts

TRITON, TORCH = "triton", "torch"


class Ranks(Protocol):
    """What `Selection.agree` needs of `loraga.distributed.ranks.Ranks`."""

    size: int

    def any(self, here: bool) -> bool: ...
    def gather(self, numbers: Sequence[Sequence[int]], device: torch.device) -> list[list[list[int]]]: ...


@dataclass(frozen=True)
class Choice:
    """What runs an op on a device: `"triton"` or `"torch"`, and why it is torch.

    `failed` is set where the kernel was tried and cannot be used, of which the user is warned.
    """

    runs: str
    reason: str = ""
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.runs}: {self.reason}" if self.reason else self.runs


def forced() -> str | None:
    """The implementation that LORAGA_TRITON asks for; `None` where it is unset.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("LORAGA_TRITON", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LORAGA_TRITON={value!r} is not known; set it to 0 or 1, or leave it unset.")
    return {"": None, "0": TORCH, "1": TRITON}[value]


def decide(op: str, facts: DeviceFacts, calibrated: Mapping[str, str], problem: Callable[[], str]) -> Choice:
    """The choice for an op where LORAGA_TRITON is unset.

    Args:
        op (`str`): its name.
        facts (`DeviceFacts`): of the device.
        calibrated (mapping of `str` to `str`): "triton" or "torch" by op, from the file of `loraga calibrate`.
        problem (callable): runs the kernel and says what is wrong with it, or returns an empty string. It is called
            only if nothing before it decides.
    """
    if facts.obstacle:
        return Choice(TORCH, facts.obstacle)
    if calibrated.get(op) == TORCH:
        return Choice(TORCH, "loraga calibrate found the kernel not faster")
    found = problem()
    return Choice(TORCH, found, failed=True) if found else Choice(TRITON)


class Selection:
    """The choices of this process, by op and device. A choice is made once, at `agree` or at the op's first use.

    Args:
        ops (iterable of `str`): the ops that have a kernel.
        problem (callable): problem(op, device) runs the kernel and says what is wrong with it, or returns "".
        facts_of (callable): the `DeviceFacts` of a device.
        calibrated (callable): calibrated(facts, ops) is "triton" or "torch" by op, or empty.
    """

    def __init__(
        self,
        ops: Iterable[str],
        problem: Callable[[str, torch.device], str],
        facts_of: Callable[[torch.device], DeviceFacts],
        calibrated: Callable[[DeviceFacts, Iterable[str]], Mapping[str, str]],
    ) -> None:
        self.ops = tuple(ops)
        self._problem, self._facts_of, self._calibrated = problem, facts_of, calibrated
        self._known: dict[tuple[str, torch.device], Choice] = {}
        self._elsewhere: frozenset[str] = frozenset()
        self._trial: dict[str, str] = {}
        self._devices: tuple[torch.device, ...] = ()

    def chosen(self, op: str, device: torch.device) -> Choice:
        """What runs `op` on `device` now. Kernels that were never used on `device` are checked first.

        Raises:
            ValueError: LORAGA_TRITON is neither 0 nor 1.
        """
        if op in self._trial:
            return Choice(self._trial[op])
        setting = forced()
        if setting is not None:
            own = Choice(setting, "LORAGA_TRITON=0" if setting == TORCH else "")
        else:
            if (op, device) not in self._known:
                self._decide(device)
            own = self._known[op, device]
        return Choice(TORCH, "another rank takes torch") if own.runs == TRITON and op in self._elsewhere else own

    def agree(self, ranks: Ranks, devices: Iterable[torch.device]) -> None:
        """Make the choices for `devices` now, and take torch for every op that any rank takes torch for.

        Every rank calls this before its first batch, with the devices that it will use, in a context in which float32
        products are not rounded. Devices other than CUDA's have no kernels and are left out.

        Raises:
            ValueError: LORAGA_TRITON is neither 0 nor 1.
        """
        self._elsewhere = frozenset()
        self._devices = tuple(sorted({d for d in devices if d.type == "cuda"}, key=lambda d: d.index or 0))
        here = [any(self.chosen(op, device).runs == TORCH for device in self._devices) for op in self.ops]
        if ranks.size == 1 or not ranks.any(any(here)):
            return
        tables = ranks.gather([[int(falls_back) for falls_back in here]], (*self._devices, torch.device("cpu"))[0])
        self._elsewhere = frozenset(op for i, op in enumerate(self.ops) if any(table[0][i] for table in tables))

    def gives_up(self, op: str, device: torch.device, error: Exception) -> bool:
        """Whether torch is to run `op` on `device` from now on, because its kernel raised `error` there.

        Not where the kernel was asked for: then the user sees the error.
        """
        if op in self._trial or forced() == TRITON:
            return False
        self._known[op, device] = Choice(TORCH, f"{type(error).__name__}: {one_line(error)}", failed=True)
        _warn(device, [op], self._known[op, device].reason)
        return True

    def report(self, devices: Iterable[torch.device] | None = None) -> dict[str, dict[str, str]]:
        """What runs each op, by device and op: "triton", or "torch: " and the reason.

        `devices` are those of the last `agree` if they are left out.
        """
        of = self._devices if devices is None else devices
        return {str(device): {op: str(self.chosen(op, device)) for op in self.ops} for device in of}

    def unmeasured(self, op: str, device: torch.device) -> Choice:
        """The choice that there would be without LORAGA_TRITON and without a file of `loraga calibrate`."""
        return decide(op, self._facts_of(device), {}, lambda: self._problem(op, device))

    @contextmanager
    def trial(self, runs: Mapping[str, str]) -> Iterator[None]:
        """Context in which `runs` ("triton" or "torch" by op) decides, whatever was chosen."""
        before, self._trial = self._trial, dict(runs)
        try:
            yield
        finally:
            self._trial = before

    def _decide(self, device: torch.device) -> None:
        """Make the choice of every op on `device`, and warn of kernels that fail: once for each reason."""
        facts = self._facts_of(device)
        calibrated = self._calibrated(facts, self.ops)
        failed: dict[str, list[str]] = {}
        for op in self.ops:
            if (op, device) in self._known:
                continue
            choice = decide(op, facts, calibrated, lambda op=op: self._problem(op, device))  # type: ignore[misc]
            self._known[op, device] = choice
            if choice.failed:
                failed.setdefault(choice.reason, []).append(op)
        for reason, ops in failed.items():
            _warn(device, ops, reason)


def _warn(device: torch.device, ops: Sequence[str], reason: str) -> None:
    kernels = "The Triton kernels of" if len(ops) > 1 else "The Triton kernel of"
    warnings.warn(
        f"{kernels} {', '.join(ops)} cannot be used on {device} ({reason}); torch runs there instead, which is right "
        "and may be slower. LORAGA_TRITON=0 does so without a try, LORAGA_TRITON=1 takes the kernels and shows the "
        "whole error.",
        stacklevel=4,
    )
