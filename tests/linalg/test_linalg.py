"""Truncated SVD: against float64 over shapes and spectra, deterministic, signs fixed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraga.linalg import fix_signs, seed_of, test_matrix, truncated_svd
from loraga.linalg.svd import factorize
from loraga.ops import declared, reference

SPECTRA = {
    "polynomial": lambda k: torch.arange(1, k + 1, dtype=torch.float64) ** -1.0,
    "exponential": lambda k: torch.exp(-torch.arange(k, dtype=torch.float64) / 5),
    "staircase": lambda k: torch.tensor([10.0 ** -(i // 10) for i in range(k)], dtype=torch.float64),
    "spiked": lambda k: torch.cat((torch.tensor([100.0, 50.0]), torch.ones(k))).double()[:k],
    "rank three": lambda k: torch.cat((torch.tensor([3.0, 2.0, 1.0]), torch.zeros(k))).double()[:k],
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
}


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q
    return u * SPECTRA[spectrum](k) @ v.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(128, 128), (150, 61), (61, 150), (20, 9), (1, 7), (5, 1)])
def test_truncated_svd(m, n, spectrum, dtype):
    g = matrix(m, n, spectrum).to(dtype)
    rank = min(16, m, n)
    f = truncated_svd(g, rank)
    truth = torch.linalg.svdvals(g.double())
    assert f.U.shape == (m, rank) and f.S.shape == (rank,) and f.Vh.shape == (rank, n)
    eye = torch.eye(rank)
    assert (f.U.T @ f.U - eye).abs().max() < 2e-6 and (f.Vh @ f.Vh.T - eye).abs().max() < 2e-6
    assert (f.S.diff() <= 1e-6 * truth[0]).all()
    # against the best rank-k error, and of the whole: a flat bulk is the slow case
    error = (g.double() - (f.U * f.S).double() @ f.Vh.double()).norm()
    rounding = 2e-6 if dtype == torch.float32 else 1e-5
    assert error <= 1.002 * truth[rank:].norm() + rounding * truth.norm()
    assert (f.S.double() - truth[:rank]).abs().max() <= 2e-2 * truth[0]


KINDS = ("polynomial", "rank three", "zero", "huge", "tiny")


def batch_of(m: int, n: int, kinds: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
    scale = {"huge": 1e35, "tiny": 1e-35}
    parts = [matrix(m, n, kind if kind in SPECTRA else "exponential", seed=i) for i, kind in enumerate(kinds)]
    rows = [
        (part * scale.get(kind, 1.0) / max(part.abs().max(), 1e-9)) for part, kind in zip(parts, kinds, strict=True)
    ]
    return torch.stack(rows).to(dtype) if rows else torch.empty(0, m, n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [(), KINDS[:1], KINDS])
@pytest.mark.parametrize(("m", "n"), [(64, 64), (50, 83), (83, 50)])
def test_a_batch_is_its_matrices(m, n, kinds, dtype):
    """Each as good as the exact SVD says, whatever its neighbours; as alone up to rounding."""
    g, rank = batch_of(m, n, kinds, dtype), 6
    f = truncated_svd(g, rank, seed=range(len(kinds)))
    assert (
        f.U.shape == (len(kinds), m, rank) and f.S.shape == (len(kinds), rank) and f.Vh.shape == (len(kinds), rank, n)
    )
    for i in range(len(kinds)):
        truth, eye = torch.linalg.svdvals(g[i].double()), torch.eye(rank)
        assert (f.U[i].T @ f.U[i] - eye).abs().max() < 2e-6 and (f.Vh[i] @ f.Vh[i].T - eye).abs().max() < 2e-6
        product = (f.U[i] * f.S[i]).double() @ f.Vh[i].double()
        assert (g[i].double() - product).norm() <= 1.002 * truth[rank:].norm() + 1e-5 * truth.norm()
        alone = truncated_svd(g[i], rank, seed=i)
        assert ((alone.U * alone.S).double() @ alone.Vh.double() - product).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-35, 1e35])
def test_products_stay_in_range(size, dtype):
    """The worst case for overflow: long rows of one huge value."""
    g = torch.full((6, 5000), size).to(dtype)
    f = truncated_svd(g, 2)
    truth = float(g[0, 0]) * (6 * 5000) ** 0.5
    # equal numbers round alike: with one accumulator, as in some BLAS, a float32 sum of 5000 is off by so much
    bound = 5000 * 2.0**-24
    assert float(f.S[0]) == pytest.approx(truth, rel=bound) and float(f.S[1]) < bound * truth
    assert torch.allclose((f.U[:, :1] * f.S[:1]) @ f.Vh[:1] / g[0, 0].float(), torch.ones(6, 5000), atol=bound)


def test_a_matrix_with_nan_leaves_the_others_of_its_batch_alone():
    g = batch_of(40, 30, KINDS[:3], torch.float32)
    whole = truncated_svd(g, 4, seed=range(3))
    g[1, 3, 5] = float("nan")
    f = truncated_svd(g, 4, seed=range(3))
    assert not f.S[1].isfinite().all()
    assert all(torch.equal(a[::2], b[::2]) for a, b in ((f.U, whole.U), (f.S, whole.S), (f.Vh, whole.Vh)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", ["polynomial", "exponential", "spiked"])
def test_half_precision_operands_lose_no_energy(spectrum, dtype):
    g = matrix(200, 160, spectrum).to(dtype)
    f = truncated_svd(g, 16)
    best = torch.linalg.svdvals(g.double())[:16]
    kept = (f.U.double().T @ g.double() @ f.Vh.double().T).square().sum()
    assert 1 - kept / best.square().sum() < 1e-4
    assert (f.S.double() - best).abs().max() < 2e-4 * best[0]


@pytest.mark.parametrize("seeds", [3, [1], [1, 2, 3]])
def test_seeds_must_match_the_batch(seeds):
    with pytest.raises(ValueError, match="seed"):
        truncated_svd(torch.randn(2, 9, 7), 3, seed=seeds)


def test_signs_are_fixed_and_products_kept():
    u, vh = torch.randn(9, 4), torch.randn(4, 7)
    fixed_u, fixed_vh = fix_signs(u, vh)
    assert (fixed_u.gather(0, fixed_u.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.allclose(fixed_u @ fixed_vh, u @ vh)
    batched = fix_signs(torch.stack((u, -u)), torch.stack((vh, vh)))
    assert torch.equal(batched[0][0], fixed_u) and torch.equal(batched[0][1], fixed_u)
    assert torch.equal(batched[1][0], fixed_vh) and torch.equal(batched[1][1], -fixed_vh)


def test_transpose_gives_the_same_triplets():
    g = matrix(90, 40, "exponential").float()
    a, b = truncated_svd(g, 6), truncated_svd(g.T, 6)
    assert torch.allclose((a.U * a.S) @ a.Vh, ((b.U * b.S) @ b.Vh).T, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
def test_scale_changes_only_the_values(scale):
    g = matrix(60, 50, "polynomial").float()
    a, b = truncated_svd(g, 5), truncated_svd(g * scale, 5)
    assert torch.allclose(a.U, b.U, atol=1e-4) and torch.allclose(a.Vh, b.Vh, atol=1e-4)
    assert torch.allclose(a.S, b.S / scale, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 80), n=st.integers(1, 80), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_exact_low_rank_is_recovered(m, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, m, n)
    g = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    f = truncated_svd(g, rank, seed=seed)
    assert ((f.U * f.S) @ f.Vh - g).abs().max() <= 1e-5 * g.norm()


@pytest.mark.parametrize(("shape", "passes"), [((30, 90), 1), ((90, 30), 1), ((32, 32), 1), ((90, 80), 4)])
def test_a_block_that_spans_the_smaller_side_takes_one_pass(shape, passes, monkeypatch):
    """Its range is all there is, and more passes would not change it."""
    asked = []
    subspace = declared.subspace
    monkeypatch.setattr(declared, "subspace", lambda g, k, n, seeds: asked.append(n) or subspace(g, k, n, seeds))
    g = matrix(*shape, "polynomial").float()
    f, truth = truncated_svd(g, 4), torch.linalg.svdvals(g.double())
    assert asked == [passes]
    assert torch.allclose(f.S.double(), truth[:4], rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 8, -1])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=r"between 1 and min\(m, n\) = 7"):
        truncated_svd(torch.randn(9, 7), rank)


@pytest.mark.parametrize("k", [3, 40, 90])
@pytest.mark.parametrize("spectrum", ["flat", "falling", "steep", "rank two", "zero"])
def test_svd_of_a_core_by_eigenvalues(k, spectrum):
    """What a GPU does with cores that the native core is too small for."""
    index = torch.arange(k, dtype=torch.float64)
    values = {
        "flat": torch.ones(k).double(),
        "falling": 1 / (1 + index),
        "steep": 10.0 ** (-12 * index / k),
        "rank two": (index < 2).double(),
        "zero": torch.zeros(k).double(),
    }[spectrum]
    left, right = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q for _ in range(2))
    core = torch.stack(((left * values) @ right, (right * values) @ left))
    u, s, vh = reference._svd_by_eigenvalues(core)
    assert ((u * s[:, None]) @ vh - core).abs().max() <= 1e-5
    assert (s - torch.linalg.svdvals(core)).abs().max() <= 1e-8 and (s.diff() <= 0).all()
    for basis in (u, vh):
        assert (basis.mT @ basis - torch.eye(k, dtype=torch.float64)).abs().max() <= 2e-5


def test_factorize_works_from_any_columns():
    """Q need not be orthonormal, and may be rank-deficient."""
    q, z = torch.randn(50, 6), torch.randn(6, 30)
    q[:, 4] = q[:, 3]
    q[:, 5] = 0
    f, spectrum = factorize(q, z, 3)
    truth = torch.linalg.svdvals((q @ z).double())
    assert torch.allclose(spectrum.double(), truth[:6], atol=1e-4 * float(truth[0]))
    assert ((f.U * f.S) @ f.Vh - q @ z).norm() <= truth[3:].norm() * 1.001
    both, spectra = factorize(torch.stack((q, torch.zeros(50, 6))), torch.stack((z, z)), 3)
    assert torch.allclose(spectra[0], spectrum, atol=1e-5 * float(truth[0])) and (spectra[1] == 0).all()
    assert torch.allclose((both.U[0] * both.S[0]) @ both.Vh[0], (f.U * f.S) @ f.Vh, atol=1e-5 * float(truth[0]))


def test_streams_differ_by_seed_and_name_and_not_by_process():
    assert len({seed_of(s, n) for s in range(3) for n in ("a", "b", "model.layers.0.q")}) == 9
    code = "from loraga.linalg import seed_of; print(seed_of(3, 'layer'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == seed_of(3, "layer")
    assert torch.equal(test_matrix(4, 5, 9, "cpu"), test_matrix(4, 5, 9, "cpu"))


@pytest.mark.parametrize("rows", [2, 13, 60])
def test_the_embedding_of_a_few_tokens(rows):
    """A gradient of a large vocabulary of which a batch has few tokens."""
    g = torch.zeros(60000, 96)
    tokens = torch.randperm(len(g))[:rows]
    g[tokens] = torch.randn(rows, 96) * torch.logspace(0, -2, 96)
    f = truncated_svd(g, 16)
    truth = torch.linalg.svd(g[tokens].double(), full_matrices=False)
    known = min(rows, 16)
    assert (f.S[:known].double() - truth.S[:known]).abs().max() < 1e-5 * truth.S[0]
    assert (f.S[known:] < 1e-5 * truth.S[0]).all()
    left = ((f.U * f.S)[tokens].double() @ f.Vh.double() - g[tokens].double()).square().sum().sqrt()
    assert left < 1.001 * truth.S[16:].norm() + 1e-5 * truth.S[0]
    assert (f.U.T @ f.U - torch.eye(16)).abs().max() < 2e-6 and (f.Vh @ f.Vh.T - torch.eye(16)).abs().max() < 2e-6
