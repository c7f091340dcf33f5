"""Shared by the kernel tests: operands of all kinds, and the error bound held against them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from loraga.kernels.common import INTERPRETED
from loraga.ops import reference

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="TRITON_INTERPRET=0 asks for a GPU, and there is none"
)


def operand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """What `test_matrix_` fills."""
    out = torch.empty(rows, columns, device=DEVICE)
    reference.test_matrix_(out, seed)
    return out


def count_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    """The names of the kernels of `modules` that are launched from now on."""
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return launches


def assert_as_good(result: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, slack: float = 3.0) -> None:
    """The error of `result` against the float64 `truth` is at most `slack` times that of the eager op, plus dust.

    Errors are taken relative to the largest entry of the truth: sums of many terms cancel in single entries.
    """
    assert result.shape == truth.shape
    assert torch.isfinite(result).all(), "an entry was not written, or is not finite"
    size = truth.abs().max().clamp_min(1e-300)
    error = (result.double() - truth).abs().max() / size
    allowed = slack * (eager.double() - truth).abs().max() / size + 2e-6
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
