"""The check of a kernel at its first use: right kernels pass it, wrong ones do not, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_operands import DEVICE, needs_device

from loraga.ops import first_use, reference
from loraga.ops.triton import LAUNCHERS, launcher

HERE, CPU = torch.device(DEVICE), torch.device("cpu")
OPS = sorted(first_use.CHECKS)


def reference_of(op: str) -> Callable[..., Any]:
    return getattr(reference, op)


@needs_device
@pytest.mark.parametrize("op", LAUNCHERS)
def test_every_kernel_passes(op):
    assert first_use.problem(op, launcher(op), HERE) == ""


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes(op):
    assert first_use.problem(op, reference_of(op), CPU) == ""


def test_every_kernel_has_a_check():
    assert first_use.CHECKS.keys() >= LAUNCHERS.keys()


# What kernels get wrong, as the reference with that error.


def scaled(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        result = reference_of(op)(*args)
        changed = args[0] if result is None or result.dtype == torch.bool else result
        changed.mul_(1 + 1e-3)
        return result

    return run


def half_of_the_seed(out, seed):
    reference.test_matrix_(out, seed % 2**32)


def last_row_left_out(out, seed):
    whole = torch.empty_like(out)
    reference.test_matrix_(whole, seed)
    out[:-1] = whole[:-1]


def of_the_first_layer(y, passes):
    return reference.basis(y[:1], passes).expand_as(y) if y.dim() == 3 else reference.basis(y, passes)


def with_a_large_shift(y, passes):
    a = reference._jittered(y, torch.float32)
    return (a @ reference.cholesky_inverse(a.mT @ a, 1e-3).mT).contiguous()


def wrong_where_there_is_one_pass(y, passes):
    return reference.basis(y, passes) if passes == 2 else y


def zero_stays_zero(y, passes):
    return torch.where((y == 0).all(dim=-2, keepdim=True), 0.0, reference.basis(y, passes))


def one_decides_for_all(q, z, probed, new_q, new_z, left):
    poisoned = new_z.isfinite().all() & left.isfinite().all()
    return reference.commit_(q, z, probed, new_q, torch.where(poisoned, new_z, torch.nan), left)


def without_the_probes(q, z, probed, new_q, new_z, left):
    return reference.commit_(q, z, probed.clone(), new_q, new_z, left)


def left_is_not_looked_at(q, z, probed, new_q, new_z, left):
    reference.commit_(q, z, probed, new_q, new_z, left.nan_to_num())
    return left.isfinite().all(dim=(-2, -1)) & new_z.isfinite().all(dim=(-2, -1))


def poison_is_added(g, x, dy, scale):
    finite = reference.all_finite(x)
    g += scale * (dy.double().t() @ x.double()).to(g.dtype)
    return finite


def poison_is_not_said(g, x, dy, scale):
    reference.accumulate_(g, x, dy, scale)
    return torch.tensor(True)


def rounded_twice(g, x, dy, scale):
    if not reference.all_finite(x):
        return torch.tensor(False)
    g += (scale * (dy.double().t() @ x.double())).to(torch.bfloat16).to(g.dtype)
    return torch.tensor(True)


def product_of_tf32(g, x, dy, scale):
    """float32 operands with the 10 bits that one pass of the tensor cores keeps."""
    cut = [(t.float().view(torch.int32) & -8192).view(torch.float32) for t in (x, dy)]
    return reference.accumulate_(g, *(t.to(x.dtype) for t in cut), scale)


def the_last_token_left_out(g, x, dy, scale):
    keep = torch.arange(len(x)) < len(x) - 1
    return reference.accumulate_(g, x, torch.where(keep[:, None], dy, 0.0), scale)


def of_other_matrices(g, k, iterations, seeds):
    return reference.subspace(g.flip(0), k, iterations, seeds)


def coordinates_rounded(g, k, iterations, seeds):
    q, z = reference.subspace(g, k, iterations, seeds)
    return q, z.bfloat16().float()


def not_orthonormal(g, k, iterations, seeds):
    q, z = reference.subspace(g, k, iterations, seeds)
    return q * (1 + 1e-4), z


def a_random_range(g, k, iterations, seeds):
    q, _ = torch.linalg.qr(torch.rand(*g.shape[:2], k))
    return q, q.mT @ g.float()


WRONG = [
    ("test_matrix_", half_of_the_seed),
    ("test_matrix_", last_row_left_out),
    ("test_matrix_", scaled("test_matrix_")),
    ("basis", of_the_first_layer),
    ("basis", with_a_large_shift),
    ("basis", wrong_where_there_is_one_pass),
    ("basis", zero_stays_zero),
    ("basis", scaled("basis")),
    ("commit_", one_decides_for_all),
    ("commit_", without_the_probes),
    ("commit_", left_is_not_looked_at),
    ("commit_", scaled("commit_")),
    ("accumulate_", poison_is_added),
    ("accumulate_", poison_is_not_said),
    ("accumulate_", rounded_twice),
    ("accumulate_", product_of_tf32),
    ("accumulate_", the_last_token_left_out),
    ("accumulate_", scaled("accumulate_")),
    ("subspace", of_other_matrices),
    ("subspace", coordinates_rounded),
    ("subspace", not_orthonormal),
    ("subspace", a_random_range),
]


@pytest.mark.parametrize(("op", "wrong"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_kernel_is_found(op, wrong):
    assert first_use.problem(op, wrong, CPU).startswith("wrong result: ")


@pytest.mark.parametrize("op", OPS)
def test_an_error_is_the_reason(op):
    def fails(*args: Any) -> None:
        raise RuntimeError("no C compiler\nat line 1")

    assert first_use.problem(op, fails, CPU) == "RuntimeError: no C compiler"


def test_a_full_device_is_not_the_kernels_fault():
    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        first_use.problem("basis", fails, CPU)


@pytest.mark.parametrize("op", OPS)
def test_the_settings_of_the_caller_play_no_part(op):
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert first_use.problem(op, reference_of(op), CPU) == ""
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
