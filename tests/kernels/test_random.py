"""The counter-based stream: the kernel's numbers are the reference's."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, needs_device, random_matrix

from loraga.kernels import random

pytestmark = needs_device


@pytest.mark.parametrize("shape", [(1, 1), (7, 12), (300, 5), (64, 64)])
def test_fill_is_the_reference_bit_for_bit(shape):
    for seed in (0, 1, 2**31 + 3, 2**62 + 12345):
        out = torch.empty(shape, device=DEVICE)
        random.fill(out, seed)
        assert torch.equal(out, random_matrix(*shape, seed))
