"""The native core, loaded on first use.

The compiled module `loraga._C` may be absent (a pure Python install), may fail to load, or may be built for another
version of the sources. `import loraga` works in all of these cases: `why_unavailable` returns the reason, and a
function that needs the core raises a RuntimeError with it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from loraga._version import __version__

GRADIENT_MAX_DIMS = 5
_REBUILD = "Rebuild it with `pip install .` (or `pip install -e .`) in loraga's sources."


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """(module, None) if the compiled module can be used, else (None, reason)."""
    try:
        module = import_module("loraga._C")
    except ImportError as error:
        return None, f"loraga's native core could not be loaded: {error}. {_REBUILD}"
    built = module.build_info()["version"]
    if built != __version__:
        return None, f"loraga's native core was built for version {built}, but this is {__version__}. {_REBUILD}"
    return module, None


def _core() -> ModuleType:
    """The compiled module; raises RuntimeError if it cannot be used."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def _build_problem() -> str | None:
    """The reason why this build of the core or of torch can use no CUDA device, or None."""
    if torch.version.hip is not None:
        return "loraga's native core has CUDA kernels only, and this torch is built for ROCm."
    if not _core().build_info()["cuda"]:
        return f"loraga's native core was built without CUDA: no working nvcc at build time. {_REBUILD}"
    return None


@functools.cache
def _device_problem(device_index: int) -> str | None:
    """The reason why the core cannot use this CUDA device (its architecture, the driver), or None; cached."""
    core = _core()
    try:
        core.cuda.check_device(device_index)
    except core.CudaError as error:
        architectures = core.build_info()["cuda_architectures"]
        return f"loraga's native core (built for {architectures}) cannot use cuda:{device_index}: {error}"
    return None


def why_unavailable(device: torch.device | str = "cpu") -> str | None:
    """The reason why the native core cannot be used on a device, and what to do about it.

    Args:
        device (`torch.device` or `str`, *optional*): a CPU or CUDA device.

    Returns:
        `str` or `None`: one or two sentences, or None if the core can be used.
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
    problem = _build_problem()
    if problem is not None:
        return problem
    index = torch.cuda.current_device() if device.index is None else device.index
    # The core makes `index` the current device and afterwards restores the previous one. If the process has not used
    # the previous device yet, restoring it creates a CUDA context there, which takes half a gigabyte. torch restores
    # the device without creating a context; inside its context manager `index` is current already, and the core changes
    # nothing. The other functions do not need it: their tensors were made on the target device in this thread, and
    # after that torch keeps the target current unless the previous device has a context.
    with torch.cuda.device(index):
        return _device_problem(index)


def available(device: torch.device | str = "cpu") -> bool:
    """Whether the native core can be used on `device`."""
    return why_unavailable(device) is None


def build_info() -> dict[str, Any]:
    """How the native core was built.

    Returns:
        `dict`: `version`, `cuda` (bool), `cuda_architectures`, `cuda_compiler` (both empty without CUDA),
        `cxx_compiler` and `functions` (their names, separated by spaces).

    Raises:
        RuntimeError: the native core is not available.
    """
    core = _core()
    functions = [name for name in dir(core.cpu) if not name.startswith("_") and not name.endswith("_workspace")]
    return {**core.build_info(), "functions": " ".join(functions)}


def _check_batch(name: str, batch: torch.Tensor, dtypes: tuple[torch.dtype, ...], largest_k: int, beyond: str) -> None:
    """Raise unless `batch` is a contiguous (batch, k, k) of one of `dtypes` with k <= `largest_k`.

    The error messages call the tensor `name`, and name `beyond` for larger k.
    """
    if not isinstance(batch, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(batch).__name__}.")
    if batch.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, not {batch.dtype}; convert it with {name}.to({dtypes[0]}).")
    if batch.ndim != 3 or batch.shape[1] != batch.shape[2]:
        raise ValueError(f"{name} must have the shape (batch, k, k), not {tuple(batch.shape)}.")
    if not 1 <= batch.shape[1] <= largest_k:
        raise ValueError(f"{name} has k = {batch.shape[1]}; allowed are 1 to {largest_k}. Use {beyond} beyond.")
    if not batch.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call {name}.contiguous() first.")


def _functions_for(native: ModuleType, name: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """The functions for a device and their extra arguments: on CUDA a target (device, current stream), on CPU none.

    Raises ValueError for a device of another type, and RuntimeError if the core cannot be used on it.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on a cpu or cuda device, not on {device}.")
    reason = why_unavailable(device)
    if reason is not None:
        raise RuntimeError(reason)
    if device.type == "cpu":
        return native.cpu, ()
    return native.cuda, (native.cuda.Target(device=device.index, stream=torch.cuda.current_stream(device).cuda_stream),)


