"""What happens to memory, op by op, without a GPU: how much of it lives, and who touches it in which order."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraga.ops import reference


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _run(mode: TorchDispatchMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """Our own ops by the steps of their reference, so that their temporaries are seen too."""
    if func.namespace == "loraga":
        with mode:
            return getattr(reference, func._schema.name.split("::")[1])(*args, **kwargs)
    return func(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that ops made inside and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = _run(self, func, args, kwargs or {})
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in before:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Queue:
    """A queue of work that runs at once, with a vector clock instead of a device: what must come before what."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[str, int] = {name: 0}

    def record_event(self) -> dict[str, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[str, int]) -> None:
        for name, tick in event.items():
            self.clock[name] = max(self.clock.get(name, 0), tick)


class Queues(TorchDispatchMode):
    """The queues of a make-believe device (`host_buffers.Queues`) and, as a mode, their race detector.

    Every op inside is an access of the active queue to the bytes its arguments cover. Two accesses to the same bytes
    on different queues, one of them a write, must be ordered by events, or `races` says which. Memory that is let go
    of counts as written by the queue that took it, as a caching allocator may hand it out there at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main, self.fetch, self.work, self.store = map(Queue, ("main", "fetch", "work", "store"))
        self.active = self.main
        self.races: list[str] = []
        self._numbers: dict[int, int] = {}  # of storages: their addresses are used again
        self._count = 0
        self._seen: defaultdict[int, list[tuple[int, int, bool, str, int, str]]] = defaultdict(list)

    def current(self) -> Queue:
        return self.main

    @contextmanager
    def on(self, queue: Queue) -> Iterator[None]:
        before, self.active = self.active, queue
        try:
            yield
        finally:
            self.active = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):  # not a view
            named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                write = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(named.get(argument.name)):
                    self._access(tensor, write, schema.name)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._number(tensor)
        return out

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._count += 1
            self._numbers[key] = self._count
            weakref.finalize(storage, self._freed, key, storage.nbytes(), self.active)
        return self._numbers[key]

    def _freed(self, key: int, size: int, queue: Queue) -> None:
        self._record(self._numbers.pop(key), 0, size, True, queue, "given back")

    def _access(self, tensor: torch.Tensor, write: bool, op: str) -> None:
        if tensor.numel():
            start = tensor.storage_offset() * tensor.element_size()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            end = start + (reach + 1) * tensor.element_size()
            self._record(self._number(tensor), start, end, write, self.active, op)

    def _record(self, number: int, start: int, end: int, write: bool, queue: Queue, op: str) -> None:
        queue.clock[queue.name] += 1
        for begin, stop, wrote, name, tick, what in self._seen[number]:
            if begin < end and start < stop and (write or wrote) and queue.clock.get(name, 0) < tick:
                self.races.append(f"{what} on {name} and {op} on {queue.name} are not ordered")
        self._seen[number].append((start, end, write, queue.name, queue.clock[queue.name], op))
