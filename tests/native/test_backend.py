"""What loraga.ops.native registers: the same answers as the reference, and the reference where it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch

from loraga.ops import declared, native, native_core, reference

needs_native = pytest.mark.skipif(
    not native_core.available(), reason=f"no native core: {native_core.why_unavailable()}"
)
DEVICES = ["cpu"] + (["cuda"] if native_core.available("cuda") else [])


@pytest.fixture(autouse=True)
def _asked_anew():
    native._usable.cache_clear()
    yield
    native._usable.cache_clear()


def _grams(*shape: int) -> torch.Tensor:
    tall = torch.randn(*shape[:-1], 3 * shape[-1], dtype=torch.float64)
    return tall @ tall.mT


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 40, 40), (0, 4, 4)])
def test_the_native_answers_are_those_of_the_reference(shape, device):
    core = torch.randn(shape, device=device)
    u, s, vh = native.small_svd(core)
    assert (u.shape, s.shape, vh.shape) == (core.shape, core.shape[:-1], core.shape)
    assert torch.allclose(u * s[..., None, :] @ vh, core, atol=1e-5)
    assert torch.allclose(s, reference.small_svd(core)[1], atol=1e-5)
    gram = _grams(*shape).to(device)
    assert torch.allclose(native.cholesky_inverse(gram, 1e-9), reference.cholesky_inverse(gram, 1e-9), rtol=1e-9)
    totals = [torch.zeros(shape, device=device) for _ in range(2)]
    for total, backend in zip(totals, (native, reference), strict=True):
        assert bool(backend.gradient_add_(total, core, 0.5, None))
        assert not bool(backend.gradient_add_(total, core, 0.5, torch.tensor(False, device=device)))
    assert torch.equal(*totals)


@needs_native
def test_a_transposed_core_and_one_beyond_the_native_sizes():
    core = torch.randn(2, 9, 9).mT
    u, s, vh = native.small_svd(core)
    assert torch.allclose(u * s[..., None, :] @ vh, core, atol=1e-5)
    large = torch.randn(513, 513)
    assert torch.equal(native.small_svd(large)[1], reference.small_svd(large)[1])
    gram = _grams(513, 513)
    assert torch.equal(native.cholesky_inverse(gram, 0.0), reference.cholesky_inverse(gram, 0.0))
    six = torch.randn(2, 1, 2, 1, 2, 1)
    total = torch.zeros(8)
    native.gradient_add_(total, six, 1.0, None)
    assert torch.equal(total, six.reshape(-1))


def test_the_first_use_says_once_why_the_core_is_missing_and_the_reference_answers(monkeypatch):
    monkeypatch.setattr(native_core, "why_unavailable", lambda device: "no core here. Rebuild it with `pip install .`.")
    core = torch.randn(4, 4)
    with pytest.warns(UserWarning, match=r"no core here.*pip install.*slower torch operations on cpu"):
        _, s, _ = native.small_svd(core)
    assert torch.equal(s, reference.small_svd(core)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.small_svd(core)
        gram = _grams(3, 3)
        assert torch.equal(native.cholesky_inverse(gram, 0.0), reference.cholesky_inverse(gram, 0.0))
        native.gradient_add_(torch.zeros(4, 4), core, 1.0, None)


@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm: nothing is registered")
@pytest.mark.parametrize("op", ["small_svd", "cholesky_inverse", "gradient_add_"])
def test_registered_for_cuda(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"loraga::{op}", "CUDA")


@pytest.mark.parametrize("op", ["small_svd", "cholesky_inverse", "gradient_add_", "test_matrix_"])
def test_registered_for_the_cpu_where_it_wins_there(op):
    wins = op in ("cholesky_inverse", "test_matrix_") and native_core.available()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"loraga::{op}", "CPU") == wins


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU: what is registered for CUDA is called by hand above")
def test_the_dispatcher_takes_the_native_core():
    core = torch.randn(3, 30, 30, device="cuda")
    assert torch.equal(declared.small_svd(core)[1], native_core.jacobi_svd(core)[1])


@needs_native
@pytest.mark.parametrize(
    ("shape", "seed"), [((7, 5), 0), ((96, 80), 2**63 - 1), ((1, 3), -1), ((0, 4), 1), ((33, 31), 9)]
)
def test_the_numbers_of_a_test_matrix_are_the_reference_s_to_the_last_bit(shape, seed):
    ours, expected = torch.empty(shape), torch.empty(shape)
    declared.test_matrix_(ours, seed)
    reference.test_matrix_(expected, seed)
    assert torch.equal(ours, expected)


@needs_native
def test_what_is_no_matrix_to_fill_is_refused():
    with pytest.raises(TypeError, match="float32"):
        native_core.fill_uniform(torch.empty(2, 2, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="contiguous"):
        native_core.fill_uniform(torch.empty(4, 4).T[1:], 1)
    with pytest.raises(ValueError, match="CPU"):
        native_core.fill_uniform(torch.empty(2, 2, device="meta"), 1)
