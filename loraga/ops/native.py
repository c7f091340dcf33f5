"""The ops that the native core answers, with the reference where it cannot.

On CUDA devices `small_svd` and `cholesky_inverse` do a whole batch of small matrices in one launch and wait for
nothing, where `torch.linalg` calls cuSOLVER matrix by matrix or looks at the result on the host. On the CPU it answers
`cholesky_inverse` and `test_matrix_`, for which torch needs some twenty operations and seventy.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from loraga.ops import native_core, reference
from loraga.ops.declared import implement

# what csrc/ is made for: sketches are at most this wide up to adapter rank 32
_LARGEST_K = 256


@functools.cache
def _usable(device: torch.device) -> bool:
    """Whether the native core works on `device`; says once why not."""
    reason = native_core.why_unavailable(device)
    if reason is not None:
        warnings.warn(f"{reason} Until then loraga takes slower torch operations on {device}.", stacklevel=2)
    return reason is None


def _fits(matrices: Tensor) -> bool:
    return 1 <= matrices.shape[-1] <= _LARGEST_K and _usable(matrices.device)


def _batch(matrices: Tensor) -> Tensor:
    return matrices.contiguous().view(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])


def small_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(core):
        return reference.small_svd(core)
    u, s, vh, _ = native_core.jacobi_svd(_batch(core))
    return u.view(core.shape), s.view(core.shape[:-1]), vh.view(core.shape)


def cholesky_inverse(gram: Tensor, shift: float) -> Tensor:
    if not _fits(gram):
        return reference.cholesky_inverse(gram, shift)
    return native_core.cholesky_inverse(_batch(gram), shift)[0].view(gram.shape)


def gradient_add_(total: Tensor, gradient: Tensor, scale: float, finite: Tensor | None) -> Tensor:
    if gradient.dim() > native_core.GRADIENT_MAX_DIMS or not _usable(total.device):
        return reference.gradient_add_(total, gradient, scale, finite)
    added = native_core.gradient_add(total, gradient, scale, finite)
    return added if finite is None else added.clone()


if native_core.available("cpu"):  # a pure Python install does without
    implement("cholesky_inverse", "CPU")(cholesky_inverse)
    implement("test_matrix_", "CPU")(native_core.fill_uniform)
if torch.version.hip is None:  # a ROCm device calls itself cuda, and there is nothing that a user could mend there
    for _op in (small_svd, cholesky_inverse, gradient_add_):
        implement(_op.__name__, "CUDA")(_op)
