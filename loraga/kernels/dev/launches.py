"""Kernel launches recorded without a GPU: what Triton would compile for them, and for which grid.

Inside `recorded`, `kernel[grid](...)` binds its arguments as Triton does for a card of the given compute capability:
types of arguments, constants, integers of 1, integers and addresses that are divisible by 16. Then it stops before it
compiles. Triton calls `knobs.runtime.jit_cache_hook` at this point, with all that it is about to compile, and goes no
further if the hook returns True. This hook is the same in Triton 3.4 to 3.9.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from loraga import kernels
from loraga.kernels import common
from loraga.kernels.dev.devices import MULTIPROCESSORS

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel.

    Attributes:
        module, kernel (`str`): where the kernel is defined, and its name.
        signature (`dict[str, str]`): type of each argument, such as "*bf16", "i32", or "constexpr".
        constants (`dict`): value by path of each constant, those that are 1 included.
        attributes (`dict`): by path, what Triton knows of an argument, such as its divisibility by 16.
        options (`dict[str, Any]`): num_warps, num_stages and others.
        grid (`tuple[int, ...]`): programs.
        tensors (`tuple`): shape, element type and bytes of each tensor that was passed, each storage once.
        numbers (`dict[str, float]`): value of each argument that is a number.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = field(default=())
    tensors: tuple[tuple[tuple[int, ...], str, int], ...] = field(default=())
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal for launches of one binary."""
        return repr((self.module, self.kernel, self.signature, self.constants, self.attributes, self.options))

    @property
    def family(self) -> str:
        """Equal for launches of one kernel with the same element types, declared constants and options."""
        function = self._function
        declared = {i: self.constants.get((i,)) for i in function.constexprs}
        pointers = [kind for kind in self.signature.values() if kind.startswith("*")]
        return repr((self.module, self.kernel, declared, pointers, self.options))

    @property
    def source(self) -> ASTSource:
        """What Triton compiles."""
        return ASTSource(fn=self._function, signature=self.signature, constexprs=self.constants, attrs=self.attributes)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.kernel)


class _PretendedDriver:
    """What Triton asks its driver when it binds arguments. The device's number is its compute capability, so that
    binders, which Triton keeps by device, are not mixed up between two of them."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


@contextmanager
def recorded(arch: int, note: Callable[[Launch], None]) -> Iterator[None]:
    """Call `note` for every launch inside, in place of it; launchers see a device of compute capability `arch`.

    Operands may be on the CPU or on the meta device. No result is written.

    Raises:
        RuntimeError: kernels are interpreted, so there is nothing that would be compiled.
    """
    if common.INTERPRETED:
        raise RuntimeError("Launches cannot be recorded while kernels are interpreted; unset TRITON_INTERPRET.")
    calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def with_arguments(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        calls.append((grid(arguments) if callable(grid) else grid, arguments))
        try:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        finally:
            calls.pop()

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        grid, arguments = calls[-1]
        note(
            Launch(
                fn.module,
                fn.name.rpartition(".")[2],
                dict(compile["signature"]),
                dict(compile["constants"]),
                dict(compile["configs"][0]),
                {name: compile[name] for name in _OPTIONS if name in compile},
                tuple(grid),
                _tensors(arguments.values()),
                {name: value for name, value in arguments.items() if isinstance(value, (int, float))},
            )
        )
        return True

    with ExitStack() as stack:
        stack.enter_context(_pretended(arch))
        stack.enter_context(mock.patch.object(JITFunction, "run", with_arguments))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook))
        yield


def _tensors(arguments: Any) -> tuple[tuple[tuple[int, ...], str, int], ...]:
    """Shape, element type and bytes of the tensors among `arguments`; a tensor that is passed twice counts once."""
    found = {id(t): t for t in arguments if isinstance(t, Tensor)}
    return tuple((tuple(t.shape), str(t.dtype)[6:], t.numel() * t.element_size()) for t in found.values())


def families() -> list[Any]:
    """All modules of loraga/kernels: a module has to be imported before its questions can be answered otherwise."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if not found.ispkg]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


@contextmanager
def _pretended(arch: int) -> Iterator[None]:
    """Launchers, and Triton's binders, ask about the device; here they get the answers of a card of `arch`."""
    answers = {"arch_of": lambda device: arch, "processors": lambda device: MULTIPROCESSORS[arch].processors}
    originals = {name: getattr(common, name) for name in answers}
    name = "_active" if hasattr(driver, "_active") else "active"
    before = getattr(driver, name)
    with ExitStack() as stack:
        for module in families():
            for asked, answer in answers.items():
                if getattr(module, asked, None) is originals[asked]:
                    stack.enter_context(mock.patch.object(module, asked, answer))
        driver.set_active(_PretendedDriver(arch))
        try:
            yield
        finally:
            setattr(driver, name, before)
