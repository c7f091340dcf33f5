"""Randomized linear algebra, built from the ops only: nothing here depends on a device."""

import loraga.ops  # noqa: F401  registers what the ops run
from loraga.linalg.seeds import seed_of
from loraga.linalg.seeds import test_matrix as test_matrix
from loraga.linalg.svd import fix_signs, truncated_svd

__all__ = ["fix_signs", "seed_of", "test_matrix", "truncated_svd"]
