"""The native core, loaded when first asked for.

The compiled module `loraga._C` may be absent (a pure Python install), unloadable or built for another version of
the sources. None of that makes an import of loraga fail: `why_unavailable` tells the reason, and a function that
needs the core raises it.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from loraga._version import __version__

_REBUILD = "Rebuild it with `pip install .` (or `pip install -e .`) in loraga's sources."


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and why there is none."""
    try:
        module = import_module("loraga._C")
    except ImportError as error:
        return None, f"loraga's native core could not be loaded: {error}. {_REBUILD}"
    built = module.build_info()["version"]
    if built != __version__:
        return None, f"loraga's native core was built for version {built}, but this is {__version__}. {_REBUILD}"
    return module, None


def _core() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def _cuda_problem(device_index: int) -> str | None:
    core = _core()
    if torch.version.hip is not None:
        return "loraga's native core has CUDA kernels only, and this torch is built for ROCm."
    if not core.build_info()["cuda"]:
        return f"loraga's native core was built without CUDA: no working nvcc at build time. {_REBUILD}"
    try:
        core.cuda.check_device(device_index)
    except core.CudaError as error:
        architectures = core.build_info()["cuda_architectures"]
        return f"loraga's native core (built for {architectures}) cannot use cuda:{device_index}: {error}"
    return None


def why_unavailable(device: torch.device | str = "cpu") -> str | None:
    """Why the native core cannot be used on a device, and the remedy.

    Args:
        device (`torch.device` or `str`, *optional*): a CPU or CUDA device.

    Returns:
        `str` or `None`: the reason in one sentence or two; None if the core can be used.
    """
    device = torch.device(device)
    module, reason = _load()
    if module is None:
        return reason
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"loraga's native core runs on cpu and cuda devices, not on {device.type}."
    if not torch.cuda.is_available():
        return "torch sees no CUDA device."
    return _cuda_problem(torch.cuda.current_device() if device.index is None else device.index)


def available(device: torch.device | str = "cpu") -> bool:
    """Whether the native core can be used on `device`."""
    return why_unavailable(device) is None


def build_info() -> dict[str, Any]:
    """How the native core was built.

    Returns:
        `dict`: `version`, `cuda` (bool), `cuda_architectures`, `cuda_compiler` (both empty without CUDA) and
        `cxx_compiler`.

    Raises:
        RuntimeError: the native core is not available.
    """
    return dict(_core().build_info())


def _check_cores(core: torch.Tensor, largest_k: int) -> None:
    if not isinstance(core, torch.Tensor):
        raise TypeError(f"core must be a torch.Tensor, not {type(core).__name__}.")
    if core.dtype != torch.float32:
        raise TypeError(f"core must be float32, not {core.dtype}; convert it with core.float().")
    if core.ndim != 3 or core.shape[1] != core.shape[2]:
        raise ValueError(f"core must have the shape (batch, k, k), not {tuple(core.shape)}.")
    if not 1 <= core.shape[1] <= largest_k:
        raise ValueError(f"core has k = {core.shape[1]}; allowed are 1 to {largest_k}. Use torch.linalg.svd beyond.")
    if not core.is_contiguous():
        raise ValueError("core must be contiguous; call core.contiguous() first.")


def jacobi_svd(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decompositions of many small matrices in one call, core[i] = U[i] diag(S[i]) Vh[i].

    One-sided Jacobi in a fixed order with float64 arithmetic (Hestenes 1958; Demmel and Veselić 1992): the same
    input gives the same bits on the same device. On a CUDA device it is one launch on the current stream and
    nothing waits for it. U and Vh are orthonormal also where a core is rank-deficient or zero; singular values
    below k times 2.2e-16 of the Frobenius norm are reported as zero. Signs are as they come out. No gradient flows.

    Args:
        core (`torch.Tensor`): (batch, k, k), float32, contiguous, k from 1 to 256, on a CPU or CUDA device.

    Returns:
        `tuple[torch.Tensor, ...]`: U (batch, k, k), S (batch, k) descending, Vh (batch, k, k), float32, and
        status (batch,), int32: 0 good, 1 not converged (the outputs are the last iterate), 2 NaN or Inf in the
        core (the outputs are NaN). All on the device of `core`.

    Raises:
        TypeError: `core` is not a float32 tensor.
        ValueError: shape, size, strides or device of `core` do not fit.
        RuntimeError: the native core is not available there (see `why_unavailable`), or a CUDA call failed.
    """
    native = _core()
    _check_cores(core, native.JACOBI_MAX_K)
    if core.device.type not in ("cpu", "cuda"):
        raise ValueError(f"core must be on a cpu or cuda device, not on {core.device}.")
    reason = why_unavailable(core.device)
    if reason is not None:
        raise RuntimeError(reason)

    batch, k = core.shape[:2]
    u, vh = torch.empty_like(core), torch.empty_like(core)
    s = core.new_empty(batch, k)
    status = torch.empty(batch, dtype=torch.int32, device=core.device)
    problem = native.JacobiProblem(
        core=core.data_ptr(),
        u=u.data_ptr(),
        s=s.data_ptr(),
        vh=vh.data_ptr(),
        status=status.data_ptr(),
        batch=batch,
        k=k,
    )
    options = native.JacobiOptions()
    if core.device.type == "cuda":
        stream = torch.cuda.current_stream(core.device)
        rooms: tuple[Any, ...] = (native.cuda.Target(device=core.device.index, stream=stream.cuda_stream),)
        functions = native.cuda
    else:
        rooms = ()
        functions = native.cpu
    size = functions.jacobi_svd_workspace(batch, k, *rooms)
    workspace = torch.empty(size, dtype=torch.uint8, device=core.device)
    functions.jacobi_svd(problem, options, workspace.data_ptr(), size, *rooms)
    return u, s, vh, status