def jacobi_svd(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular value decompositions of many small matrices in one call, core[i] = U[i] diag(S[i]) Vh[i].

    One-sided Jacobi in a fixed order with float64 arithmetic (Hestenes 1958; Demmel and Veselić 1992): the same
    input gives the same bits on the same device. On a CUDA device it is one launch on the current stream, and the
    host does not wait for it. U and Vh are orthonormal also where a core is rank-deficient or zero. Singular values
    below k times 2.2e-16 of the Frobenius norm are reported as zero. Signs are not normalised. Autograd records
    nothing.

    Args:
        core (`torch.Tensor`): (batch, k, k), float32, contiguous, k from 1 to 512, on a CPU or CUDA device.

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
    _check_batch("core", core, (torch.float32,), native.JACOBI_MAX_K, "torch.linalg.svd")
    functions, target = _functions_for(native, "core", core.device)
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
    size = functions.jacobi_svd_workspace(batch, k, *target)
    workspace = torch.empty(size, dtype=torch.uint8, device=core.device)
    functions.jacobi_svd(problem, options, workspace.data_ptr(), size, *target)
    return u, s, vh, status


def cholesky_inverse(gram: torch.Tensor, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverses of the Cholesky factors of many small Gram matrices in one call.

    inverse[i] = L^-1 with L Lᵀ = gram[i] + shift · trace(gram[i]) · I and L lower triangular, in the dtype of `gram`
    and a fixed order: the same input gives the same bits on the same device. A Gram matrix has no pivot below
    shift · trace but for rounding; one that is smaller is raised to that. On a CUDA device it is one launch on the
    current stream, and the host does not wait for it. Only the lower triangles are read. Autograd records nothing.

    Args:
        gram (`torch.Tensor`): (batch, k, k), float64 or float32, contiguous, k from 1 to 512, on a CPU or CUDA
            device.
        shift (`float`, *optional*): added to the diagonal, as a share of the trace.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: inverse (batch, k, k), in the dtype of `gram`, zero above the diagonal, and
        status (batch,), int32: 0 good, else the order of the first leading minor that is not positive (or not finite).
        All entries of that inverse are NaN then. Both on the device of `gram`.

    Raises:
        TypeError: `gram` is not a float64 or float32 tensor.
        ValueError: shape, size, strides or device of `gram` do not fit, or `shift` is negative or not finite.
        RuntimeError: the native core is not available there (see `why_unavailable`), or a CUDA call failed.
    """
    native = _core()
    problems = {torch.float64: native.CholeskyProblemFloat64, torch.float32: native.CholeskyProblemFloat32}
    _check_batch("gram", gram, tuple(problems), native.CHOLESKY_MAX_K, "torch.linalg.cholesky_ex")
    functions, target = _functions_for(native, "gram", gram.device)
    batch, k = gram.shape[:2]
    inverse = torch.empty_like(gram)
    status = torch.empty(batch, dtype=torch.int32, device=gram.device)
    problem = problems[gram.dtype](
        gram=gram.data_ptr(), inverse=inverse.data_ptr(), status=status.data_ptr(), batch=batch, k=k, shift=shift
    )
    functions.cholesky_inverse(problem, *target)
    return inverse, status


def fill_uniform(out: torch.Tensor, seed: int) -> None:
    """Fill `out` with the uniform numbers of stream `seed`, which `loraga.ops.declared.test_matrix_` defines.

    Args:
        out (`torch.Tensor`): float32, contiguous, on the CPU.
        seed (`int`): key, 64 bits.

    Raises:
        TypeError: `out` is not a float32 tensor.
        ValueError: `out` is not contiguous or not on the CPU.
        RuntimeError: the native core is not available (see `why_unavailable`).
    """
    if not isinstance(out, torch.Tensor) or out.dtype != torch.float32:
        raise TypeError(f"out must be a float32 tensor, not {getattr(out, 'dtype', type(out).__name__)}.")
    if not out.is_cpu or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and on the CPU, not {tuple(out.stride())} on {out.device}.")
    _core().cpu.fill_uniform(out.data_ptr(), out.numel(), seed & 0xFFFFFFFFFFFFFFFF)


def _check_gradient_add(
    total: torch.Tensor,
    gradient: torch.Tensor,
    finite: torch.Tensor | None,
    sums: Mapping[torch.dtype, Any],
    gradients: Mapping[torch.dtype, Any],
) -> None:
    """Raise what `gradient_add` documents; `sums` and `gradients` have the dtypes that the core knows for each."""
    for name, tensor, known in (("total", total, sums), ("gradient", gradient, gradients)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}.")
        if tensor.layout != torch.strided or tensor.dtype not in known:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise TypeError(f"{name} must be a dense tensor of {allowed}, not {tensor.layout} {tensor.dtype}.")
    if not total.is_contiguous():
        raise ValueError("total must be contiguous.")
    if gradient.ndim > GRADIENT_MAX_DIMS:
        raise ValueError(f"gradient has {gradient.ndim} dimensions; allowed are up to {GRADIENT_MAX_DIMS}.")
    if total.numel() != gradient.numel() or total.device != gradient.device:
        raise ValueError(
            f"total {tuple(total.shape)} on {total.device} and gradient {tuple(gradient.shape)} on {gradient.device} "
            "must have as many entries and one device."
        )
    if finite is not None and (finite.dtype != torch.bool or finite.numel() != 1 or finite.device != total.device):
        raise ValueError(f"finite must be one bool on {total.device}, not {finite.dtype} {tuple(finite.shape)}.")


def gradient_add(
    total: torch.Tensor, gradient: torch.Tensor, scale: float = 1.0, finite: torch.Tensor | None = None
) -> torch.Tensor:
    """total += scale · gradient in place, unless the gradient contains a NaN or Inf.

    Entries are matched in row-major order of their indices, so `total` may be a matrix (m, n) and the gradient that of
    a convolution (m, c, h, w) with n = c h w, in any memory layout. scale · gradient + total is one fused
    multiply-add in float32, rounded to nearest once more where `total` is bfloat16. On a CUDA device the host does not
    wait for it. Autograd records nothing.

    Args:
        total (`torch.Tensor`): float32 or bfloat16, contiguous.
        gradient (`torch.Tensor`): float32, bfloat16 or float16, with as many entries as `total`, up to 5 dimensions,
            any strides, on the same CPU or CUDA device.
        scale (`float`, *optional*): rounded to float32.
        finite (`torch.Tensor`, *optional*): one bool on the device. The gradient is added if it is True, and its
            entries are not checked. For a caller that adds a gradient in parts and has checked all parts before.

    Returns:
        `torch.Tensor`: 0-dim bool on the device, True if the gradient was added; `finite` itself where it is given.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: sizes, strides or devices do not fit.
        RuntimeError: the native core is not available there (see `why_unavailable`), or a CUDA call failed.
    """
    native = _core()
    sums = {torch.float32: native.Element.float32, torch.bfloat16: native.Element.bfloat16}
    gradients = {**sums, torch.float16: native.Element.float16}
    _check_gradient_add(total, gradient, finite, sums, gradients)
    functions, target = _functions_for(native, "total", total.device)
    flag = finite if finite is not None else torch.empty((), dtype=torch.bool, device=total.device)
    problem = native.GradientProblem(
        sum=total.data_ptr(),
        gradient=gradient.data_ptr(),
        finite=flag.data_ptr(),
        sum_type=sums[total.dtype],
        gradient_type=gradients[gradient.dtype],
        sizes=gradient.shape,
        strides=gradient.stride(),
        scale=scale,
        finite_is_given=finite is not None,
    )
    functions.gradient_add(problem, *target)
    return flag
