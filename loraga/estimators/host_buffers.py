"""Buffers in host memory, summed on a device through a ring of staging blocks.

The staging blocks take a fixed number of bytes on the device, for models of any size. An update of a buffer processes
one block of rows after the other: it fetches the block, adds to it and writes it back. Each of these three steps has
its own queue (CUDA stream), so they overlap with each other and with the backward pass. Events order the steps; the
host does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes between the starts of buffers in one piece of memory
_BLOCKS = 3  # one is fetched while a second is added to and a third is written back


class Queues(Protocol):
    """The queues of a device. Each has `record_event()` and `wait_event(event)`, as a `torch.cuda.Stream` has."""

    fetch: Any
    work: Any
    store: Any

    def current(self) -> Any:
        """The queue on which the caller's operations run."""

    def on(self, queue: Any) -> AbstractContextManager[object]:
        """Context in which operations run on `queue`."""


class CudaQueues:
    """Three streams of a CUDA device, none of which is its current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.fetch, self.work, self.store = (torch.cuda.Stream(device) for _ in range(3))

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def on(self, queue: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(queue)


class HostMatrix:
    """An (m, n) sum in host memory. Only its `StagingRing` may read or write it, because copies may be running.

    Attributes:
        values (`torch.Tensor`): (m, n) on the CPU, zero at first; pinned where the device is a CUDA device.
        stored: the event after the last write, None before the first.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.stored: Any = None


class HostMemory:
    """Memory for buffers on the host, in pieces that several of them share.

    torch rounds every piece of pinned memory up to a power of two. With a piece for each buffer that is a third of all
    (4 GiB for the bfloat16 buffers of a 7B model), so pieces are powers of two here, and buffers lie in them one after
    the other.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._piece_bytes = 0
        self._free = torch.empty(0, dtype=torch.uint8)

    def reserve(self, total: int) -> None:
        """Say that buffers of so many bytes in all will be taken; a piece gets about a sixteenth of that."""
        self._piece_bytes = total // 16

    def take(self, m: int, n: int, dtype: torch.dtype) -> Tensor:
        """A zero (m, n) of `dtype`."""
        size = m * n * dtype.itemsize
        if size > self._free.numel():
            piece = 1 << (max(size, self._piece_bytes, 1) - 1).bit_length()
            self._free = torch.zeros(piece, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
        values = self._free[:size].view(dtype).view(m, n)
        self._free = self._free[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return values


class _Block:
    def __init__(self, memory: Tensor, free: Any) -> None:
        self.memory = memory
        self.free = free  # the event after its last use


class StagingRing:
    """Staging blocks of one device, which all buffers of that device use in turn.

    Args:
        device (`torch.device`): the blocks are in its memory.
        staging_bytes (`int`): memory of all blocks together.
        queues (`Queues`, *optional*): the queues of the device; CUDA streams by default.
    """

    def __init__(self, device: torch.device, staging_bytes: int, queues: Queues | None = None) -> None:
        self._device = device
        self._staging_bytes = staging_bytes
        self._queues = CudaQueues(device) if queues is None else queues
        size = staging_bytes // _BLOCKS // 16 * 16
        memories = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_BLOCKS)]
        made = self._queues.current().record_event()  # whatever used this memory before is done by then
        self._blocks = deque(_Block(memory, made) for memory in memories)
        self._block_bytes = size
        self._pending: deque[tuple[Any, tuple[Tensor, ...]]] = deque()
        self._memory = HostMemory(pinned=device.type == "cuda")

    @property
    def device_bytes(self) -> int:
        """Bytes of the blocks on the device."""
        return _BLOCKS * self._block_bytes

    def reserve(self, total: int) -> None:
        """Say that `matrix` will be called for buffers of so many bytes in all, so that they waste little memory."""
        self._memory.reserve(total)

    def matrix(self, name: str, m: int, n: int, dtype: torch.dtype) -> HostMatrix:
        """A zero buffer (m, n) of `dtype` for layer `name`.

        Raises:
            ValueError: a block is too small for one row of it.
        """
        row = n * dtype.itemsize
        if row > self._block_bytes:
            raise ValueError(
                f"Layer {name!r}: a row of its buffer takes {row} bytes, more than a third of "
                f"staging_bytes={self._staging_bytes}; set staging_bytes to at least {_BLOCKS * (row + 16)}."
            )
        return HostMatrix(self._memory.take(m, n, dtype))

    def update(
        self, host: HostMatrix, add: Callable[[Tensor, slice], object], keep: tuple[Tensor, ...], *, wait: bool = False
    ) -> None:
        """Queue add(block, rows) for all rows of `host`, where block is a copy of host.values[rows] on the device.

        Args:
            add (callable): changes the block in place. It runs on the work queue, after the caller's operations so far.
            keep (`tuple` of `torch.Tensor`): the tensors that `add` reads. The ring has a reference to them until the
                caller's queue waits for `add`, so that their memory is not reused earlier.
            wait (`bool`): make the caller's queue wait for this update at once, so that the caller may free what `add`
                reads after this call. Otherwise a few updates may be pending.
        """
        queues = self._queues
        queues.work.wait_event(queues.current().record_event())
        # The loop replaces `host.stored`. Its blocks have different rows, so they wait for the previous update only.
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
        """Make the caller's queue wait for all additions so far."""
        self._settle(0)

    def close(self) -> None:
        """`join`, wait for the last writes to host memory as well, and free the blocks. `load` still works."""
        self.join()
        for block in self._blocks:
            self._queues.current().wait_event(block.free)
        self._blocks.clear()

    def load(self, host: HostMatrix) -> Tensor:
        """All values (m, n) of a buffer on the device, for use on the caller's queue."""
        if host.stored is not None:
            self._queues.current().wait_event(host.stored)
        return host.values.to(self._device, non_blocking=True)

    def store(self, host: HostMatrix, values: Tensor) -> None:
        """Overwrite a buffer by `values` (m, n), which are computed on the caller's queue."""
        current = self._queues.current()
        if host.stored is not None:
            current.wait_event(host.stored)
        # Round on the device: a copy that converts uses memory that is not pinned, and then the host waits for it.
        host.values.copy_(values.to(self._device, host.values.dtype), non_blocking=True)
        host.stored = current.record_event()

    def _settle(self, most: int) -> None:
        """Make the caller's queue wait for the oldest updates, until at most `most` are pending."""
        while len(self._pending) > most:
            event, kept = self._pending.popleft()
            self._queues.current().wait_event(event)
            del kept  # not earlier: from here on the caller's queue may reuse the memory
