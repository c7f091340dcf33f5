"""Block sizes as data: a fixed table per architecture, in tuning.json. Nothing is tuned at user time.

The table maps kernel, width of its operands in bits, architecture and columns of the thin operand (up to) to block
sizes, warps and stages.
`python -m loraga.kernels.dev tune` searches on the GPU it finds and writes the winners with the device's name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuning.json")
RAGGED = "ragged"  # operands whose rows are not contiguous, or no multiples of 16 long: on every architecture
ARCHITECTURES = (80, 90, 100)  # that the table holds and that are compiled ahead of time


_trial: dict[str, dict[str, int]] = {}


@contextmanager
def using(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Launch `kernel` with `config` whatever the table says, for a search."""
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def known(arch: int) -> int:
    """The newest architecture of the table that is not newer than `arch`, and has no more shared memory."""
    if arch >= 120:  # consumer Blackwell has the 99 KB of 86 and 89, into which the entries of 80 fit
        return 80
    older = [a for a in ARCHITECTURES if a <= arch]
    return older[-1] if older else ARCHITECTURES[0]


def entries(kernel: str, dtype: torch.dtype, arch: int | None) -> Iterator[tuple[int, dict[str, int]]]:
    """(columns, config) for each entry of the table in rising order of columns; `arch` None: for ragged operands."""
    rows = table()["kernels"][kernel][str(8 * dtype.itemsize)][RAGGED if arch is None else str(known(arch))]
    for columns in sorted(rows, key=int):
        yield int(columns), rows[columns]


def config(kernel: str, dtype: torch.dtype, arch: int | None, columns: int = 0) -> dict[str, int]:
    """Block sizes, num_warps and num_stages: the entry with the fewest columns that fit, or the widest one."""
    if kernel in _trial:
        return _trial[kernel]
    choices = list(entries(kernel, dtype, arch))
    return next((entry for most, entry in choices if columns <= most), choices[-1][1])
