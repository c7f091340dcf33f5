"""The thin products of gradients that are never formed, against float64."""

from __future__ import annotations

import pytest
import torch

from loraga.linalg import products
from loraga.linalg.products import left_products, right_products

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [((64, 64), 32, 48, 8), ((33,), 17, 50, 5), ((7, 0, 1200), 90, 20, 4), ((1,), 5, 3, 1)]  # tokens, n, m, k


def batch(tokens, n, m, dtype):
    return [torch.randn(t, n).to(dtype) for t in tokens], [torch.randn(t, m).to(dtype) for t in tokens]


def gradients(xs, dys):
    return torch.stack([dy.double().T @ x.double() for x, dy in zip(xs, dys, strict=True)])


def error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "m", "k"), CASES)
def test_right_products_lose_no_digits(tokens, n, m, k, dtype):
    xs, dys = batch(tokens, n, m, dtype)
    q = torch.randn(len(tokens), m, k)
    ours = right_products(xs, dys, q, 0.5)
    assert ours.dtype == torch.float32 and ours.shape == (len(tokens), k, n)
    assert error(ours, 0.5 * q.double().mT @ gradients(xs, dys)) < 1e-6


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "m", "k"), CASES)
def test_rounded_products_are_as_good_as_bfloat16(monkeypatch, tokens, n, m, k, dtype, units):
    """On a CPU with bfloat16 units and on one without."""
    monkeypatch.setattr(products, "has_bfloat16_units", lambda device: units)
    xs, dys = batch(tokens, n, m, dtype)
    v, q, g = torch.randn(len(tokens), n, k), torch.randn(len(tokens), m, k), gradients(xs, dys)
    left, right = left_products(xs, dys, v, 0.5), right_products(xs, dys, q, 0.5, rounded=True)
    limit = 2.0**-7 if units or dtype != torch.float32 else 1e-6
    assert left.dtype == right.dtype == torch.float32 and left.mT.is_contiguous()
    assert error(left, 0.5 * g @ v.double()) < limit
    assert error(right, 0.5 * q.double().mT @ g) < limit


def on_a_gpu(a, b, *, out_dtype=None, out=None):
    """torch.mm of a GPU: half-precision operands and float32 sums, rounded unless `out_dtype` says otherwise."""
    product = torch.einsum("ij,jk->ik", a.float(), b.float()).to(out_dtype or a.dtype)
    return product if out is None else out.copy_(product)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n", "m", "k"), CASES)
def test_a_gpu_multiplies_in_two_halves(monkeypatch, tokens, n, m, k, dtype):
    """What GPUs do, with their `torch.mm` in float32: Z keeps 16 bits, once rounded operands would keep 8."""
    xs, dys = batch(tokens, n, m, dtype)
    q = torch.randn(len(tokens), m, k)
    truth = q.double().mT @ gradients(xs, dys)
    monkeypatch.setattr(products, "multiplies_half", lambda tensor: True)
    monkeypatch.setattr(products, "has_bfloat16_units", lambda device: False)  # else a CPU would round to bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", on_a_gpu)
        patch.setattr(torch.Tensor, "__matmul__", on_a_gpu)
        exact, rounded = right_products(xs, dys, q), right_products(xs, dys, q, rounded=True)
    assert error(exact, truth) < 2.0**-14
    assert error(rounded, truth) > 8 * error(exact, truth)
