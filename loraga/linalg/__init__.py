"""Randomized linear algebra on top of the ops: never a device API."""

import loraga.ops  # noqa: F401  registers what the ops run
from loraga.linalg.svd import fix_signs, seed_of, truncated_svd
from loraga.linalg.svd import test_matrix as test_matrix

__all__ = ["fix_signs", "seed_of", "test_matrix", "truncated_svd"]
