"""Which gradients were finite, counted on the devices: the host reads the counts once, at the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# Counts of so many lists of layers stay on the device. Experts that get tokens make a new list in nearly every batch.
_LISTS = 256

Label = tuple[str, int]  # a layer, and the number of its call in the micro-batch


class Outcomes:
    """The outcomes of all updates: a gradient enters a layer's sum if it is finite, else it is left out.

    Attributes:
        updates (`Counter[str]`): number of gradients that each layer got, in all micro-batches that are closed.
        micro_batches (`int`): how many are closed.
    """

    def __init__(self) -> None:
        self.updates: Counter[str] = Counter()
        self.micro_batches = 0
        self._open: list[tuple[Sequence[Label], Tensor]] = []
        self._known: dict[Label, bool] = {}  # of this micro-batch, read by the host
        self._left_out: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}  # counts, for each list of layers
        self._left_out_known: Counter[str] = Counter()
        self._complete: defaultdict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
        self._incomplete: set[int] = set()  # micro-batches, as far as the host knows

    def add(self, labels: Sequence[Label], finite: Tensor) -> None:
        """Note the outcomes of updates in this micro-batch: finite (b,) bool has one entry for each of b labels."""
        self._open.append((labels, finite))

    @property
    def any(self) -> bool:
        """Whether this micro-batch has outcomes."""
        return bool(self._open or self._known)

    def read(self) -> dict[Label, bool]:
        """All outcomes of this micro-batch, the last one where a label has several. The host waits for the devices."""
        for _, labels, finite in self._by_device():
            self._known.update(zip(labels, finite.tolist(), strict=True))
        self._open.clear()
        return self._known

    def close(self) -> None:
        """End this micro-batch. The host does not wait."""
        for device, labels, finite in self._by_device():
            names = tuple(name for name, _ in labels)
            self.updates.update(names)
            count = self._left_out.get((device, names))
            self._left_out[device, names] = (~finite).long() if count is None else count + ~finite
            self._complete[device].append((self.micro_batches, finite.all()))
        if len(self._left_out) > _LISTS:
            self._left_out_known = self.left_out()
            self._left_out.clear()
        for (name, _), known in self._known.items():
            self.updates[name] += 1
            if not known:
                self._left_out_known[name] += 1
                self._incomplete.add(self.micro_batches)
        self._open.clear()
        self._known.clear()
        self.micro_batches += 1

    def left_out(self) -> Counter[str]:
        """How many gradients of each layer had NaN or Inf. The host waits for the devices."""
        total = self._left_out_known.copy()
        for (_, names), counts in self._left_out.items():
            for name, count in zip(names, counts.tolist(), strict=True):
                total[name] += count
        return total

    def incomplete_batches(self) -> int:
        """How many micro-batches had NaN or Inf in the gradient of some layer. The host waits for the devices."""
        found = set(self._incomplete)
        for batches in self._complete.values():
            complete = torch.stack([flag for _, flag in batches]).tolist()
            found.update(index for (index, _), flag in zip(batches, complete, strict=True) if not flag)
        return len(found)

    def _by_device(self) -> list[tuple[torch.device, list[Label], Tensor]]:
        """This micro-batch's outcomes that the host has not read, as one tensor for each device."""
        parts: defaultdict[torch.device, list[tuple[Sequence[Label], Tensor]]] = defaultdict(list)
        for labels, finite in self._open:
            parts[finite.device].append((labels, finite))
        return [
            (
                device,
                [label for labels, _ in of_device for label in labels],
                torch.cat([finite for _, finite in of_device]),
            )
            for device, of_device in parts.items()
        ]
