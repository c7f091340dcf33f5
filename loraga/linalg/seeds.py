"""Random numbers that depend on a seed and a name only: the global generators are not touched."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from loraga.ops import declared


def seed_of(seed: int, name: str) -> int:
    """A 64-bit key of its own for each (seed, layer name), the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def test_matrix(rows: int, cols: int, seed: int, device: torch.device | str) -> Tensor:
    """(rows, cols) float32 on `device`: see `loraga.ops.declared.test_matrix_`."""
    return declared.test_matrix_(torch.empty(rows, cols, dtype=torch.float32, device=device), seed)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest would take the name for a test
