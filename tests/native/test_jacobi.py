"""The native Jacobi SVD against float64 LAPACK."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraga.ops import native_core

if not native_core.available():
    pytest.skip(f"needs the native core: {native_core.why_unavailable()}", allow_module_level=True)

DEVICES = ["cpu"] + (["cuda"] if native_core.available("cuda") else [])
SIZES = [1, 2, 3, 17, 32, 80, 129]
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def _orthogonal(k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0]


def _with_spectrum(spectrum: torch.Tensor) -> torch.Tensor:
    k = len(spectrum)
    return _orthogonal(k) * spectrum.double() @ _orthogonal(k)


def _half_rank(k: int) -> torch.Tensor:
    rank = max(1, k // 2)
    return torch.randint(-3, 4, (k, rank)).double() @ torch.randint(-3, 4, (rank, k)).double()


CORES = {
    "random": lambda k: torch.randn(k, k, dtype=torch.float64),
    "triangular": lambda k: torch.randn(k, k, dtype=torch.float64).triu(),
    "graded": lambda k: _with_spectrum(torch.logspace(0, -12, k)),
    "clustered": lambda k: _with_spectrum(1 + 1e-7 * torch.rand(k, dtype=torch.float64)),
    "two clusters": lambda k: _with_spectrum(torch.where(torch.arange(k) < k // 2, 1.0, 1e-5)),
    "orthogonal": _orthogonal,
    "half rank": _half_rank,
    "rank one": lambda k: torch.ones(k, k, dtype=torch.float64),
    "zero": lambda k: torch.zeros(k, k, dtype=torch.float64),
    "one entry": lambda k: torch.zeros(k, k, dtype=torch.float64).index_put(
        (torch.tensor(k - 1), torch.tensor(0)), torch.tensor(-2.0, dtype=torch.float64)
    ),
    "diagonal": lambda k: torch.diag(torch.arange(k, dtype=torch.float64) - k // 2),
    "huge": lambda k: 1e30 * torch.randn(k, k, dtype=torch.float64),
    "tiny": lambda k: 1e-30 * torch.randn(k, k, dtype=torch.float64),
    "huge to tiny rows": lambda k: torch.logspace(30, -30, k, dtype=torch.float64)[:, None] * CORES["random"](k),
    "huge to tiny columns": lambda k: torch.logspace(-30, 30, k, dtype=torch.float64) * CORES["random"](k),
}


def check(core: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, status: torch.Tensor) -> None:
    """What issue 4 promises: singular values to 1e-6 of the largest, orthogonality to 1e-6, and the product."""
    core, u, s, vh = (tensor.double().cpu() for tensor in (core, u, s, vh))
    assert status.tolist() == [0] * len(core)
    true = torch.linalg.svdvals(core)
    largest = true[:, :1].clamp_min(torch.finfo(torch.float32).tiny)
    identity = torch.eye(core.shape[1], dtype=torch.float64)
    assert ((s - true) / largest).abs().max() <= 1e-6
    assert (u.mT @ u - identity).abs().max() <= 1e-6
    assert (vh @ vh.mT - identity).abs().max() <= 1e-6
    assert ((u * s[:, None] @ vh - core) / largest[..., None]).abs().max() <= 1e-6
    assert (s[:, 1:] <= s[:, :-1]).all()
    assert (s >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("kind", CORES)
def test_against_float64_lapack(kind, k, device):
    core = CORES[kind](k).float()[None].contiguous().to(device)
    check(core, *native_core.jacobi_svd(core))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "kinds"), [(256, ("random", "graded")), (257, ("half rank",)), (512, ("graded",))])
def test_wide_cores(k, kinds, device):
    core = torch.stack([CORES[kind](k) for kind in kinds]).float().to(device)
    check(core, *native_core.jacobi_svd(core))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [0, 1, 300])
def test_batches_equal_single_calls(batch, device):
    core = torch.randn(batch, 6, 6, device=device)
    u, s, vh, status = native_core.jacobi_svd(core)
    assert (u.shape, s.shape, vh.shape, status.shape) == ((batch, 6, 6), (batch, 6), (batch, 6, 6), (batch,))
    assert status.dtype == torch.int32
    if batch:
        check(core, u, s, vh, status)
        alone = native_core.jacobi_svd(core[-1:].clone())
        assert all(torch.equal(one, many[-1:]) for one, many in zip(alone, (u, s, vh, status), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_zero_singular_values_are_zero_and_their_vectors_complete_the_basis(device):
    core = CORES["half rank"](40).float()[None].to(device)
    u, s, vh, status = native_core.jacobi_svd(core)
    rank = int(torch.linalg.matrix_rank(core[0].double()))
    assert rank == 20
    assert (s[0, rank:] == 0).all()
    check(core, u, s, vh, status)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 24),
    batch=st.integers(1, 3),
    rank=st.integers(0, 24),
    exponent=st.integers(-30, 30),
    decades=st.floats(0, 8),
    repeats=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_any_spectrum(k, batch, rank, exponent, decades, repeats, seed):
    torch.manual_seed(seed)
    falling = 10.0 ** -(decades * torch.rand(batch, k, dtype=torch.float64))
    spectrum = falling[:, torch.arange(k) // repeats] * (torch.arange(k) < rank) * 10.0**exponent
    core = torch.stack([_with_spectrum(one) for one in spectrum]).float()
    check(core, *native_core.jacobi_svd(core))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_core_that_is_not_finite_is_told_and_harms_no_other(bad, device):
    core = torch.randn(3, 9, 9, device=device)
    alone = native_core.jacobi_svd(core[2:].clone())
    core[1, 8, 4] = bad
    u, s, vh, status = native_core.jacobi_svd(core)
    assert status.tolist() == [0, 2, 0]
    assert u[1].isnan().all() and s[1].isnan().all() and vh[1].isnan().all()
    assert torch.equal(u[2:], alone[0]) and torch.equal(s[2:], alone[1]) and torch.equal(vh[2:], alone[2])


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_numbers_of_float32(device):
    core = torch.diag(torch.tensor([LARGEST_FLOAT32, -LARGEST_FLOAT32, 1.0])).to(device)[None]
    _, s, _, status = native_core.jacobi_svd(core)
    assert status.item() == 0
    assert s[0].tolist() == [LARGEST_FLOAT32, LARGEST_FLOAT32, 0.0]  # 1 is noise beside 3e38


def _raw_call(core: torch.Tensor, workspace: torch.Tensor, **options: float) -> int:
    """One core through the module itself, with options that the Python face does not offer. Returns the status."""
    native = native_core._core()
    k = core.shape[1]
    u, s, vh = torch.empty(k, k), torch.empty(k), torch.empty(k, k)
    status = torch.full((1,), -1, dtype=torch.int32)
    problem = native.JacobiProblem(
        **{name: t.data_ptr() for name, t in {"core": core, "u": u, "s": s, "vh": vh, "status": status}.items()},
        batch=len(core),
        k=k,
    )
    chosen = native.JacobiOptions()
    for name, value in options.items():
        setattr(chosen, name, value)
    native.cpu.jacobi_svd(problem, chosen, workspace.data_ptr(), workspace.numel() * workspace.element_size())
    return status.item()


def _workspace(k: int) -> torch.Tensor:
    return torch.empty(native_core._core().cpu.jacobi_svd_workspace(1, k), dtype=torch.uint8)


def test_too_few_sweeps_are_told():
    core = torch.randn(1, 20, 20)
    assert _raw_call(core, _workspace(20), max_sweeps=2) == 1
    assert _raw_call(core, _workspace(20)) == 0


@pytest.mark.parametrize("kind", ["random", "graded", "two clusters", "half rank", "huge to tiny columns"])
def test_twelve_sweeps_are_enough(kind):
    assert _raw_call(CORES[kind](129).float()[None], _workspace(129), max_sweeps=12) == 0


def test_the_core_names_what_is_wrong_with_a_call():
    core = torch.randn(1, 4, 4)
    with pytest.raises(ValueError, match=r"workspace has 8 bytes, needed are \d+ .*csrc/.*:\d+"):
        _raw_call(core, torch.empty(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_sweeps is 0"):
        _raw_call(core, _workspace(4), max_sweeps=0)
    with pytest.raises(ValueError, match="k is 513, allowed are 1 to 512"):
        native_core._core().cpu.jacobi_svd_workspace(1, 513)
    with pytest.raises(ValueError, match="batch is -1"):
        native_core._core().cpu.jacobi_svd_workspace(-1, 4)


def _digest(device: str) -> str:
    generator = torch.Generator().manual_seed(7)
    core = torch.randn(5, 50, 50, generator=generator).to(device)
    parts = native_core.jacobi_svd(core)
    return hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again_and_in_another_process(device):
    here = _digest(device)
    assert _digest(device) == here
    program = f"import runpy; print(runpy.run_path({__file__!r})['_digest']({device!r}))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU: the kernel runs on emulated threads in test_cpp.py")
def test_runs_on_the_current_stream_without_waiting():
    core = torch.randn(8, 80, 80, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        native_core.jacobi_svd(core * 2)  # what is loaded and allocated once may wait for the device
        torch.cuda._sleep(200_000_000)
        scaled = core * 2  # ready only after the sleep
        _, s, _, _ = native_core.jacobi_svd(scaled)
        assert not stream.query()
    stream.synchronize()
    assert torch.allclose(s.double(), 2 * torch.linalg.svdvals(core.double()), rtol=1e-5)


@pytest.mark.parametrize(
    ("core", "error", "says"),
    [
        ([[1.0]], TypeError, "torch.Tensor, not list"),
        (torch.ones(1, 2, 2, dtype=torch.float64), TypeError, "float32, not torch.float64"),
        (torch.ones(2, 2), ValueError, r"\(batch, k, k\), not \(2, 2\)"),
        (torch.ones(1, 2, 3), ValueError, r"\(batch, k, k\), not \(1, 2, 3\)"),
        (torch.ones(1, 513, 513), ValueError, "k = 513; allowed are 1 to 512"),
        (torch.ones(1, 0, 0), ValueError, "k = 0; allowed are 1 to 512"),
        (torch.arange(8.0).view(2, 2, 2).mT, ValueError, "contiguous"),
        (torch.ones(1, 2, 2, device="meta"), ValueError, "not on meta"),
    ],
)
def test_wrong_arguments(core, error, says):
    with pytest.raises(error, match=says):
        native_core.jacobi_svd(core)
