"""The ops that the native core implements. Where it cannot run, they call the reference.

On CUDA devices `small_svd` and `cholesky_inverse` process a batch of small matrices in one launch, and the host does
not wait. `torch.linalg` calls cuSOLVER once per matrix, or reads the result on the host. On the CPU the core implements
`cholesky_inverse` and `test_matrix_`, for which torch needs about twenty and seventy operations.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from loraga.ops import native_core, reference
from loraga.ops.declared import implement

# The largest k of the kernels in csrc/; sketches are at most this wide up to 128 triplets: an adapter of rank 64 that
# starts with two for each of its directions, or one of rank 128 that starts with one.
_LARGEST_K = 512


@functools.cache
def _usable(device: torch.device) -> bool:
    """Whether the native core works on `device`. If not, the first call warns with the reason."""
    reason = native_core.why_unavailable(device)
    if reason is not None:
        warnings.warn(f"{reason} Until then loraga takes slower torch operations on {device}.", stacklevel=2)
    return reason is None


def _fits(matrices: Tensor) -> bool:
    return 1 <= matrices.shape[-1] <= _LARGEST_K and _usable(matrices.device)


def _batch(matrices: Tensor) -> Tensor:
    """(..., k, k) as a contiguous (batch, k, k), which the core takes."""
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


if native_core.available("cpu"):  # a pure Python install has no core, and that is no reason for a warning
    implement("cholesky_inverse", "CPU")(cholesky_inverse)
    implement("test_matrix_", "CPU")(native_core.fill_uniform)
# ROCm devices are called cuda, too. The core has no kernels for them, and a warning about what no user can change helps
# nobody, so nothing is registered there.
if torch.version.hip is None:
    for _op in (small_svd, cholesky_inverse, gradient_add_):
        implement(_op.__name__, "CUDA")(_op)
