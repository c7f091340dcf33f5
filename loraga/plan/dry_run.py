"""Counts bytes and flops of a computation, op by op, on meta tensors, which have a shape and no numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from loraga.ops import reference

aten = torch.ops.aten


@dataclass(frozen=True)
class Ceilings:
    """The most that a device can do: floating-point operations per second and bytes of memory traffic per second."""

    flops: float
    bytes: float


@dataclass
class Cost:
    """Cost of a part of a dry run.

    Attributes:
        extra (`int`): peak memory in bytes, above what was live at the start of the part.
        flops (`int`): floating-point operations.
        seconds (`float`): time at the ceilings, 0 without ceilings.
    """

    extra: int = 0
    flops: int = 0
    seconds: float = 0.0


class DryRun:
    """Context manager: counts bytes, flops and time of the ops on the meta device inside it, in one thread.

    Memory is the sum of all storages that ops inside the context made and that still exist. An allocator is assumed
    that wastes nothing. Temporaries inside an op are not counted. Only loraga's own ops are different: their plain
    torch version runs instead, and its temporaries count. Attention counts as a fused kernel, which stores no matrix of
    scores.

    Flops are those of products, attention and convolutions. A multiplication with its addition counts as two, also
    where the entry is masked. The time of an op is flops / `ceilings.flops` or bytes / `ceilings.bytes`, whichever is
    larger, where each operand is read once and each result is written once.

    Code may ask whether a condition is true for the values of a tensor (`bool(tensor)`). There are no values here, and
    the answer is always True. In the models of transformers it means that no token is masked and rows are not packed.

    Args:
        ceilings (`Ceilings`, *optional*): of the device. Without them `seconds` stays 0.

    Attributes:
        live, peak (`int`): bytes at the moment, and the most in the current phase.
        peaks (`Counter[str]`): the peak of each phase that has ended, by name.
        flops (`int`), seconds (`float`): sums so far.
    """

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self.live = self.peak = self.flops = 0
        self.seconds = 0.0
        self.peaks: Counter[str] = Counter()
        self._ceilings = ceilings
        self._phase = "start"
        self._known: set[int] = set()  # storages that are counted already, or never are
        self._modes: tuple[AbstractContextManager[Any], ...] = (_Attention(), _Counting(self))

    def __enter__(self) -> DryRun:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(error_type, error, trace)
        self.phase("")

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The `context_fn` for torch's checkpointing: contexts for the forward and for its repetition in backward.

        torch switches function modes off in backward, so the repetition needs `_Attention` again.
        """
        return nullcontext(), _Attention()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count the storages of these tensors, also where an op returns a view of one."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def include(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors, which were made before, as long as they exist."""
        for tensor in tensors:
            self._count_storage(tensor)

    def phase(self, name: str) -> None:
        """End the current phase and start phase `name`: from here on `peak` belongs to it."""
        self.peaks[self._phase] = max(self.peaks[self._phase], self.peak)
        self._phase, self.peak = name, self.live

    def count_temporary(self, extra: int) -> None:
        """Count `extra` bytes that existed in addition to what is live, and are freed already."""
        self.peak = max(self.peak, self.live + extra)

    @contextmanager
    def aside(self) -> Iterator[Cost]:
        """Context whose ops are counted in the yielded `Cost` only, which is complete after the context."""
        before, base, cost = (self.peak, self.flops, self.seconds), self.live, Cost()
        self.peak, self.flops, self.seconds = base, 0, 0.0
        try:
            yield cost
        finally:
            cost.extra, cost.flops, cost.seconds = self.peak - base, self.flops, self.seconds
            self.peak, self.flops, self.seconds = before

    def _count_storage(self, value: Tensor) -> bool:
        """Count the storage of `value` until it is freed; False if it is known already or not on the meta device."""
        if not value.is_meta:
            return False
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return False
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False
        return True

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _count_op(self, flops: int, moved: int) -> None:
        """Count an op of so many flops that reads and writes `moved` bytes."""
        self.flops += flops
        if self._ceilings is not None:
            self.seconds += max(flops / self._ceilings.flops, moved / self._ceilings.bytes)


class _Counting(TorchDispatchMode):
    """Sees every op below autograd, so those of backward as well, and counts it in a dry run."""

    def __init__(self, run: DryRun) -> None:
        TorchDispatchMode.__init__(self)
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "loraga":
            with self:
                return getattr(reference, func._schema.name.split("::")[1])(*args, **kwargs)
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func._overloadpacket not in _FORMULAS:
            with self:  # autograd decomposes an op that consists of other ops, but not in all cases
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.mm.dtype:  # torch 2.9 cannot run it on the meta device
            out = args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        elif func is aten.mm.dtype_out:
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        new = [self._run._count_storage(result) for result in results]
        formula = _FORMULAS.get(func._overloadpacket)
        # torch's formulas know no dtype of the result
        operands_of = args[: _OPERANDS.get(func, len(args))]
        flops = formula(*operands_of, out_val=out) if formula is not None else 0
        if any(new) or func._schema.is_mutable:
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._run._count_op(flops, sum(t.numel() * t.element_size() for t in operands + results))
        return out


class _Attention(TorchFunctionMode):
    """Runs torch's attention as one op in forward and one in backward, which save what a fused kernel saves.

    On the meta device torch would compute it by products, with all matrices of scores. The fused kernel of the CPU is
    used instead: it saves tensors of the same shapes as those of GPUs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            out = _fused(*args, **(kwargs or {}))
            if out is not None:
                return out
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`torch.nn.functional.scaled_dot_product_attention` by the fused kernel, or None if it does not take these."""
    if query.dim() != 4 or (attn_mask is not None and attn_mask.requires_grad):
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, _with_heads_of(query, key), _with_heads_of(query, value))
    return flops


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = query.shape, _with_heads_of(query, key), _with_heads_of(query, value)
    flops: int = sdpa_backward_flop_count(grad.shape, *shapes)
    return flops


def _with_heads_of(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The shape that keys or values would have with as many heads as the query."""
    return (*key.shape[:1], query.shape[1], *key.shape[2:])


_OPERANDS = {
    aten.mm.dtype: 2,
    aten.mm.dtype_out: 2,
    aten.bmm.dtype: 2,
}
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
