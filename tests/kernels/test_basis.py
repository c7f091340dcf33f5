"""The float32 basis kernels under the interpreter: what `basis` promises, in float64, for every kind of block."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, assert_as_good, count_launches, needs_device, operand

from loraga.kernels import basis as kernels
from loraga.kernels import common
from loraga.kernels.basis import basis, basis_reference
from loraga.ops import reference

pytestmark = needs_device

# powers of two, ragged, two powers (80 = 64 + 16), several blocks, square, one column, one number
SHAPES = [(64, 32), (65, 33), (150, 80), (160, 150), (40, 40), (9, 1), (1, 1)]


def jittered(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A, the block that is made orthonormal."""
    m, k = y.shape[-2:]
    norm = y.double().norm(dim=-2, keepdim=True)
    known = norm > reference.SMALLEST_NORM
    noise = reference.directions(m, k, y.device).to(dtype)
    unit = (y.double() / torch.where(known, norm, torch.inf)).to(dtype)
    return unit + noise * torch.where(known, reference.JITTER, 1.0).to(dtype)


def exact(y: torch.Tensor, passes: int = 2) -> torch.Tensor:
    """The definition in float64 arithmetic."""
    a = jittered(y, torch.float64)
    for _ in range(passes):
        a = a @ reference.cholesky_inverse(a.mT @ a, reference.BASIS_SHIFT).mT
    return a


