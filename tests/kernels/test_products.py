"""The product kernels against float64, where a bound is what the eager op makes in the same dtype."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from kernel_operands import DEVICE, DTYPES, assert_as_good, needs_device, operand

from loraga.estimators import LayerSpec, Streaming, finish
from loraga.factors import Factors
from loraga.kernels import accumulate, choice, commit, random, streaming, subspace, thin, tuning
from loraga.kernels.dev import search
from loraga.ops import reference
from loraga.ops import triton as dispatch

pytestmark = needs_device

# (T, m, n, k): powers of two, ragged, wide, tall, fewer tokens than columns, one token, more than one block of columns
SHAPES = [(128, 64, 128, 64), (67, 45, 83, 19), (40, 16, 200, 33), (50, 208, 32, 16), (5, 48, 64, 40), (1, 7, 5, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_project(shape, dtype):
    tokens, _, n, k = shape
    a, b = operand(2, tokens, n, dtype=dtype), operand(2, n, k, dtype=dtype, seed=1)
    truth = thin.project_reference(a, b)
    assert_as_good(thin.project(a, b), truth, a.float() @ b.float())
    rounded = thin.project(a, b, out_dtype=dtype)
    assert rounded.dtype == dtype
    assert_as_good(rounded, truth, (a.float() @ b.float()).to(dtype), slack=1.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fold(shape, dtype, transposed):
    tokens, m, _, k = shape
    a, p = operand(2, tokens, m, dtype=dtype), operand(2, tokens, k, dtype=dtype, seed=1)
    result = thin.fold(a, p, scale=0.25, transposed=transposed)
    result = result.mT if transposed else result
    assert_as_good(result, thin.fold_reference(a, p, 0.25), 0.25 * (a.float().mT @ p.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 8])
def test_fold_onto_a_sum(dtype, columns):
    a, p = operand(1, 70, 45, dtype=dtype), operand(1, 70, 24, dtype=dtype, seed=1)
    left, right = operand(45, 37, seed=2), operand(37, 24 - columns, seed=3)
    truth = thin.fold_reference(a, p, 2.0, (left, right))
    eager = 2.0 * (a.float().mT @ p.float())
    eager[..., : 24 - columns] += left @ right
    assert_as_good(thin.fold(a, p, scale=2.0, onto=(left, right)), truth, eager)
    strided = (left.t().contiguous().t(), right.t().contiguous().t())
    assert_as_good(thin.fold(a, p, scale=2.0, onto=strided), truth, eager)


@pytest.mark.parametrize("layout", ["rows", "columns", "slices"])
def test_strided_operands(layout):
    a, b = operand(2, 60, 50), operand(2, 50, 20, seed=1)
    if layout == "columns":
        a, b = (t.mT.contiguous().mT for t in (a, b))
    elif layout == "slices":
        a, b = (torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0] for t in (a, b))
    assert_as_good(thin.project(a, b), thin.project_reference(a, b), a @ b)
    p = operand(2, 60, 20, seed=2)
    assert_as_good(thin.fold(a, p), thin.fold_reference(a, p), a.mT @ p)


def test_sums_are_cut_and_added_in_fixed_order(monkeypatch):
    counts = []
    summed = thin.sum_splits
    monkeypatch.setattr(thin, "sum_splits", lambda partial, out: counts.append(len(partial)) or summed(partial, out))
    a, b = operand(1, 16, 3000), operand(1, 3000, 16, seed=1)
    first = thin.project(a, b)
    assert counts and counts[0] > 1
    assert_as_good(first, thin.project_reference(a, b), a @ b)
    assert torch.equal(first, thin.project(a, b))
    p = operand(1, 3000, 16, seed=2)
    a = operand(1, 3000, 16, seed=3)
    assert_as_good(thin.fold(a, p, transposed=True).mT, thin.fold_reference(a, p), a.mT @ p)
    assert len(counts) == 3


def test_more_columns_than_one_block_holds():
    widest = max(columns for columns, _ in tuning.entries("project", torch.float32, 90))
    k = widest + 16
    a, b, p = operand(1, 32, 48), operand(1, 48, k, seed=1), operand(1, 32, k, seed=2)
    assert_as_good(thin.project(a, b), thin.project_reference(a, b), a @ b)
    assert_as_good(thin.fold(a, p), thin.fold_reference(a, p), a.mT @ p)
    drawn = random_matrix(48, k, 5)
    assert_as_good(thin.project(a, None, seeds=[5], k=k), thin.project_reference(a, drawn), a @ drawn)


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    out = torch.empty(rows, columns, device=DEVICE)
    reference.test_matrix_(out, seed)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (7, 12), (300, 5), (64, 64)])
def test_fill_is_the_reference_bit_for_bit(shape):
    for seed in (0, 1, 2**31 + 3, 2**62 + 12345):
        out = torch.empty(shape, device=DEVICE)
        random.fill(out, seed)
        assert torch.equal(out, random_matrix(*shape, seed))


@pytest.mark.parametrize("k", [4, 20, 36, 64])
def test_a_drawn_operand_is_the_filled_one(k):
    a, seeds = operand(3, 50, 90), [3, 2**62 + 1, 9]
    filled = torch.stack([random_matrix(90, k, seed) for seed in seeds])
    assert_as_good(thin.project(a, None, seeds=seeds, k=k), thin.project_reference(a, filled), a @ filled)


def test_drawing_says_what_it_cannot():
    with pytest.raises(ValueError, match="multiple of 4"):
        thin.project(operand(1, 8, 8), None, seeds=[1], k=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_left_and_right_product(shape, dtype):
    tokens, m, n, k = shape
    x, dy = operand(tokens, n, dtype=dtype), operand(tokens, m, dtype=dtype, seed=1)
    v, q, zv = operand(n, k, seed=2), operand(m, k, seed=3), operand(k, max(1, k - 2), seed=4)
    z = operand(k, n, seed=5)
    for scale, onto in ((1.0, (None, None)), (0.5, (q, zv))):
        eager = reference.left_product(x, dy, v, scale, False, *onto)
        p = x.double() @ v.to(dtype).double()  # v in the dtype of x is part of the op
        truth = thin.fold_reference(dy, p, scale, onto if onto[0] is not None else None)
        result = streaming.left_product(x, dy, v, scale, False, *onto)
        assert result.stride() == eager.stride()
        assert_as_good(result, truth, eager)
    c = operand(k, k, seed=6)
    for scale, onto in ((1.0, (None, None)), (0.5, (c, z))):
        eager = reference.right_product(x, dy, q, scale, False, *onto)
        r = dy.double() @ q.to(dtype).double()
        truth = scale * (r.mT @ x.double()) + (c.double() @ z.double() if onto[0] is not None else 0.0)
        assert_as_good(streaming.right_product(x, dy, q, scale, False, *onto), truth, eager)


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 64, 128), (67, 45, 83), (300, 16, 24), (1, 7, 5)])
def test_accumulate(shape, dtype, buffer):
    tokens, m, n = shape
    x, dy, g = operand(tokens, n, dtype=dtype), operand(tokens, m, dtype=dtype, seed=1), operand(m, n, dtype=buffer)
    truth = g.double() + 0.125 * (dy.double().mT @ x.double())
    eager = g.clone()
    reference.accumulate_(eager, x, dy, 0.125)
    for make in (lambda t: t.clone(), lambda t: t.t().contiguous().t()):
        result = make(g)
        assert accumulate.accumulate(result, make(x), make(dy), 0.125)
        assert_as_good(result, truth, eager, slack=1.01)


def test_accumulate_rounds_to_nearest_once():
    """1 + 2⁻⁸ per token: rounding the product to bfloat16 before it is added would lose every one of them."""
    g = torch.zeros(16, 16, dtype=torch.bfloat16, device=DEVICE)
    ones = torch.ones(320, 16, device=DEVICE)
    accumulate.accumulate(g, ones, ones * (1 + 2.0**-8))
    assert (g == 322).all()  # the bfloat16 next to 321.25


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("tokens", [40, 900])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # that is what is tested
def test_accumulate_leaves_a_poisoned_batch_out(where, bad, tokens):
    x, dy, g = operand(tokens, 33), operand(tokens, 20, seed=1), operand(20, 33, seed=2)
    (x if where == "x" else dy)[-1, -1] = bad
    before = g.clone()
    assert not accumulate.accumulate(g, x, dy)
    assert torch.equal(g, before)


def test_accumulate_of_no_token_changes_nothing():
    g = operand(8, 8)
    before = g.clone()
    assert accumulate.accumulate(g, operand(0, 8), operand(0, 8))
    assert torch.equal(g, before)


@pytest.mark.parametrize("order", ["rows", "columns", "slice"])
@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("poison", [None, "left", "z"])
def test_commit(order, probes, poison):
    m, n, k = 45, 130, 12
    state = [operand(m, k), operand(k, n), operand(m, probes)]
    new_q, new_z, left = operand(m, k, seed=1), operand(k, n, seed=1), operand(m, k + probes, seed=1)
    if order == "columns":
        left = left.t().contiguous().t()
    elif order == "slice":
        left = torch.cat((left, left), dim=1)[:, : k + probes]
    if poison == "left":
        left[m - 1, k + probes - 1] = torch.nan
    elif poison == "z":
        new_z[k - 1, n - 1] = -torch.inf
    expected = [t.clone() for t in state]
    finite = reference.commit_(*expected, new_q, new_z, left)
    assert bool(commit.commit(*state, new_q, new_z, left)) == bool(finite) == (poison is None)
    for got, wanted in zip(state, expected, strict=True):
        assert torch.equal(got, wanted)


class TestChoice:
    def test_only_measured_wins_are_picked(self, monkeypatch):
        monkeypatch.delenv("LORAGA_TRITON", raising=False)
        monkeypatch.setattr(choice, "wins", lambda: {"accumulate_": {"90": {"16": [[1000, 2000]]}}})
        half, full = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
        assert choice.picks("accumulate_", 90, half, 1000)
        assert not choice.picks("accumulate_", 90, half, 999)
        assert not choice.picks("accumulate_", 90, half, 2001)
        assert not choice.picks("accumulate_", 80, half, 1500)
        assert not choice.picks("accumulate_", 90, full, 1500)
        assert not choice.picks("commit_", 90, half, 1500)

    def test_the_environment_decides(self, monkeypatch):
        for value, expected in (("1", True), ("0", False)):
            monkeypatch.setenv("LORAGA_TRITON", value)
            assert choice.picks("accumulate_", 90, torch.empty(1), 1) is expected
        monkeypatch.setenv("LORAGA_TRITON", "yes")
        with pytest.raises(ValueError, match="LORAGA_TRITON='yes'"):
            choice.picks("accumulate_", 90, torch.empty(1), 1)


class TestSearch:
    """What can be seen of the search without a GPU: its candidates give the right result, and it asks for a device."""

    @pytest.mark.parametrize("kernel", ["draw", "project", "fold", "accumulate"])
    def test_candidates_fit_the_launchers(self, kernel, monkeypatch):
        monkeypatch.setattr(search, "_TOKENS", 48)
        monkeypatch.setattr(search, "_WIDTH", 32)
        (columns, present), *_ = tuning.entries(kernel, torch.float32, 90)
        configs = list(search.candidates(kernel, columns))
        assert all(config.keys() == present.keys() for config in configs)
        inner = "BLOCK_N" if kernel in ("draw", "project") else "BLOCK_T"

        def staged(config: dict[str, int]) -> int:
            """Bytes of float32 operands that wait in shared memory: no GPU has room for the largest candidates."""
            outer = sum(size for name, size in config.items() if name.startswith("BLOCK") and name != inner)
            return 4 * config["num_stages"] * config[inner] * outer

        fitting = [config for config in configs if staged(config) <= 96 * 1024]
        run = search.workload(kernel, torch.float32, columns, torch.device(DEVICE))
        expected = run().clone()
        # a sum on the border between two bfloat16 may go either way
        rtol = 1e-2 if expected.dtype == torch.bfloat16 else 1e-4
        for config in (fitting[0], fitting[-1]):
            with tuning.using(kernel, config):
                torch.testing.assert_close(run(), expected, rtol=rtol, atol=1e-4)
        assert tuning.config(kernel, torch.float32, 90, columns) == present

    def test_a_search_needs_a_device(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="no CUDA device"):
            search.tune(1.0)


class TestSubspace:
    """The whole range finder against the exact SVD and against the reference, which draws the same numbers."""

    @staticmethod
    def falling(b: int, m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        inner = min(m, n)
        spectrum = (1.0 + torch.arange(inner, device=DEVICE)) ** -1.0
        left, right = (torch.linalg.qr(operand(b, size, inner, seed=size)).Q for size in (m, n))
        return (left * spectrum @ right.mT).to(dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("m", "n", "k"), [(64, 48, 16), (45, 83, 18), (90, 37, 20)])
    def test_against_the_exact_svd(self, m, n, k, dtype):
        g = self.falling(2, m, n, dtype)
        q, z = subspace.subspace(g, k, 4, [3, 4])
        assert q.shape == (2, m, k) and z.shape == (2, k, n)
        eye = torch.eye(k, dtype=torch.float64, device=DEVICE)
        assert torch.linalg.matrix_norm(q.double().mT @ q.double() - eye, 2).max() <= 1e-6
        exact = torch.linalg.svdvals(g.double())[:, :8].square().sum(-1)
        captured = torch.linalg.svdvals(z.double())[:, :8].square().sum(-1)
        assert ((exact - captured).abs() <= 1e-4 * exact).all()
        basis, _ = reference.subspace(g, k, 4, [3, 4])
        projector, wanted = q.double() @ q.double().mT, basis.double() @ basis.double().mT
        assert ((projector - wanted) @ g.double()).norm() <= 2e-2 * g.double().norm()

    def test_zero_rank_deficient_and_empty(self):
        g = torch.zeros(2, 40, 32, device=DEVICE)
        g[1] = operand(40, 3) @ operand(3, 32)
        q, z = subspace.subspace(g, 16, 2, [1, 2])
        eye = torch.eye(16, dtype=torch.float64, device=DEVICE)
        assert torch.linalg.matrix_norm(q.double().mT @ q.double() - eye, 2).max() <= 1e-6
        assert (z[0] == 0).all()
        assert (q[1] @ z[1] - g[1]).norm() <= 1e-5 * g[1].norm()
        q, z = subspace.subspace(torch.empty(0, 40, 32, device=DEVICE), 16, 2, [])
        assert q.shape == (0, 40, 16) and z.shape == (0, 16, 32)


def test_a_stream_through_the_kernels_gives_the_factors_of_torch(monkeypatch):
    """Every op of a streaming estimator, from first update to factors, replaced by its kernel launcher."""
    monkeypatch.setattr(reference, "has_bfloat16_units", lambda device: False)  # no operand is rounded on either side
    spec = LayerSpec("layer", 240, 208, 8, 7, torch.device(DEVICE))
    pairs = [(operand(300, 208, seed=2 * i), operand(300, 240, seed=2 * i + 1)) for i in range(3)]
    pairs[1][0][5, 5] = torch.nan  # is left out

    def factors() -> tuple[Factors, list[bool]]:
        estimator = Streaming(spec, 3)
        kept = [bool(estimator.update(x, dy)) for x, dy in pairs]
        return finish({"layer": estimator}, {"layer": 2.0})["layer"].factors, kept

    expected, kept = factors()
    calls = set()
    for op, (family, launcher, _) in dispatch.LAUNCHERS.items():
        run = getattr(importlib.import_module(f"loraga.kernels.{family}"), launcher)

        def through(*args: Any, _run: Any = run, _op: str = op) -> Any:
            calls.add(_op)
            return _run(*args)

        monkeypatch.setattr(torch.ops.loraga, op, through)
    found, also_kept = factors()
    assert kept == also_kept == [True, False, True]
    assert calls == {"test_matrix_", "left_product", "right_product", "commit_", "orthonormalize"}
    torch.testing.assert_close(found.S, expected.S, rtol=1e-4, atol=0)
    for one, other in ((found.U, expected.U), (found.Vh.mT, expected.Vh.mT)):
        assert torch.linalg.matrix_norm(one @ one.mT - other @ other.mT, 2) <= 5e-2


def test_without_a_measured_win_torch_does_the_work(monkeypatch):
    monkeypatch.delenv("LORAGA_TRITON", raising=False)
    monkeypatch.setattr(choice, "wins", dict)
    for op in dispatch.LAUNCHERS:
        assert dispatch.launcher_for(op, (torch.empty(1),), 90) is getattr(reference, op)
    monkeypatch.setenv("LORAGA_TRITON", "1")
    for op, (family, launcher, _) in dispatch.LAUNCHERS.items():
        module = importlib.import_module(f"loraga.kernels.{family}")
        assert dispatch.launcher_for(op, (torch.empty(1),), 90) is getattr(module, launcher)
