"""The check of a kernel at its first use on a device: small operands, against the reference and float64.

Every op has three shapes: powers of two, ragged ones, and a batch or a long sum. The reference runs on the CPU, so that
a device is not its own witness. Where bits may differ, the error that is allowed is three times that of the reference
against float64, and a little more, because the reference is now and then exact. float16 has no shapes of its own: it
takes the path of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loraga._messages import one_line
from loraga.ops import reference

Run = Callable[..., Any]
_SLACK = 3.0
_DUST = 1e-5  # what float32 sums in another order may add; products rounded to tf32 or bfloat16 have 30 times as much
_SEED = 2**40 + 7  # more than 32 bits


def problem(op: str, run: Run, device: torch.device) -> str:
    """What is wrong with `run`, a kernel's launcher for `op`, on `device`; an empty string if nothing is.

    The random generators of torch are not used, and its settings for precision do not matter.

    Raises:
        torch.OutOfMemoryError: the device has no memory left, for which the kernel is not to blame.
    """
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            for error, allowed, what in CHECKS[op](run, device):
                if not error <= allowed:  # true for NaN
                    return f"wrong result: {what} has the error {error:.1e}, and {allowed:.1e} is allowed"
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a compiler, a driver and a kernel may raise any error
        return f"{type(failure).__name__}: {one_line(failure)}"
    return ""


# What a check yields: an error, how much of it is allowed, and what has it.
_Results = Iterator[tuple[float, float, str]]


def _differs(found: Tensor, expected: Tensor) -> float:
    """0 where both have the same numbers, else infinity."""
    return 0.0 if torch.equal(found.cpu(), expected) else torch.inf


def _error(found: Tensor, truth: Tensor) -> float:
    """The largest error relative to the largest entry of `truth`, float64."""
    if found.shape != truth.shape:
        return torch.inf
    return float((found.cpu().double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def _allowed(usual: Tensor, truth: Tensor) -> float:
    """For a kernel, where the reference gives `usual`."""
    return _SLACK * _error(usual, truth) + _DUST


def _uniform(*shape: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) of the stream that test matrices come from, on the CPU."""
    rows = torch.Size(shape[:-1]).numel()
    out = torch.empty(rows, shape[-1], dtype=torch.float32)
    reference.test_matrix_(out, seed)
    return out.view(shape)


def _test_matrix(run: Run, device: torch.device) -> _Results:
    for shape in ((64, 64), (7, 13), (700, 3)):
        found = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        run(found, _SEED)
        yield _differs(found, _uniform(*shape, seed=_SEED)), 0.0, f"a test matrix of {shape}"


def _basis(run: Run, device: torch.device) -> _Results:
    for shape in ((64, 16), (67, 13), (3, 96, 32)):
        y = _uniform(*shape, seed=_SEED)
        y[..., 1] *= 1e-20
        y[..., 2] = 0.0
        if len(shape) == 2:  # the updates of an estimator give blocks of both layouts
            y = y.mT.contiguous().mT
        truth = _orthonormal(y)
        for passes in (1, 2):
            usual = reference.basis(y, passes)
            what = f"the basis of {shape} by {passes} passes"
            yield _error(run(y.to(device), passes), truth), _allowed(usual, truth), what


def _orthonormal(y: Tensor) -> Tensor:
    """What `basis` computes, in float64: CholeskyQR gives the Q of a QR decomposition with positive entries on R's
    diagonal."""
    y = y.double()
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    noise = reference.directions(y.shape[-2], y.shape[-1], torch.device("cpu")).double()
    known = norm > reference.SMALLEST_NORM
    q, r = torch.linalg.qr(torch.where(known, y / norm + reference.JITTER * noise, noise))
    basis: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return basis


