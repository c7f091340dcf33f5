"""Pairs (x, dy) that wait for those of other layers of their shape, so that these layers are updated together.

On a GPU an update of one layer takes about fifty small operations beside its four large products, and the host needs
longer to launch them than the device to compute them. For layers of one shape they are batched
(`Streaming.absorb`), so their number is divided by the number of layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraga.estimators.streaming import Streaming

# Bytes that waiting pairs may take on a device, together with what the update of one group of them takes. Groups are as
# large as this allows.
WAITING_BYTES = 2**29
# What the update of a group takes, in multiples of its state: less than so much.
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


class Pending:
    """The pairs that wait on one device. `add` and `flush` return the outcomes of those that wait no more.

    Args:
        limit (`int`): bytes that pairs and the update of a group may take. A pair that takes more than half of that is
            absorbed at once.
    """

    def __init__(self, limit: int = WAITING_BYTES) -> None:
        self._limit = limit
        self._groups: defaultdict[Hashable, list[_Pair]] = defaultdict(list)
        self._bytes: defaultdict[Hashable, int] = defaultdict(int)
        self._storages: set[int] = set()  # of the x that wait: layers with one input share it

    def __len__(self) -> int:
        """How many pairs wait."""
        return sum(map(len, self._groups.values()))

    def add(self, label: Hashable, streaming: Streaming, x: Tensor, dy: Tensor, scale: float = 1.0) -> list[Outcome]:
        """Let a pair wait, and absorb groups until there is room for it, the largest first.

        It is a copy of dy that waits: some modules overwrite a gradient in place once autograd has handed it to them
        (the RMSNorm of Liger). x is an activation that autograd has saved, which nobody may change.
        """
        key, outcomes = self._key(streaming, x, scale), []
        if any(pair.streaming is streaming for pair in self._groups.get(key, ())):  # the layer was called twice
            outcomes += self._absorb(key)
        size = pair_bytes(None if _storage(x) in self._storages else x, dy)
        working = WORKING_STATES * streaming.state_bytes
        if 2 * (size + working) > self._limit:
            return outcomes + self._absorb(key) + _absorbed([_Pair(label, streaming, x, dy, scale)])
        while self._groups and not self._has_room(key, size, working):
            outcomes += self._absorb(max(self._groups, key=lambda group: self._bytes[group] + self._working(group)))
        self._groups[key].append(_Pair(label, streaming, x, dy.clone(), scale))
        self._bytes[key] += size
        self._storages.add(_storage(x))
        return outcomes

    def flush(self) -> list[Outcome]:
        """Absorb all pairs that wait."""
        return [outcome for key in list(self._groups) for outcome in self._absorb(key)]

    def _has_room(self, key: Hashable, size: int, working: int) -> bool:
        """Whether a pair of `size` bytes can wait in the group `key`, whose update then takes `working` bytes more."""
        largest = max(self._working(group) + (working if group == key else 0) for group in {key, *self._groups})
        return sum(self._bytes.values()) + size + largest <= self._limit

    def _working(self, key: Hashable) -> int:
        return WORKING_STATES * sum(pair.streaming.state_bytes for pair in self._groups.get(key, ()))

    @staticmethod
    def _key(streaming: Streaming, x: Tensor, scale: float) -> Hashable:
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        return streaming.place[0], x.dtype, scale, stream

    def _absorb(self, key: Any) -> list[Outcome]:
        pairs = self._groups.pop(key, [])
        self._bytes.pop(key, None)
        self._storages = {_storage(pair.x) for group in self._groups.values() for pair in group}
        with _on(key[-1]):
            return _absorbed(pairs)


def _absorbed(pairs: list[_Pair]) -> list[Outcome]:
    """Update the layers of `pairs`, neighbours in memory together."""
    return [
        (
            [pair.label for pair in run],
            Streaming.absorb(
                [pair.streaming for pair in run], [pair.x for pair in run], [pair.dy for pair in run], run[0].scale
            ),
        )
        for run in _runs(pairs)
    ]


def _runs(pairs: Iterable[_Pair]) -> list[list[_Pair]]:
    """Divide pairs of one key into runs of neighbours."""
    runs: list[list[_Pair]] = []
    for pair in sorted(pairs, key=lambda pair: pair.streaming.place[1]):
        if runs and pair.streaming.place[1] == runs[-1][-1].streaming.place[1] + 1:
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Context of the stream on which pairs were computed. Afterwards the caller's stream waits for it."""
    if stream is None or stream == (caller := torch.cuda.current_stream(stream.device)):
        yield
        return
    with torch.cuda.stream(stream):
        yield
    caller.wait_stream(stream)


def pair_bytes(x: Tensor | None, dy: Tensor) -> int:
    """Bytes that a pair takes while it waits; x is None where another pair has the same."""
    return dy.numel() * dy.element_size() + (x.untyped_storage().nbytes() if x is not None else 0)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
