"""Several processes, one adapter: what ranks tell each other.

Two ways of talking are used for two purposes. Whether everybody is well goes through the key-value store that every
process group starts from: a rank that fails leaves its message there and raises at once, without waiting for anybody,
and can never be caught in a collective that the others are not in. Numbers go through the process group's collectives,
each of them entered only when all ranks have said that they are there.
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

# one exchange is at most this large, or one layer
EXCHANGE_BYTES = 32 * 2**20
# after so many seconds of waiting, say for whom
_PATIENCE = 30.0
_SLICE = datetime.timedelta(seconds=5)
_VOTE = 2**32
_END: Any = object()


class RankFailed(RuntimeError):
    """Another rank stopped with an error, or did not come; its number and error text are in the message."""


class Ranks:
    """The processes that make one adapter together: context manager around a call that every one of them makes.

    Leaving it with an error tells the other ranks, which raise `RankFailed` where they next look or wait. Outside
    torch.distributed, and alone in it, nothing is exchanged and nobody waited for.

    Attributes:
        size (`int`): how many there are.
        index (`int`): which one this is.
        reduced_bytes (`int`): payload of the tensors that this rank put into collectives so far.
    """

    def __init__(self) -> None:
        self.size, self.index, self.reduced_bytes = 1, 0, 0
        self._met = 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.size, self.index = dist.get_world_size(), dist.get_rank()
            store = dist.distributed_c10d._get_default_store()  # there is no public way to it
            # that of the process group, which the store was made with
            self._timeout = store.timeout  # type: ignore[attr-defined]
            call = store.add(f"loraga/calls/{self.index}", 1)
            self._store = dist.PrefixStore(f"loraga/{call}/", store)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks: shows progress, warns, writes files."""
        return self.index == 0

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.size == 1 or error is None or isinstance(error, RankFailed):
            return
        if isinstance(error, RuntimeError):  # perhaps only because another rank left a collective of the forward
            try:
                self.look()
            except RankFailed as first:
                raise first from error
            except RuntimeError:
                pass  # the store is gone, too: this rank's own error is what there is to say
        self._tell(error)

    def _tell(self, error: BaseException) -> None:
        """Leave word of `error` where the others will look next; no rank can have passed there."""
        said = json.dumps({"rank": self.index, "error": f"{type(error).__name__}: {error}"})
        try:
            self._store.set(self._gate(self._met + 1), said)
        except RuntimeError:
            log.warning("rank %d could not tell the other ranks of its error", self.index)

    def meet(self, votes: int = 0) -> int:
        """Wait until every rank has come here; the sum of everybody's `votes`.

        Raises:
            RankFailed: a rank stopped with an error, or did not come within the process group's timeout.
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
            return self._read(self._met)["votes"]
        except dist.DistNetworkError as error:
            raise RankFailed(f"Rank {self.index} lost the rank that keeps the process group's store: {error}") from None

    def any(self, here: bool) -> bool:
        """Is it so on any rank?"""
        return self.meet(votes=here) > 0

    def look(self) -> None:
        """Raise `RankFailed` if a rank is known to have failed; nobody is waited for."""
        if self.size > 1 and self._store.check([self._gate(self._met + 1)]):
            self._read(self._met + 1)

    def agree(self, **facts: Hashable) -> None:
        """Raise `ValueError` unless every rank brings the same facts; waits for rank 0."""
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
        """What `loader` gives, as long as no rank is known to have failed.

        With `together`, for models whose forward waits for the other ranks (sharded ones), no rank starts on a batch
        before all of them have one.

        Raises:
            ValueError: with `together`, loaders of different length.
        """
        batches = iter(loader)
        for taken in itertools.count():
            batch = next(batches, _END)
            if not together:
                self.look()
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
        """Every rank's table of whole numbers, all of one shape, by rank."""
        if self.size == 1:
            return [[list(row) for row in numbers]]
        mine = torch.tensor(numbers, dtype=torch.int64, device=_reachable(device))
        tables = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(mine, lambda: dist.all_gather(tables, mine))
        return [table.tolist() for table in tables]

    def sum_(self, value: Tensor) -> None:
        """Sum over ranks, in place; the same bits on all of them."""
        if self.size == 1:
            return
        there = value.to(_reachable(value.device))
        self._exchange(there, lambda: dist.all_reduce(there))
        if there is not value:
            value.copy_(there)

    def from_first_(self, values: Sequence[Tensor]) -> None:
        """Overwrite tensors of one dtype by rank 0's, in place.

        All ranks did the same on the same bits, but not always on the same hardware: the last digits of a
        factorization may differ between kinds of processors, and adapters that differ would drift apart in training.
        """
        if self.size == 1:
            return
        for chunk in chunks(values, _bytes, EXCHANGE_BYTES):
            flat = torch.cat([value.reshape(-1).to(_reachable(chunk[0].device)) for value in chunk])
            self._exchange(flat, partial(dist.broadcast, flat, src=0))
            for value, part in zip(chunk, flat.split([value.numel() for value in chunk]), strict=True):
                value.copy_(part.view(value.shape))

    def _exchange(self, payload: Tensor, collective: Callable[[], object]) -> None:
        """Enter a collective together.

        Raises:
            RankFailed: it broke off, as it does when a rank's process is killed. (With nccl the host does not wait in
                it: there it is nccl's own watchdog that ends the process.)
        """
        self.meet()
        try:
            collective()
        except RuntimeError as error:
            self._tell(error)
            raise RankFailed(
                f"Rank {self.index} could not exchange numbers with the other ranks; one of them may be gone: {error}"
            ) from error
        self.reduced_bytes += _bytes(payload)

    def _gate(self, number: int) -> str:
        return f"gate/{number}"

    def _read(self, number: int) -> dict[str, Any]:
        said = json.loads(self._store.get(self._gate(number)))
        if "error" in said:
            raise RankFailed(f"Rank {said['rank']} stopped with {said['error']}")
        return said

    def _wait(self, key: str) -> None:
        """In slices, so that Ctrl-C is heard meanwhile."""
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
        """Which ranks are behind this one."""
        behind = []
        for rank in range(self.size):
            key = f"at/{rank}"
            if not self._store.check([key]) or int(self._store.get(key)) < self._met:
                behind.append(str(rank))
        return f"rank{'s' if len(behind) > 1 else ''} {', '.join(behind)}"


def _difference(here: str, there: str) -> str:
    """Both texts from a little before they part."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(here, there, strict=False)))
    start = max(common - 40, 0)
    return f"{'...' * (start > 0)}{here[start:][:100]} here, {there[start:][:100]} there"


def chunks(values: Iterable[T], size_of: Any, limit: int) -> Iterator[list[T]]:
    """Runs of `values` whose sizes add up to no more than `limit`, or single ones."""
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
    """`device`, or one that the process group's backend can talk to (nccl alone knows no host memory)."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0])
