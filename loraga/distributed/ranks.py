"""Several processes make one adapter: the communication between ranks.

Errors and numbers are exchanged in different ways. Errors go through the key-value store that every process group has:
a rank that fails writes its message there and raises at once, and does not wait for other ranks. Numbers go through the
collectives of the process group. Before each collective all ranks meet through the store, so no rank waits in a
collective that another rank does not enter.

Meetings are numbered. The store has these keys: "at/<rank>" is the last meeting that a rank came to; "count/<meeting>"
counts the ranks that came, plus `_VOTE` for each vote; "gate/<meeting>" is set by the last rank that comes, to the sum
of votes, or by a rank that fails, to its error; "facts" is what rank 0 was asked to do.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("loraga")
T = TypeVar("T")

# upper limit for the bytes of one exchange, unless a single layer has more
EXCHANGE_BYTES = 32 * 2**20
# after so many seconds of waiting, a warning names the missing ranks
_PATIENCE = 30.0
# one call waits for a key at most so long, because Ctrl-C has no effect during the call
_SLICE = datetime.timedelta(seconds=5)
# added to the count of a meeting for each vote; larger than any number of ranks, so both can be read from one number
_VOTE = 2**32
_END: Any = object()


class RankFailed(RuntimeError):
    """Another rank stopped with an error or did not come to a meeting. The message has its number and error text."""


class Ranks:
    """The processes that make one adapter together: a context manager around a call that every rank makes.

    If a rank leaves it with an error, the other ranks raise `RankFailed` when they next call a method that checks for
    errors. With one process, with or without torch.distributed, nothing is exchanged and no method waits.

    Attributes:
        size (`int`): number of ranks.
        index (`int`): number of this rank, from 0.
        reduced_bytes (`int`): payload of the tensors that this rank put into collectives so far.
    """

    def __init__(self) -> None:
        self.size, self.index, self.reduced_bytes = 1, 0, 0
        self._met = 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.size, self.index = dist.get_world_size(), dist.get_rank()
            store: Any = dist.distributed_c10d._get_default_store()  # torch has no public function for it
            self._timeout: datetime.timedelta = store.timeout  # the timeout of the process group
            call: int = store.add(f"loraga/calls/{self.index}", 1)  # keys of an earlier call must not be read
            self._store = dist.distributed_c10d.PrefixStore(f"loraga/{call}/", store)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which shows progress, warns and writes files."""
        return self.index == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.size == 1 or error is None or isinstance(error, RankFailed):
            return
        # A RuntimeError can be a consequence of another rank's error, which broke a collective of the model's forward.
        if isinstance(error, RuntimeError):
            try:
                self.raise_if_failed()
            except RankFailed as first:
                raise first from error
            except RuntimeError:
                pass  # the store is gone, too, so this rank's own error is the only one known
        self._report(error)

    def _report(self, error: BaseException) -> None:
        """Write `error` to the gate of the next meeting, which no rank can have passed without this one."""
        message = json.dumps({"rank": self.index, "error": f"{type(error).__name__}: {error}"})
        try:
            self._store.set(self._gate(self._met + 1), message)
        except RuntimeError:
            log.warning("rank %d could not tell the other ranks of its error", self.index)

    def meet(self, votes: int = 0) -> int:
        """Wait until every rank has called this; returns the sum of the `votes` of all ranks.

        Raises:
            RankFailed: a rank stopped with an error, or did not call this within the process group's timeout.
        """
        if self.size == 1:
            return votes
        self._met += 1
        try:
            self._store.set(f"at/{self.index}", str(self._met))
            count = self._store.add(f"count/{self._met}", 1 + votes * _VOTE)
            if count % _VOTE == self.size:
                self._store.set(self._gate(self._met), json.dumps({"votes": count // _VOTE}))
            self._wait(self._gate(self._met))
            total: int = self._read(self._met)["votes"]
            return total
        except dist.DistNetworkError as error:
            raise RankFailed(f"Rank {self.index} lost the rank that keeps the process group's store: {error}") from None

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any rank; waits for all ranks."""
        return self.meet(votes=here) > 0

    def raise_if_failed(self) -> None:
        """Raise `RankFailed` if a rank has reported an error; does not wait for other ranks."""
        if self.size > 1 and self._store.check([self._gate(self._met + 1)]):
            self._read(self._met + 1)

    def agree(self, **facts: Hashable) -> None:
        """Raise `ValueError` unless every rank calls this with the same facts; waits for all ranks."""
        if self.size == 1:
            return
        mine = {key: repr(value) for key, value in facts.items()}
        if self.first:
            self._store.set("facts", json.dumps(mine))
        self.meet()
        theirs = json.loads(self._store.get("facts"))
        differing = [f"{key}: {_difference(mine[key], theirs[key])}" for key in mine if mine[key] != theirs[key]]
        if differing:
            raise ValueError(
                f"Rank {self.index} and rank 0 do not initialise the same thing; they differ in {'; '.join(differing)}."
            )

    def batches(self, loader: Iterable[T], together: bool) -> Iterator[T]:
        """Yield the batches of `loader`, and check before each of them whether another rank failed.

        `together` is for models whose forward waits for the other ranks (sharded models): a batch is yielded only when
        every rank has one.

        Raises:
            ValueError: with `together`, the loaders have different lengths.
            RankFailed: another rank reported an error.
        """
        batches = iter(loader)
        for taken in itertools.count():
            batch = next(batches, _END)
            if not together:
                self.raise_if_failed()
            elif 0 < (ended := self.meet(votes=batch is _END)) < self.size:
                raise ValueError(
                    f"The loaders of {ended} of {self.size} ranks (this one {'too' if batch is _END else 'not'}) ended "
                    f"after {taken} micro-batches. The ranks of a sharded model compute each of them together, so "
                    f"every rank needs the same number: use max_batches={taken} or a sampler that pads."
                )
            if batch is _END:
                return
            yield batch

    def gather(self, numbers: Sequence[Sequence[int]], device: torch.device) -> list[list[list[int]]]:
        """The tables of integers of all ranks, in the order of ranks; all have one shape."""
        if self.size == 1:
            return [[list(row) for row in numbers]]
        mine = torch.tensor(numbers, dtype=torch.int64, device=_reachable(device))
        tables = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(mine, lambda: dist.all_gather(tables, mine))
        return [table.tolist() for table in tables]

    def sum_(self, value: Tensor) -> None:
        """Replace `value` by its sum over ranks, in place; all ranks get the same bits."""
        if self.size == 1:
            return
        payload = value.to(_reachable(value.device))
        self._exchange(payload, lambda: dist.all_reduce(payload))
        if payload is not value:
            value.copy_(payload)

    def from_first_(self, values: Sequence[Tensor]) -> None:
        """Overwrite tensors of one dtype by those of rank 0, in place.

        All ranks computed them from the same bits, but perhaps on different hardware, where the last digits of a
        factorization may differ. Data-parallel training would never make the adapters equal again.
        """
        if self.size == 1:
            return
        for chunk in chunks(values, _bytes, EXCHANGE_BYTES):
            flat = torch.cat([value.reshape(-1).to(_reachable(chunk[0].device)) for value in chunk])
            self._exchange(flat, partial(dist.broadcast, flat, src=0))
            for value, part in zip(chunk, flat.split([value.numel() for value in chunk]), strict=True):
                value.copy_(part.view(value.shape))

    def _exchange(self, payload: Tensor, collective: Callable[[], object]) -> None:
        """Meet, then run a collective on `payload`.

        Raises:
            RankFailed: the collective failed, which it does when the process of a rank is killed. (With nccl the host
                does not wait in a collective, and nccl's own watchdog ends the process.)
        """
        self.meet()
        try:
            collective()
        except RuntimeError as error:
            self._report(error)
            raise RankFailed(
                f"Rank {self.index} could not exchange numbers with the other ranks; one of them may be gone: {error}"
            ) from error
        self.reduced_bytes += _bytes(payload)

    def _gate(self, number: int) -> str:
        return f"gate/{number}"

    def _read(self, number: int) -> dict[str, Any]:
        """The message at a gate that is set; raises `RankFailed` if it is an error."""
        message: dict[str, Any] = json.loads(self._store.get(self._gate(number)))
        if "error" in message:
            raise RankFailed(f"Rank {message['rank']} stopped with {message['error']}")
        return message

    def _wait(self, key: str) -> None:
        """Wait for `key` in many short calls, so that Ctrl-C works between them."""
        began, limit, warned = time.monotonic(), self._timeout.total_seconds(), False
        while True:
            try:
                self._store.wait([key], min(_SLICE, self._timeout))
                return
            except dist.DistNetworkError:
                raise
            except RuntimeError:
                waited = time.monotonic() - began
                if waited >= limit:
                    raise RankFailed(
                        f"Rank {self.index} waited {waited:.0f} s, the process group's timeout, for {self._missing()}. "
                        "Every rank must make the same loraga calls; give init_process_group a longer timeout if one "
                        "has that much more to do."
                    ) from None
                if waited >= _PATIENCE and not warned:
                    warned = True
                    log.warning(
                        "rank %d has waited %.0f s for %s. In a distributed job every rank must call loraga.",
                        self.index,
                        waited,
                        self._missing(),
                    )

    def _missing(self) -> str:
        """The ranks that have not come to this rank's last meeting, such as "ranks 1, 3"."""
        missing = []
        for rank in range(self.size):
            key = f"at/{rank}"
            if not self._store.check([key]) or int(self._store.get(key)) < self._met:
                missing.append(str(rank))
        return f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"


def _difference(here: str, there: str) -> str:
    """Both texts, from 40 characters before the first difference on."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    start = max(common - 40, 0)
    return f"{'...' * (start > 0)}{here[start:][:100]} here, {there[start:][:100]} there"


def chunks(values: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Cut `values` into lists whose sizes add up to at most `limit`; a larger value is a list of its own."""
    chunk: list[T] = []
    total = 0
    for value in values:
        size = size_of(value)
        if chunk and total + size > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(value)
        total += size
    if chunk:
        yield chunk


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _reachable(device: torch.device) -> torch.device:
    """`device`, or another that the process group's backend supports (nccl alone does not support host memory)."""
    supported = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    return device if device.type in supported else torch.device(supported[0])
