"""Which sizes go to the native core: all that its kernels are made for, counted on its calls."""

from __future__ import annotations

import pytest
import torch

from loraga.ops import native, native_core, reference

LARGEST = 512  # the sketch for 128 triplets


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """What the native core is asked for, with its answers by the reference, so that no compiled core is needed."""
    asked: list[tuple[str, int]] = []

    def jacobi_svd(core: torch.Tensor) -> tuple[torch.Tensor, ...]:
        asked.append(("small_svd", core.shape[-1]))
        return *reference.small_svd(core), torch.zeros(len(core), dtype=torch.int32)

    def cholesky_inverse(gram: torch.Tensor, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(("cholesky_inverse", gram.shape[-1]))
        return reference.cholesky_inverse(gram, shift), torch.zeros(len(gram), dtype=torch.int32)

    monkeypatch.setattr(native_core, "jacobi_svd", jacobi_svd)
    monkeypatch.setattr(native_core, "cholesky_inverse", cholesky_inverse)
    monkeypatch.setattr(native, "_usable", lambda device: True)
    return asked


@pytest.mark.parametrize("k", [1, 8, 9, 80, LARGEST - 1, LARGEST, LARGEST + 1])
def test_the_native_core_gets_what_it_is_made_for(k, calls):
    for dtype in (torch.float64, torch.float32):
        assert native.cholesky_inverse(torch.eye(k, dtype=dtype)[None], 0.0).dtype == dtype
    native.small_svd(torch.eye(k)[None])
    assert calls == ([*2 * [("cholesky_inverse", k)], ("small_svd", k)] if k <= LARGEST else [])


@pytest.mark.skipif(not native_core.available(), reason="no native core")
def test_the_largest_size_is_one_that_the_core_takes():
    core = native_core._core()
    assert min(core.JACOBI_MAX_K, core.CHOLESKY_MAX_K) >= native._LARGEST_K == LARGEST