def _commit(run: Run, device: torch.device) -> _Results:
    for b, m, k, n, probes, poisoned in ((1, 64, 16, 128, 16, None), (1, 45, 12, 83, 3, 0), (3, 33, 16, 40, 16, 1)):
        q, z, probed = (_uniform(b, *shape, seed=1) for shape in ((m, k), (k, n), (m, probes)))
        new_q, new_z = (_uniform(b, *shape, seed=2) for shape in ((m, k), (k, n)))
        left = _uniform(b, k + probes, m, seed=3).mT
        if poisoned is not None:
            (left if b == 1 else new_z)[poisoned, -1, -1] = torch.nan
        found = [t.to(device, copy=True) for t in (q, z, probed)]
        finite = run(*found, new_q.to(device), new_z.to(device), left.to(device))
        kept = reference.commit_(q, z, probed, new_q, new_z, left)
        results = zip(("flags", "q", "z", "probed"), (finite, *found), (kept, q, z, probed), strict=True)
        for name, result, expected in results:
            yield _differs(result, expected), 0.0, f"{name} of {b} layers of ({m}, {n})"


def _accumulate(run: Run, device: torch.device) -> _Results:
    half, full = torch.bfloat16, torch.float32
    shapes = ((128, 64, 64, half, half), (67, 45, 83, full, full), (1024, 16, 32, half, full))
    for tokens, m, n, dtype, buffer in shapes:
        g, x, dy = _uniform(m, n, seed=1).to(buffer), _uniform(tokens, n, seed=2), _uniform(tokens, m, seed=3)
        x, dy = x.to(dtype), dy.to(dtype)
        what = f"the sum of {tokens} tokens in {str(buffer).removeprefix('torch.')} ({m}, {n})"
        truth = g.double() + 0.125 * (dy.double().mT @ x.double())
        found = g.to(device, copy=True)
        added = run(found, x.to(device), dy.to(device), 0.125)
        once = g.clone()
        reference.accumulate_(once, x, dy, 0.125)
        yield _differs(added, torch.tensor(True)), 0.0, f"the flag of {what}"
        yield _error(found, truth), _allowed(once, truth), what
        x[-1, -1] = torch.nan
        kept = g.to(device, copy=True)
        added = run(kept, x.to(device), dy.to(device), 0.125)
        yield _differs(added, torch.tensor(False)), 0.0, f"the flag of {what} with a NaN"
        yield _differs(kept, g), 0.0, f"{what} with a NaN"


def _subspace(run: Run, device: torch.device) -> _Results:
    half, full = torch.bfloat16, torch.float32
    for b, m, n, k, dtype in ((1, 64, 64, 16, half), (1, 45, 83, 18, full), (3, 96, 48, 16, half)):
        spectrum = (1.0 + torch.arange(min(m, n), dtype=torch.float32)) ** -1.5
        g = _uniform(b, m, min(m, n), seed=1) * spectrum @ _uniform(b, min(m, n), n, seed=2)
        g = g.to(dtype)
        seeds = [_SEED + i for i in range(b)]
        found = _promises(g, *(t.cpu() for t in run(g.to(device), k, 1, seeds)))
        usual = _promises(g, *reference.subspace(g, k, 1, seeds))
        for name, dust in (("QᵀQ - I", 1e-6), ("QᵀG - Z", _DUST), ("the energy lost", 1e-3)):
            yield found[name], _SLACK * usual[name] + dust, f"{name} of {b} matrices of ({m}, {n})"


def _promises(g: Tensor, q: Tensor, z: Tensor) -> dict[str, float]:
    """By what a range is judged: two that are equally good may differ in every entry. The worst of the batch."""
    g, q, z = g.double(), q.double(), z.double()
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return {
        "QᵀQ - I": float((q.mT @ q - eye).abs().max()),
        "QᵀG - Z": float(((q.mT @ g - z).abs().amax((-2, -1)) / g.abs().amax((-2, -1))).max()),
        "the energy lost": float((1 - z.square().sum((-2, -1)) / g.square().sum((-2, -1))).max()),
    }


CHECKS: dict[str, Callable[[Run, torch.device], _Results]] = {
    "test_matrix_": _test_matrix,
    "basis": _basis,
    "commit_": _commit,
    "accumulate_": _accumulate,
    "subspace": _subspace,
}
