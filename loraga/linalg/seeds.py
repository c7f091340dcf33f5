"""Random numbers that depend on a seed and a name only. The global generators are neither read nor advanced."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from loraga.ops import declared


def seed_of(seed: int, name: str) -> int:
    """A key from 0 to 2⁶³ − 1 for the layer `name` under `seed`: the same in every process, different for each pair.

    It is the BLAKE2b digest of both. Every seed of loraga that depends on a name comes from here.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def test_matrix(rows: int, cols: int, seed: int, device: torch.device | str) -> Tensor:
    """(rows, cols) float32 on `device`, uniform in [-1, 1): `loraga.ops.declared.test_matrix_` defines the numbers."""
    return declared.test_matrix_(torch.empty(rows, cols, dtype=torch.float32, device=device), seed)


test_matrix.__test__ = False  # type: ignore[attr-defined]  # pytest would take the name for a test
