"""The native Cholesky inverse in float64 and float32 against its definition and LAPACK."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraga.ops import native_core, reference

if not native_core.available():
    pytest.skip(f"needs the native core: {native_core.why_unavailable()}", allow_module_level=True)

DEVICES = ["cpu"] + (["cuda"] if native_core.available("cuda") else [])
DTYPES = [torch.float64, torch.float32]
EPSILON = torch.finfo(torch.float64).eps


def gram(k: int, condition: float = 10.0, scale: float = 1.0, seed: int = 0, clusters: int = 0) -> torch.Tensor:
    """(k, k) with eigenvalues from 1 to 1 / condition, graded or in clusters, times `scale`."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=g)).Q
    share = torch.linspace(0, 1, k, dtype=torch.float64)
    if clusters:
        share = (share * clusters).round() / clusters
    full = (q * condition**-share) @ q.T * scale
    return (full + full.T) / 2


def check(matrices: torch.Tensor, inverse: torch.Tensor, status: torch.Tensor, shift: float = 0.0) -> None:
    """X is lower triangular and X (gram + shift · trace) Xᵀ = 1 to what a backward stable method in its dtype leaves.

    A computed L has L Lᵀ = gram + E with |E| ≤ about k · eps · |gram| (Higham, 2002, theorem 10.3), which X turns into
    k · eps · condition.
    """
    assert inverse.dtype == matrices.dtype
    epsilon = torch.finfo(inverse.dtype).eps
    matrices, inverse = matrices.double().cpu(), inverse.double().cpu()
    k = matrices.shape[-1]
    assert status.tolist() == [0] * len(matrices)
    assert torch.equal(inverse, inverse.tril()) and (inverse.diagonal(dim1=-2, dim2=-1) > 0).all()
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    shifted = matrices + shift * trace * torch.eye(k, dtype=torch.float64)
    values = torch.linalg.eigvalsh(shifted / trace)
    condition = values[:, -1] / values[:, 0].clamp_min(epsilon / 10)
    residual = inverse @ shifted @ inverse.mT - torch.eye(k, dtype=torch.float64)
    assert (residual.abs().amax(dim=(-2, -1)) <= 4 * k * epsilon * condition).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 17, 32, 80, 129, 256])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [*((torch.float64, condition) for condition in (1.0, 1e3, 1e8, 1e12)), (torch.float32, 1.0), (torch.float32, 1e3)],
)
def test_against_the_definition(k, dtype, condition, device):
    matrices = torch.stack([gram(k, condition), gram(k, condition, clusters=2), gram(k, condition, seed=1)])
    matrices = matrices.to(device, dtype)
    check(matrices, *native_core.cholesky_inverse(matrices))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [257, 300, 384, 512])
def test_wide_matrices_and_bad_ones_among_them(k, dtype, device):
    good = gram(k, 100.0)
    late, infinite, nan = good.clone(), good.clone(), good.clone()
    late[k - 1, k - 1] = -1.0
    infinite[k - 1, k - 2] = torch.inf
    nan[k // 2, 3] = torch.nan
    matrices = torch.stack([good, late, infinite, nan, torch.zeros_like(good), good]).to(device, dtype)
    inverse, status = native_core.cholesky_inverse(matrices)
    assert status.tolist() == [0, k, k, k // 2 + 1, 1, 0]
    assert inverse[1:5].isnan().all()
    check(matrices[[0, 5]], inverse[[0, 5]], status[[0, 5]])
    assert torch.equal(inverse[0], inverse[5])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [*((torch.float64, 10.0**n) for n in (-300, -30, 30, 300)), (torch.float32, 1e-30), (torch.float32, 1e30)],
)
def test_scale_goes_through(dtype, scale, device):
    plain = gram(33)[None].to(device, dtype)
    inverse, status = native_core.cholesky_inverse(plain * scale)
    assert status.tolist() == [0]
    expected = native_core.cholesky_inverse(plain)[0]
    epsilon = torch.finfo(dtype).eps
    assert torch.allclose(inverse * scale**0.5, expected, rtol=1e4 * epsilon, atol=1e2 * epsilon)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [2, 5, 80])
