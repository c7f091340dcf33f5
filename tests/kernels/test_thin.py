"""The thin products against float64, where a bound is what the eager op makes in the same dtype."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, DTYPES, assert_as_good, count_launches, needs_device, operand, random_matrix

from loraga.kernels import common, thin

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_fold(shape, dtype, transposed):
    tokens, m, _, k = shape
    a, p = operand(2, tokens, m, dtype=dtype), operand(2, tokens, k, dtype=dtype, seed=1)
    result = thin.fold(a, p, transposed=transposed)
    assert result.is_contiguous()
    result = result.mT if transposed else result
    assert_as_good(result, thin.fold_reference(a, p), a.float().mT @ p.float())


@pytest.mark.parametrize("layout", ["rows", "columns", "slices"])
def test_strided_operands(layout):
    a, b = operand(2, 60, 50), operand(2, 50, 20, seed=1)
    if layout == "columns":
        a, b = (t.mT.contiguous().mT for t in (a, b))
    elif layout == "slices":
        a, b = (torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0] for t in (a, b))
    assert_as_good(thin.project(a, b), thin.project_reference(a, b), a @ b)
    p = operand(2, 60, 20, seed=2)
    if layout == "columns":
        p = p.mT.contiguous().mT
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
    k = 272
    a, b, p = operand(1, 32, 48), operand(1, 48, k, seed=1), operand(1, 32, k, seed=2)
    assert_as_good(thin.project(a, b), thin.project_reference(a, b), a @ b)
    assert_as_good(thin.fold(a, p), thin.fold_reference(a, p), a.mT @ p)
    drawn = random_matrix(48, k, 5)
    assert_as_good(thin.project(a, None, seeds=[5], k=k), thin.project_reference(a, drawn), a @ drawn)


@pytest.mark.parametrize("k", [4, 20, 36, 64])
def test_a_drawn_operand_is_the_filled_one(k):
    a, seeds = operand(3, 50, 90), [3, 2**62 + 1, 9]
    filled = torch.stack([random_matrix(90, k, seed) for seed in seeds])
    assert_as_good(thin.project(a, None, seeds=seeds, k=k), thin.project_reference(a, filled), a @ filled)


def test_drawing_says_what_it_cannot():
    with pytest.raises(ValueError, match="multiple of 4"):
        thin.project(operand(1, 8, 8), None, seeds=[1], k=6)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_sizes_of_every_architecture(arch, dtype, monkeypatch):
    """Each entry of the tables gives the product, and holds the columns that it is for."""
    monkeypatch.setattr(common, "arch_of", lambda device: arch)
    for table in (thin._PROJECT, thin._DRAW, thin._FOLD):
        for k, config in table[8 * dtype.itemsize, common.family_of(operand(16, 16, dtype=dtype))].items():
            assert config["BLOCK_K"] == k
    for k in (48, 112, 160):
        a, b = operand(1, 80, 64, dtype=dtype), operand(1, 64, k, dtype=dtype, seed=1)
        p, drawn = operand(1, 80, k, dtype=dtype, seed=2), random_matrix(64, k, 5).to(dtype)[None]
        assert_as_good(thin.project(a, b), thin.project_reference(a, b), a.float() @ b.float())
        assert_as_good(thin.fold(a, p), thin.fold_reference(a, p), a.float().mT @ p.float())
        drawn_product = thin.project(a, None, seeds=[5], k=k)
        assert_as_good(drawn_product, thin.project_reference(a, drawn), a.float() @ drawn.float())


def test_launches(monkeypatch):
    """One, or two where the sum is cut, whatever the batch."""
    launches = count_launches(monkeypatch, thin, common)
    for batches in (1, 4):
        for splits in (1, 2):
            monkeypatch.setattr(thin, "splits_for", lambda programs, steps, device, splits=splits: splits)
            launches.clear()
            thin.project(operand(batches, 20, 30), operand(batches, 30, 8))
            thin.project(operand(batches, 20, 30), None, seeds=[1] * batches, k=8)
            thin.fold(operand(batches, 20, 30), operand(batches, 20, 8), transposed=True)
            assert len(launches) == 3 * splits


def test_no_columns_and_an_empty_batch():
    empty = torch.empty(0, 20, 30, device=DEVICE)
    assert thin.project(empty, torch.empty(0, 30, 8, device=DEVICE)).shape == (0, 20, 8)
    assert thin.fold(empty, torch.empty(0, 20, 8, device=DEVICE), transposed=True).shape == (0, 8, 30)
