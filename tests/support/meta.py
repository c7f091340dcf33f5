"""Tests on the meta device, which stands for a GPU."""

from __future__ import annotations

import pytest
import torch

from loraga._version import release_of

needs_meta_products = pytest.mark.skipif(
    release_of(torch.__version__) < (2, 9),
    reason="the meta device of torch 2.8 has no products of half types with float32 results",
)
