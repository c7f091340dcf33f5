"""Buffers in host memory, summed on a device through a ring of staging blocks.

The device holds a fixed number of bytes whatever the model's size. An update of a buffer goes block of rows by block of
rows: fetch, add, write back, each on a queue (CUDA stream) of its own, so that the three overlap with each other and
with the backward pass. Events order them; the host waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

_BLOCKS = 3  # one is fetched while one is added to and one is written back


class Queues(Protocol):
    """The queues of a device. Each has `record_event()` and `wait_event(event)`, as a `torch.cuda.Stream` has."""

    fetch: Any
    work: Any
    store: Any

    def current(self) -> Any:
        """The queue that the caller's own work goes to."""

    def on(self, queue: Any) -> AbstractContextManager:
        """Work inside goes to `queue`."""


class CudaQueues:
    """Three streams beside the current one of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.fetch, self.work, self.store = (torch.cuda.Stream(device) for _ in range(3))

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def on(self, queue: torch.cuda.Stream) -> AbstractContextManager:
        return torch.cuda.stream(queue)


class HostMatrix:
    """An (m, n) sum in host memory. Between updates only its `StagingRing` may look at it."""

    def __init__(self, m: int, n: int, dtype: torch.dtype, pinned: bool) -> None:
        self.values = torch.zeros(m, n, dtype=dtype, device="cpu", pin_memory=pinned)
        self.stored: Any = None  # the event behind the last write to it


class _Block:
    def __init__(self, memory: Tensor, free: Any) -> None:
        self.memory = memory
        self.free = free  # the event behind its last use


class StagingRing:
    """Staging blocks of one device, shared by all of its buffers in turn.

    Args:
        device (`torch.device`): whose memory the blocks take.
        staging_bytes (`int`): of all blocks together.
        queues (`Queues`, *optional*): left out, CUDA streams.
    """

    def __init__(self, device: torch.device, staging_bytes: int, queues: Queues | None = None) -> None:
        self._device = device
        self._staging_bytes = staging_bytes
        self._queues = CudaQueues(device) if queues is None else queues
        size = staging_bytes // _BLOCKS // 16 * 16
        memories = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BLOCKS)]
        made = self._queues.current().record_event()  # what used this memory before is behind that
        self._blocks = deque(_Block(memory, made) for memory in memories)
        self._block_bytes = size
        self._pending: deque[tuple[Any, tuple[Tensor, ...]]] = deque()

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return _BLOCKS * self._block_bytes

    def matrix(self, name: str, m: int, n: int, dtype: torch.dtype) -> HostMatrix:
        """A zero buffer for layer `name`.

        Raises:
            ValueError: a block does not hold one row of it.
        """
        row = n * dtype.itemsize
        if row > self._block_bytes:
            raise ValueError(
                f"Layer {name!r}: a row of its buffer takes {row} bytes, more than a third of "
                f"staging_bytes={self._staging_bytes}; set staging_bytes to at least {_BLOCKS * (row + 16)}."
            )
        return HostMatrix(m, n, dtype, pinned=self._device.type == "cuda")

    def update(
        self, host: HostMatrix, add: Callable[[Tensor, slice], object], keep: tuple[Tensor, ...], *, wait: bool = False
    ) -> None:
        """Queue add(block, rows) for all rows of `host`, where block holds host.values[rows] on the device.

        Args:
            add (callable): changes the block in place. It runs on a queue of its own, behind the caller's work so far.
            keep (`tuple` of `torch.Tensor`): what `add` reads. It stays alive until the caller's queue is behind `add`.
            wait (`bool`): put the caller's queue behind this update at once, so that what `add` reads is free for
                reuse when the caller lets go of it; otherwise a few updates may be on their way.
        """
        queues = self._queues
        queues.work.wait_event(queues.current().record_event())
        before, step = host.stored, self._block_bytes // (host.values.shape[1] * host.values.dtype.itemsize)
        added = None
        for start in range(0, host.values.shape[0], step):
            rows = slice(start, min(start + step, host.values.shape[0]))
            values = host.values[rows]
            block = self._blocks[0]
            self._blocks.rotate(-1)
            staged = block.memory[: values.numel() * values.dtype.itemsize].view(values.dtype).view(values.shape)
            queues.fetch.wait_event(block.free)
            with queues.on(queues.fetch):
                if before is None:
                    staged.zero_()
                else:
                    queues.fetch.wait_event(before)
                    staged.copy_(values, non_blocking=True)
            queues.work.wait_event(queues.fetch.record_event())
            with queues.on(queues.work):
                add(staged, rows)
            added = queues.work.record_event()
            queues.store.wait_event(added)
            with queues.on(queues.store):
                values.copy_(staged, non_blocking=True)
            host.stored = block.free = queues.store.record_event()
        self._pending.append((added, keep))
        self._settle(0 if wait else _BLOCKS)

    def join(self) -> None:
        """Put the caller's queue behind every update so far."""
        self._settle(0)

    def close(self) -> None:
        """`join`, also behind the last write back, and give the blocks' memory back. Buffers can still be loaded."""
        self.join()
        for block in self._blocks:
            self._queues.current().wait_event(block.free)
        self._blocks.clear()

    def load(self, host: HostMatrix) -> Tensor:
        """The whole of a buffer on the device, for the caller's queue."""
        if host.stored is not None:
            self._queues.current().wait_event(host.stored)
        return host.values.to(self._device, non_blocking=True)

    def store(self, host: HostMatrix, values: Tensor) -> None:
        """Overwrite a whole buffer by (m, n) values that the caller's queue has on the device."""
        current = self._queues.current()
        if host.stored is not None:
            current.wait_event(host.stored)
        # rounded on the device: a copy that converts goes through memory that is not pinned, and the host waits for it
        host.values.copy_(values.to(self._device, host.values.dtype), non_blocking=True)
        host.stored = current.record_event()

    def _settle(self, most: int) -> None:
        while len(self._pending) > most:
            event, kept = self._pending.popleft()
            self._queues.current().wait_event(event)
            del kept  # not earlier: the caller's queue may use its memory anew from here on