def test_as_close_as_lapack(k, device):
    """Against an inverse of a factor that is known exactly: small whole numbers."""
    g = torch.Generator().manual_seed(k)
    lower = torch.randint(-1, 2, (k, k), generator=g).double().tril(-1)
    lower[(torch.arange(k)[:, None] - torch.arange(k)) > 3] = 0  # a band, or the inverse would grow beyond use
    lower += 4 * torch.eye(k, dtype=torch.float64)
    matrices = (lower @ lower.T)[None].to(device)  # exact
    inverse, status = native_core.cholesky_inverse(matrices)
    identity = torch.eye(k, dtype=torch.float64)
    assert status.tolist() == [0]
    ours = (inverse[0].cpu() @ lower - identity).abs().max()
    theirs = (reference.cholesky_inverse(matrices, 0.0)[0].cpu() @ lower - identity).abs().max()
    assert ours <= 4 * theirs + k * EPSILON


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 300])
def test_batches_equal_single_calls(batch, dtype, device):
    matrices = torch.stack([gram(6, seed=i) for i in range(batch)] or [gram(6)])[:batch].to(device, dtype)
    inverse, status = native_core.cholesky_inverse(matrices)
    assert inverse.shape == (batch, 6, 6) and status.shape == (batch,) and status.dtype == torch.int32
    if batch:
        check(matrices, inverse, status)
        alone, _ = native_core.cholesky_inverse(matrices[-1:].clone())
        assert torch.equal(alone, inverse[-1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_status_is_the_order_of_the_first_bad_minor_and_the_inverse_is_nan(dtype, device):
    good, zero = gram(7), torch.zeros(7, 7, dtype=torch.float64)
    rank_one = torch.ones(7, 7, dtype=torch.float64)
    negative, infinite, nan = gram(7), gram(7), gram(7)
    negative[4, 4] = -1.0
    infinite[6, 2] = torch.inf
    nan[3, 1] = torch.nan
    matrices = torch.stack([good, zero, rank_one, negative, infinite, nan, good]).to(device, dtype)
    inverse, status = native_core.cholesky_inverse(matrices)
    assert status.tolist() == [0, 1, 2, 5, 7, 4, 0]
    bad = (status != 0).cpu()
    assert inverse[bad].isnan().all() and inverse[~bad].isfinite().all()
    assert torch.equal(inverse[0], inverse[6])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [6, 40, 100])
@pytest.mark.parametrize("rank", [1, 5])
def test_rounding_below_the_shift_makes_no_pivot_bad(rank, k, device):
    """Gram matrices of float32 blocks of low rank, with a shift that is smaller than their own rounding."""
    shift = 1e-8
    y = torch.randn(20, 3 * k, rank) @ torch.randn(20, rank, k)
    y = (y / y.norm(dim=-2, keepdim=True)).to(device)
    gram = y.mT @ y
    assert torch.linalg.eigvalsh(gram.double()).min() < -shift * k
    inverse, status = native_core.cholesky_inverse(gram, shift)
    assert (status == 0).all() and inverse.isfinite().all()
    assert inverse.diagonal(dim1=-2, dim2=-1).max() <= 1.001 * (shift * k) ** -0.5
    assert torch.linalg.matrix_norm(y.double() @ inverse.double().mT, 2).max() < 10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "shift"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_shift_makes_a_singular_matrix_usable(dtype, shift, device):
    for k in (5, 80):
        matrices = torch.ones(1, k, k, dtype=dtype, device=device)
        inverse, status = native_core.cholesky_inverse(matrices, shift)
        check(matrices, inverse, status, shift)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_lower_triangle_is_read(dtype, device):
    matrices = gram(20)[None].to(device, dtype)
    spoilt = matrices.tril() + torch.full_like(matrices, torch.nan).triu(1)
    assert torch.equal(native_core.cholesky_inverse(spoilt)[0], native_core.cholesky_inverse(matrices)[0])


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 40),
    batch=st.integers(1, 3),
    decades=st.floats(0, 11),
    exponent=st.integers(-120, 120),
    clusters=st.integers(0, 4),
    shift=st.sampled_from([0.0, 1e-15, 1e-9, 1e-2]),
    seed=st.integers(0, 2**31),
)
def test_any_positive_definite_matrix(k, batch, decades, exponent, clusters, shift, seed):
    scale = 10.0**exponent
    matrices = torch.stack([gram(k, 10.0**decades, scale, seed + i, clusters) for i in range(batch)])
    inverse, status = native_core.cholesky_inverse(matrices, shift)
    check(matrices, inverse, status, shift)
    expected = reference.cholesky_inverse(matrices, shift)
    drift = (inverse - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))
    assert (drift <= 8 * k * EPSILON * 10.0**decades + 1e-14).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(dtype, device):
    matrices = torch.stack([gram(50, 1e4, seed=i) for i in range(4)]).to(device, dtype)
    assert torch.equal(
        native_core.cholesky_inverse(matrices, 1e-15)[0], native_core.cholesky_inverse(matrices, 1e-15)[0]
    )


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU: the kernel runs on emulated threads in test_cpp.py")
def test_runs_on_the_current_stream_without_waiting():
    matrices = gram(80).expand(8, 80, 80).contiguous().to("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        native_core.cholesky_inverse(matrices * 4)  # what is loaded and allocated once may wait for the device
        torch.cuda._sleep(200_000_000)
        quadruple = matrices * 4  # ready only after the sleep
        inverse, _ = native_core.cholesky_inverse(quadruple)
        assert not stream.query()
    stream.synchronize()
    assert torch.allclose(inverse * 2, native_core.cholesky_inverse(matrices)[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("matrices", "shift", "error", "says"),
    [
        ([[1.0]], 0.0, TypeError, "torch.Tensor, not list"),
        (torch.ones(1, 2, 2).half(), 0.0, TypeError, "float64 or float32, not torch.float16.*torch.float64"),
        (torch.ones(2, 2).double(), 0.0, ValueError, r"\(batch, k, k\), not \(2, 2\)"),
        (torch.ones(1, 2, 3).double(), 0.0, ValueError, r"\(batch, k, k\), not \(1, 2, 3\)"),
        (torch.ones(1, 513, 513).double(), 0.0, ValueError, "k = 513; allowed are 1 to 512"),
        (torch.ones(1, 0, 0).double(), 0.0, ValueError, "k = 0; allowed are 1 to 512"),
        (torch.arange(8.0).double().view(2, 2, 2).mT, 0.0, ValueError, "contiguous"),
        (torch.ones(1, 2, 2, dtype=torch.float64, device="meta"), 0.0, ValueError, "not on meta"),
        (torch.ones(1, 2, 2).double(), -1.0, ValueError, "shift is -1"),
        (torch.ones(1, 2, 2).double(), float("nan"), ValueError, "shift is nan"),
    ],
)
def test_wrong_arguments(matrices, shift, error, says):
    with pytest.raises(error, match=says):
        native_core.cholesky_inverse(matrices, shift)
