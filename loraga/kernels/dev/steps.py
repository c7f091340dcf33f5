"""What a GPU is given to do, op by op and launch by launch, counted without one.

The program runs on meta tensors, which have a shape and no numbers. The reference takes the meta device for a GPU, so
products of half-precision operands and everything else are those of a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loraga.kernels.dev.launches import Launch, recorded
from loraga.ops import native, reference
from loraga.ops.triton import LAUNCHERS, launcher

aten = torch.ops.aten

# Ops that only reserve memory, and no kernel runs.
_RESERVING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_FLOPS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_}
_NATIVE = ("cholesky_inverse", "small_svd", "gradient_add_")


@dataclass(frozen=True)
class Step:
    """One thing that the host queues on the device.

    Attributes:
        kind (`str`): "torch" for an op of torch, "triton" or "native" for a kernel of loraga.
        name (`str`): the op or the kernel.
        shapes (`tuple`): of the operands, then of the results.
        dtype (`str`): element type of the first operand, or of the result where there is none.
        bytes (`int`): each operand read once and each result written once.
        flops (`int`): of a product of torch, else 0.
        programs (`int`): of a Triton kernel, else 0.
    """

    kind: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    bytes: int
    flops: int = 0
    programs: int = 0


class Steps(TorchDispatchMode):
    """The mode of `counted`, in which the counts are found.

    Attributes:
        steps (`list[Step]`): so far, in order.
        launches (`list[Launch]`): of Triton kernels.
        views (`int`): ops that queue nothing, because they only look at a tensor in another way or reserve memory. The
            host spends time on them.
    """

    def __init__(self, kernels: bool, formulas: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.launches: list[Launch] = []
        self.views = 0
        self._kernels, self._formulas = kernels, formulas
        self._paused = False

    def counts(self) -> Counter[str]:
        """Number of steps by name."""
        return Counter(step.name for step in self.steps)

    def launched(self, launch: Launch) -> None:
        """Note a launch of a Triton kernel."""
        self.launches.append(launch)
        shapes, dtypes, sizes = zip(*launch.tensors, strict=True)
        self.steps.append(Step("triton", launch.kernel, shapes, dtypes[0], sum(sizes), programs=math.prod(launch.grid)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "loraga":
            return self._own(func, args)
        if func is aten._local_scalar_dense.default:  # a condition that is asked for; see `plan.dry_run`
            return True
        with self:  # autograd decomposes an op that consists of other ops, but not in all cases
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        if not self._paused:
            self._note(func, args, kwargs, out)
        return out

    def _own(self, func: Any, args: Sequence[Any]) -> Any:
        """One of loraga's ops: by its native kernel, its Triton kernel or its reference."""
        name = func._schema.name.partition("::")[2]
        if name in _NATIVE and (name == "gradient_add_" or args[0].shape[-1] <= native._LARGEST_K):
            out = func(*args)
            tensors = _tensors((args, out))
            shapes = tuple(tuple(t.shape) for t in tensors)
            self.steps.append(Step("native", name, shapes, _dtype(tensors[0]), _bytes(tensors)))
            return out
        function = getattr(reference, name)
        if self._kernels and name in LAUNCHERS:
            function = launcher(name)
        with self:
            return function(*args)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.partition("::")[2]
        read = {key: value for key, value in kwargs.items() if key != "out"}
        operands, results = _tensors((args, read)), _tensors(out)
        known = {t.untyped_storage()._cdata for t in operands}
        if name in _RESERVING or not (
            func._schema.is_mutable or any(t.untyped_storage()._cdata not in known for t in results)
        ):
            self.views += 1
            return
        formula = self._formulas.get(func._overloadpacket)
        if formula is None:
            flops = 0
        elif func._overloadpacket in _PRODUCTS:  # whose formulas know neither the dtype of the result nor where it goes
            flops = formula(*(arg for arg in args if isinstance(arg, Tensor)), out_val=out)
        else:
            flops = formula(*args, **kwargs, out_val=out)
        shapes = tuple(tuple(t.shape) for t in operands + results)
        moved = _bytes(operands) + _bytes(results)
        self.steps.append(Step("torch", name, shapes, _dtype((operands + results)[0]), moved, flops))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among `values`, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def counted(arch: int | None = None, formulas: Mapping[Any, Callable[..., int]] | None = None) -> Iterator[Steps]:
    """Context that counts what runs on the meta device inside.

    Of loraga's ops, those that have a kernel in the native core are one step, as on a GPU with the core. With `arch`,
    those that have a Triton kernel are the launches that a card of this compute capability gets. All others are the
    steps of their reference. Directions that the reference keeps are taken as kept already. `formulas` gives the flops
    of further ops of torch.
    """
    steps, directions = Steps(arch is not None, {**_FLOPS, **(formulas or {})}), reference.directions

    def kept(m: int, k: int, *args: Any, **kwargs: Any) -> Tensor:
        if m * k > reference._CACHED_NUMBERS:
            return directions(m, k, *args, **kwargs)
        with steps.paused():
            return directions(m, k, *args, **kwargs)

    with ExitStack() as stack:
        if arch is not None:
            stack.enter_context(recorded(arch, steps.launched))
        stack.enter_context(mock.patch.object(reference, "directions", kept))
        stack.enter_context(steps)
        yield steps