def tall(kind: str, m: int, k: int) -> torch.Tensor:
    y = operand(m, k)
    if kind == "zero":
        return torch.zeros_like(y)
    if kind == "zero columns":
        return y * (torch.arange(k, device=DEVICE) % 2)
    if kind == "rank one":
        return y[:, :1] * y[:1]
    if kind == "repeated":
        return y[:, torch.arange(k) // 2]
    if kind == "scaled columns":
        return y * torch.logspace(-30, 25, k, device=DEVICE)
    if kind == "sparse rows":
        return y * (torch.arange(m, device=DEVICE) % 7 == 3)[:, None]
    if kind in ("1e-30", "1e25", "1e-38", "1e37"):
        return y * float(kind)
    if kind == "condition 1e5":
        u = torch.linalg.qr(y.double()).Q
        v = torch.linalg.qr(operand(k, k).double()).Q
        return (u * torch.logspace(0, -5, k, dtype=torch.float64, device=DEVICE) @ v.T).float()
    return y


KINDS = [
    *("random", "zero", "zero columns", "rank one", "repeated", "scaled columns", "sparse rows", "condition 1e5"),
    *("1e-30", "1e25", "1e-38", "1e37"),
]


def assert_basis(q: torch.Tensor, y: torch.Tensor) -> None:
    assert q.shape == y.shape and q.dtype == torch.float32 and q.is_contiguous()
    assert torch.isfinite(q).all()
    q, a = q.double(), jittered(y, torch.float64)
    values, known = torch.linalg.svdvals(q), torch.linalg.svdvals(a)
    assert values.max() <= 1 + 1e-4
    assert values[known > 1e-4 * known[..., :1]].min() >= 0.99
    unit = a / a.norm(dim=-2, keepdim=True)
    assert (unit - q @ torch.linalg.lstsq(q, unit).solution).norm(dim=-2).max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_promise(shape, kind):
    y = tall(kind, *shape)
    assert_basis(basis(y), y)


@pytest.mark.parametrize("layout", ["rows", "columns", "slices"])
@pytest.mark.parametrize("kind", ["random", "zero columns", "zero", "scaled columns", "1e-30"])
@pytest.mark.parametrize(("m", "k"), [(96, 24), (150, 80), (160, 150)])
def test_as_the_definition_in_float64(m, k, kind, layout):
    """Where the block determines its basis: the same completion of zero columns, and the same signs."""
    y = tall(kind, m, k)
    truth, eager = exact(y), basis_reference(y)
    if layout == "columns":
        y = y.t().contiguous().t()
    elif layout == "slices":
        y = torch.stack((y, torch.full_like(y, torch.nan)), dim=-1)[..., 0]
    assert_as_good(basis(y), truth, eager)


@pytest.mark.parametrize("kind", ["repeated", "rank one"])
@pytest.mark.parametrize(("m", "k"), [(150, 20), (160, 80)])
def test_the_added_directions_complete_dependent_columns(m, k, kind):
    """Without them, what rounding leaves of a dependent column would be its direction, a tenth as long or less."""
    y = tall(kind, m, k)
    values, expected = torch.linalg.svdvals(basis(y).double()), torch.linalg.svdvals(exact(y))
    assert (values >= 0.9 * expected).all()


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_batches_of_any_strides(batches):
    """Transposed, sliced and repeated blocks without copies; neighbours do not mix."""
    z = operand(batches, 20, 70)
    apart = torch.full((batches, 70, 45), torch.nan, device=DEVICE)
    apart[:, :, 1:40:2] = operand(batches, 70, 20)
    for y in (z.mT, apart[:, :, 1:40:2], operand(1, 70, 20).expand(batches, -1, -1), operand(batches, 2, 70, 20)):
        q = basis(y)
        if batches:
            assert_basis(q, y)
            alone = basis(y[-1]).double()  # its sums are cut otherwise
            assert (q[-1].double() - alone).abs().max() < 1e-5
        else:
            assert q.shape == y.shape


def test_a_tall_block_with_few_rows_that_are_not_zero():
    """As an embedding's, of a batch with 13 distinct tokens: all other directions are the noise of long columns."""
    y = torch.zeros(4096, 80, device=DEVICE)
    y[torch.arange(13) * 311] = operand(13, 80)
    assert_basis(basis(y), y)


def test_nan_stays_in_its_block():
    y = operand(3, 50, 12)
    whole = basis(y)
    y[1, 7, 3] = float("nan")
    q = basis(y)
    assert torch.equal(q[0], whole[0]) and torch.equal(q[2], whole[2])
    assert torch.isnan(q[1]).any()


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_sums_in_parts(splits, monkeypatch):
    """However the sums over rows are cut, also into more parts than there are rows."""
    monkeypatch.setattr(kernels, "splits_for", lambda programs, steps, device: splits)
    y = operand(90, 24)
    assert_as_good(basis(y), exact(y), basis_reference(y))


def test_the_same_bits_again():
    y = operand(2, 300, 40)
    assert torch.equal(basis(y), basis(y))


@pytest.mark.parametrize("batches", [1, 6])
@pytest.mark.parametrize(("splits", "expected"), [(1, 5), (4, 7)])
def test_launches(batches, splits, expected, monkeypatch):
    """Besides two factors of `cholesky_inverse`."""
    monkeypatch.setattr(kernels, "splits_for", lambda programs, steps, device: splits)
    launches = count_launches(monkeypatch, kernels, common)
    basis(operand(batches, 64, 20))
    assert len(launches) == expected


def test_directions_are_those_of_the_reference():
    """Of a zero block they are all there is: the kernel's cosine is as good as torch's, at any length."""
    for m, k in ((64, 60), (2000, 20)):
        y = torch.zeros(m, k, device=DEVICE)
        assert (basis(y).double() - exact(y)).abs().max() < 1e-6


def test_usual_numbers_of_columns_are_not_padded():
    for k in (16, 32, 48, 64, 80, 96, 128, 192, 256, 512, 1024):
        blocks, main, rest = kernels.blocks_of_columns(k)
        assert blocks * main + rest == k
    for k in range(1, 1100):
        blocks, main, rest = kernels.blocks_of_columns(k)
        assert (blocks - 1) * main < k <= blocks * main + rest < k + (32 if k <= 128 else 64)
        assert main in (16, 32, 64, 128) and rest in (0, 16, 32) and rest < main and (blocks == 1 or rest == 0)


@pytest.mark.parametrize("kind", ["random", "zero columns", "scaled columns"])
def test_one_pass_is_the_definition_of_one(kind):
    y = tall(kind, 150, 80).t().contiguous().t()
    assert_as_good(basis(y, 1), exact(y, 1), basis_reference(y, 1))
    assert (exact(y, 1) - exact(y)).abs().max() > 1e-7  # the second pass would be seen
