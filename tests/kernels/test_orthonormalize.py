"""The orthonormalisation kernels under the interpreter: orthonormal, and of the range that was given, in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import DEVICE, needs_device, operand

from loraga.kernels import orthonormalize as kernels
from loraga.kernels.orthonormalize import orthonormalize, orthonormalize_reference
from loraga.ops import reference

pytestmark = needs_device

SHAPES = [(64, 32), (65, 33), (150, 70), (40, 40), (9, 1), (1, 1)]


def tall(kind: str, m: int, k: int) -> torch.Tensor:
    y = operand(m, k)
    if kind == "zero":
        return torch.zeros_like(y)
    if kind == "zero columns":
        return y * (torch.arange(k, device=DEVICE) % 2)
    if kind == "rank one":
        return y[:, :1] * y[:1]
    if kind == "scaled columns":
        return y * torch.logspace(-30, 30, k, device=DEVICE)
    if kind in ("1e-36", "1e36"):
        return y * float(kind)
    if kind == "condition 1e7":
        u = torch.linalg.qr(y.double()).Q
        v = torch.linalg.qr(operand(k, k).double()).Q
        return (u * torch.logspace(0, -7, k, dtype=torch.float64, device=DEVICE) @ v.T).float()
    return y


KINDS = ["random", "zero", "zero columns", "rank one", "scaled columns", "1e-36", "1e36", "condition 1e7"]


def assert_basis(q: torch.Tensor, y: torch.Tensor, orthogonal: float = 1e-6) -> None:
    assert q.shape == y.shape and q.dtype == torch.float32 and q.is_contiguous()
    q, y = q.double(), y.double()
    assert torch.isfinite(q).all()
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    assert (q.mT @ q - eye).flatten(-2).norm(dim=-1).max() < orthogonal * q.shape[-1] ** 0.5
    unit = y / y.norm(dim=-2, keepdim=True).clamp_min(1e-300)
    assert (unit - q @ (q.mT @ unit)).norm() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_and_of_the_same_range(shape, kind):
    y = tall(kind, *shape)
    assert_basis(orthonormalize(y), y)


@pytest.mark.parametrize("kind", ["random", "zero columns", "condition 1e7"])
def test_as_the_reference(kind):
    """The same completion of what is missing, and the same basis where the block determines it."""
    y = tall(kind, 90, 24)
    for refine in (True, False):
        ours, reference = orthonormalize(y, refine).double(), orthonormalize_reference(y, refine).double()
        # directions that hold 1e-7 of a column are known to as many digits as float64 leaves of them
        assert (ours - reference).abs().max() < (1e-3 if kind == "condition 1e7" else 2e-6)


@pytest.mark.parametrize("kind", ["random", "rank one", "zero"])
def test_without_refinement(kind):
    y = tall(kind, 100, 20)
    q = orthonormalize(y, refine=False)
    assert torch.linalg.cond(q.double()) < 2
    if kind == "random":
        assert_basis(q, y)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_batches_of_any_strides(batches):
    """Transposed, sliced and repeated blocks without copies; neighbours do not mix."""
    z = operand(batches, 20, 70)
    apart = torch.full((batches, 70, 45), torch.nan, device=DEVICE)
    apart[:, :, 1:40:2] = operand(batches, 70, 20)
    for y in (z.mT, apart[:, :, 1:40:2], operand(1, 70, 20).expand(batches, -1, -1), operand(batches, 2, 70, 20)):
        q = orthonormalize(y)
        if batches:
            assert_basis(q, y)
            alone = orthonormalize(y[-1]).double()  # its sums are cut otherwise
            assert (q[-1].double() - alone).abs().max() < 1e-6
        else:
            assert q.shape == y.shape


def test_nan_stays_in_its_block():
    y = operand(3, 50, 12)
    whole = orthonormalize(y)
    y[1, 7, 3] = float("nan")
    q = orthonormalize(y)
    assert torch.equal(q[0], whole[0]) and torch.equal(q[2], whole[2])


@pytest.mark.parametrize("arch", [80, 100])
def test_block_sizes_of_every_architecture(arch, monkeypatch):
    monkeypatch.setattr(kernels, "arch_of", lambda device: arch)
    for m, k in ((80, 20), (100, 70)):
        y = operand(m, k)
        assert_basis(orthonormalize(y), y)


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_sums_in_parts(splits, monkeypatch):
    """However the sums over rows are cut, also into more parts than there are rows."""
    monkeypatch.setattr(kernels, "splits_for", lambda programs, steps, device: splits)
    y = tall("condition 1e7", 90, 24)
    assert_basis(orthonormalize(y), y)


def test_the_same_bits_again():
    y = operand(2, 200, 40)
    assert torch.equal(orthonormalize(y), orthonormalize(y))


@pytest.mark.parametrize(("m", "k"), [(64, 60), (300, 20), (2**20, 4)])
def test_directions_are_those_of_the_reference(m, k):
    """Of a zero block they are all there is: the kernel's cosine is as good as torch's, at any length."""
    exact = reference.directions(m, k, torch.device("cpu")).double()
    assert (exact.T @ exact - torch.eye(k)).norm() < 2e-3  # integer frequencies are a little off in long columns
    if m < 1000:
        q = orthonormalize(torch.zeros(m, k, device=DEVICE), refine=False).cpu().double()
        assert (q - orthonormalize_reference(torch.zeros(m, k), False)).abs().max() < 1e-6


def test_where_triton_has_no_float64_product_the_reference_runs(monkeypatch):
    monkeypatch.setattr(kernels, "_FLOAT64_DOT", False)
    y = operand(30, 5)
    assert torch.equal(orthonormalize(y, True), orthonormalize_reference(y, True))
