"""Pairs (x, dy) that wait for those of other layers of their shape, so that these layers are updated together.

On a GPU an update of one layer takes about fifty small operations beside its four large products, and the host needs
longer to launch them than the device to compute them. For layers of one shape they are batched
(`Streaming.absorb`), so their number is divided by the number of layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraga.estimators.streaming import Streaming

# Upper limit in bytes, on one device, for waiting pairs and the temporaries of the update of the largest group.
WAITING_BYTES = 2**29
# Upper bound of these temporaries, as a multiple of the group's state.
WORKING_STATES = 5

# Labels of pairs, and a bool tensor on their device with one entry per label: True where the pair entered the sum.
Outcome = tuple[list[Any], Tensor]


@dataclass(frozen=True)
class _Pair:
    label: Hashable
    streaming: Streaming
    x: Tensor
    dy: Tensor
    scale: float
    version: int  # of x


class Pending:
    """The pairs that wait on one device. `add` and `flush` return the outcomes of those that wait no more.

    Args:
        limit (`int`): bytes that pairs and the update of a group may take. A pair that takes more than half of that is
            absorbed at once.
    """

    def __init__(self, limit: int = WAITING_BYTES) -> None:
        self._limit = limit
        self._groups: defaultdict[Hashable, list[_Pair]] = defaultdict(list)
        # bytes, kept up to date because `add` runs for every layer: of x by storage, and by group of dy and the update
        self._inputs: dict[int, int] = {}
        self._copies: defaultdict[Hashable, int] = defaultdict(int)
        self._working: defaultdict[Hashable, int] = defaultdict(int)

    def __len__(self) -> int:
        """How many pairs wait."""
        return sum(map(len, self._groups.values()))

    def add(self, label: Hashable, streaming: Streaming, x: Tensor, dy: Tensor, scale: float = 1.0) -> list[Outcome]:
        """Let a pair wait, and absorb groups until there is room for it, the largest first.

        It is a copy of dy that waits: some modules overwrite a gradient in place once autograd has handed it to them
        (the RMSNorm of Liger). x is an activation that autograd has saved, which nobody may change.

        Raises:
            RuntimeError: an op of torch has changed the x of a pair while it waited.
        """
        outcomes: list[Outcome] = []
        for key in [key for key, group in self._groups.items() if any(pair.streaming is streaming for pair in group)]:
            outcomes += self._absorb(key)  # the layer was called before in this backward
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        key = streaming.place[0], x.dtype, scale, stream
        working = WORKING_STATES * streaming.state_bytes
        if 2 * (pair_bytes(x, dy) + working) > self._limit:
            outcomes += self._absorb(key)
            return outcomes + _absorbed([_Pair(label, streaming, x, dy, scale, x._version)], stream)
        while self._groups and not self._has_room(key, x, dy, working):
            outcomes += self._absorb(max(self._groups, key=lambda group: self._waiting(group) + self._working[group]))
        self._groups[key].append(_Pair(label, streaming, x, dy.clone(), scale, x._version))
        self._inputs[_storage(x)] = x.untyped_storage().nbytes()
        self._copies[key] += pair_bytes(None, dy)
        self._working[key] += working
        return outcomes

    def flush(self) -> list[Outcome]:
        """Absorb all pairs that wait. Raises RuntimeError as `add` does."""
        return [outcome for key in list(self._groups) for outcome in self._absorb(key)]

    def clear(self) -> None:
        """Forget all pairs that wait."""
        for waiting in (self._groups, self._inputs, self._copies, self._working):
            waiting.clear()

    def _has_room(self, key: Hashable, x: Tensor, dy: Tensor, working: int) -> bool:
        """Whether a pair can wait in the group `key`, whose update then takes `working` bytes more."""
        held = sum(self._inputs.values()) + sum(self._copies.values())
        held += pair_bytes(None if _storage(x) in self._inputs else x, dy)
        largest = max(self._working.get(key, 0) + working, *self._working.values())
        return held + largest <= self._limit

    def _waiting(self, key: Hashable) -> int:
        return sum(pair_bytes(pair.x, pair.dy) for pair in self._groups[key])

    def _absorb(self, key: Any) -> list[Outcome]:
        pairs = self._groups.pop(key, [])
        self._copies.pop(key, None)
        self._working.pop(key, None)
        left = [pair.x for group in self._groups.values() for pair in group]
        self._inputs = {_storage(x): x.untyped_storage().nbytes() for x in left}
        return _absorbed(pairs, key[-1])


def _absorbed(pairs: list[_Pair], stream: Any) -> list[Outcome]:
    """Update the layers of `pairs`, which were computed on `stream`: neighbours in memory together."""
    outcomes = []
    for run in _runs(pairs):
        for pair in run:
            if pair.x._version != pair.version:
                raise RuntimeError(f"The input of layer {pair.label} was changed in place during backward.")
        streaming, xs, dys = [pair.streaming for pair in run], [pair.x for pair in run], [pair.dy for pair in run]
        with streaming[0].on_stream(stream):
            finite = Streaming.absorb(streaming, xs, dys, run[0].scale)
        if stream is not None:
            finite.record_stream(torch.cuda.current_stream(finite.device))
        outcomes.append(([pair.label for pair in run], finite))
    return outcomes


def _runs(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    """Divide pairs into runs of layers that are neighbours and can be absorbed together."""
    runs: list[list[_Pair]] = []
    for pair in sorted(pairs, key=lambda pair: pair.streaming.place[1]):
        kind, index = pair.streaming.place
        if runs and runs[-1][-1].streaming.place == (kind, index - 1):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def pair_bytes(x: Tensor | None, dy: Tensor) -> int:
    """Bytes that a pair takes while it waits; x is None where another pair has the same."""
    return dy.numel() * dy.element_size() + (x.untyped_storage().nbytes() if x is not None else 0)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
