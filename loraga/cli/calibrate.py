"""`loraga calibrate`: times whole updates on the GPU of this machine, with and without the kernel of each op.

A kernel stays in use if the update that it is part of is at least a tenth faster with it, in two rounds. The choices
are stored in the user's cache directory (`loraga.ops.calibration`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loraga._messages import one_line
from loraga.cli.rows import InputError
from loraga.estimators import Dense, LayerSpec, Streaming
from loraga.linalg import truncated_svd
from loraga.ops import calibration
from loraga.ops.device_facts import DeviceFacts, facts_of
from loraga.ops.selection import TORCH, TRITON, Choice, Selection
from loraga.ops.triton import selection

ROUNDS = 2
REPEATS = 15
WIN = 0.9  # a kernel wins a round if its update takes at most this share of the time without it
# The layers that are timed: those of a 7B model, as many as are updated together.
_LAYERS, _WIDTH, _TOKENS, _RANK = 8, 4096, 1024, 16

# seconds(step) runs a step and says how long that took
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Step:
    """A whole step of an initialisation, and the ops that it shows the worth of."""

    name: str
    ops: tuple[str, ...]
    run: Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """What was found for one op.

    Attributes:
        runs (`str`): the choice, "triton" or "torch".
        reason (`str`): why; of the kernels that were timed, how they did.
        step (`str`): what was timed; empty if nothing was.
        triton, torch (`tuple[float, ...]`): seconds with and without the kernel, the median of each round.
    """

    runs: str
    reason: str
    step: str = ""
    triton: tuple[float, ...] = ()
    torch: tuple[float, ...] = ()


def calibrate(show: Callable[[str], object] = print) -> None:
    """Measure every kind of CUDA device that torch sees, and store the choices.

    Raises:
        InputError: there is no CUDA device, none that kernels can run on, too little memory on one, or the file cannot
            be written.
    """
    kinds: dict[DeviceFacts, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        kinds.setdefault(facts_of(device), device)
    if not kinds:
        raise InputError("calibrate measures on a CUDA device, and torch sees none here; nothing was written.")
    obstacles = [f"{facts.name}: {facts.obstacle}" for facts in kinds if facts.obstacle]
    if len(obstacles) == len(kinds):
        raise InputError(f"there is no kernel to measure on {'; '.join(obstacles)}; nothing was written.")
    for facts, device in kinds.items():
        show(f"{device}: {facts.name}")
        if facts.obstacle:
            show(f"  left out: {facts.obstacle}")
            continue
        try:
            with torch.cuda.device(device):
                outcomes = measure(selection, device, steps(device), seconds_on(device), show)
        except torch.OutOfMemoryError as error:
            raise InputError(f"{device} has too little free memory to measure: {one_line(error)}") from error
        show(f"  stored in {_stored(facts, outcomes)}")


def _stored(facts: DeviceFacts, outcomes: dict[str, Outcome]) -> Path:
    choices = {op: outcome.runs for op, outcome in outcomes.items()}
    try:
        return calibration.store(facts, choices, {op: asdict(outcome) for op, outcome in outcomes.items()})
    except (OSError, RuntimeError) as error:
        raise InputError(f"the choices cannot be stored: {one_line(error)}; set XDG_CACHE_HOME.") from error


def measure(
    selection: Selection,
    device: torch.device,
    steps: Sequence[Step],
    seconds: Clock,
    show: Callable[[str], object],
) -> dict[str, Outcome]:
    """What to choose for each op on `device`. Each op is timed while all other usable kernels are on.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    usable = {op: _usable(op, step, selection, device) for step in steps for op in step.ops}
    others = {op: choice.runs for op, choice in usable.items()}
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        for op in step.ops:
            if usable[op].runs == TORCH:
                outcomes[op] = Outcome(TORCH, usable[op].reason)
            else:
                outcomes[op] = _compared(op, step, selection, others, seconds)
            show(f"  {op:<14}{outcomes[op].runs:<8}{outcomes[op].reason}")
    return outcomes


def _usable(op: str, step: Step, selection: Selection, device: torch.device) -> Choice:
    """Whether the kernel of `op` passes its check, and runs `step`, whose sizes are larger than those of the check."""
    choice = selection.unmeasured(op, device)
    if choice.runs == TORCH:
        return choice
    try:
        with selection.trial(dict.fromkeys(selection.ops, TORCH) | {op: TRITON}):  # any other error is another kernel's
            step.run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Choice(TORCH, f"{type(error).__name__}: {one_line(error)}", failed=True)
    return choice


def _compared(op: str, step: Step, selection: Selection, others: dict[str, str], seconds: Clock) -> Outcome:
    def timed(runs: str) -> float:
        with selection.trial(others | {op: runs}):
            return seconds(step.run)

    def of_a_round() -> Iterator[float]:
        pairs = [(timed(TRITON), timed(TORCH)) for _ in range(REPEATS)]  # in turn, so that both see the same clocks
        yield from map(median, zip(*pairs, strict=True))

    timed(TRITON)  # what is compiled or cached at the first call
    timed(TORCH)
    rounds = [tuple(of_a_round()) for _ in range(ROUNDS)]
    kernel, without = (tuple(times) for times in zip(*rounds, strict=True))
    won = all(one <= WIN * other for one, other in rounds)
    spans = ", ".join(f"{1e3 * one:.3g} against {1e3 * other:.3g} ms" for one, other in rounds)
    reason = f"{'won' if won else 'not a tenth faster twice'}: {step.name} in {spans}"
    return Outcome(TRITON if won else TORCH, reason, step.name, kernel, without)


def steps(device: torch.device) -> list[Step]:
    """The steps that are timed: between them they run every op that has a kernel."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    specs = [LayerSpec(f"layer {i}", _WIDTH, _WIDTH, _RANK, i, device) for i in range(_LAYERS)]
    xs, dys = ([normal(_TOKENS, _WIDTH) for _ in specs] for _ in range(2))
    sketches = Streaming.together(specs)
    dense = Dense(specs[0], torch.bfloat16)
    gradients = torch.stack([dy.t() @ x for x, dy in zip(xs, dys, strict=True)])
    return [
        Step(
            f"the first update of {_LAYERS} layers",
            ("test_matrix_",),
            lambda: Streaming.absorb(Streaming.together(specs), xs, dys),
        ),
        Step(f"an update of {_LAYERS} layers", ("basis", "commit_"), lambda: Streaming.absorb(sketches, xs, dys)),
        Step("an update of a dense buffer", ("accumulate_",), lambda: dense.update(xs[0], dys[0])),
        Step(
            f"the truncated SVD of {_LAYERS} gradients",
            ("subspace",),
            lambda: truncated_svd(gradients, _RANK, seed=range(_LAYERS)),
        ),
    ]


def seconds_on(device: torch.device) -> Clock:
    """A clock for steps on a CUDA device: host time from the call until the device is idle again."""

    def seconds(step: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return seconds
