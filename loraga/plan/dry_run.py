"""Bytes and flops of a computation, counted op by op on tensors that have a shape and no numbers."""

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
    """What a device can do at most: operations per second and bytes per second."""

    flops: float
    bytes: float


@dataclass
class Cost:
    """Of a part of a dry run: bytes above what was live at its start, operations, seconds at the ceilings."""

    extra: int = 0
    flops: int = 0
    seconds: float = 0.0


class DryRun:
    """Context manager: counts what is computed on the meta device inside, in one thread.

    Memory is that of storages which ops inside made and somebody still holds, as an allocator without waste would give
    it out; what an op needs inside itself is not seen, except for loraga's own, of which the plain torch version is
    followed. Attention is counted as a fused kernel, which keeps no matrix of scores. Flops are those of products,
    attention and convolutions, two per multiplication and addition, masked or not. An op's time is the longer one of
    flops and bytes (operands read once, result written once) at the ceilings.

    Where the code asks whether something holds for the values of a tensor, the answer is yes: in transformers' models
    that is to find all tokens unmasked and rows unpacked.

    Args:
        ceilings (`Ceilings`, *optional*): to add up `seconds`.

    Attributes:
        live, peak (`int`): bytes now, and the most there were in the current phase.
        peaks (`dict[str, int]`): that of each phase.
        flops (`int`), seconds (`float`): so far.
    """

    def __init__(self, ceilings: Ceilings | None = None) -> None:
        self.live = self.peak = self.flops = 0
        self.seconds = 0.0
        self.peaks: Counter[str] = Counter()
        self._ceilings = ceilings
        self._phase = "start"
        self._held: set[int] = set()
        self._modes = (_Attention(), _Counting(self))

    def __enter__(self) -> DryRun:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
        self.phase("")

    def again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` of torch's checkpointing: in backward torch's modes for functions are off."""
        return nullcontext(), _Attention()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count these, which are there already, though ops may give out views of them."""
        self._held.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def take_in(self, tensors: Iterable[Tensor]) -> None:
        """Count these, which were made before, as long as somebody holds them."""
        for tensor in tensors:
            self._made(tensor)

    def phase(self, name: str) -> None:
        """From here on the peak is that of phase `name`."""
        self.peaks[self._phase] = max(self.peaks[self._phase], self.peak)
        self._phase, self.peak = name, self.live

    def touch(self, extra: int) -> None:
        """Take note of `extra` bytes above what is live, which are gone already."""
        self.peak = max(self.peak, self.live + extra)

    @contextmanager
    def aside(self) -> Iterator[Cost]:
        """What is computed inside is counted apart, in what is yielded; it is complete on leaving."""
        before, base, cost = (self.peak, self.flops, self.seconds), self.live, Cost()
        self.peak, self.flops, self.seconds = base, 0, 0.0
        try:
            yield cost
        finally:
            cost.extra, cost.flops, cost.seconds = self.peak - base, self.flops, self.seconds
            self.peak, self.flops, self.seconds = before

    def _made(self, value: Tensor) -> bool:
        if not value.is_meta:
            return False
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return False
        self._held.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False
        return True

    def _freed(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size

    def _count(self, flops: int, moved: int) -> None:
        self.flops += flops
        if self._ceilings is not None:
            self.seconds += max(flops / self._ceilings.flops, moved / self._ceilings.bytes)


class _Counting(TorchDispatchMode):
    def __init__(self, run: DryRun) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "loraga":
            with self:
                return getattr(reference, func._schema.name.split("::")[1])(*args, **kwargs)
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func._overloadpacket not in _FORMULAS:
            with self:  # what is made of other ops comes here whole where autograd did not take it apart
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten.mm.dtype:  # torch 2.9 cannot run it on the meta device
            out = args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        else:
            out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        new = [self._run._made(result) for result in results]
        formula = _FORMULAS.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        if any(new) or func._schema.is_mutable:
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._run._count(flops, sum(t.numel() * t.element_size() for t in operands + results))
        return out


class _Attention(TorchFunctionMode):
    """torch's attention as one op, forward and backward, with what a fused kernel keeps in between.

    On the meta device torch would write it out with all its matrices of scores. The CPU's kernel has its shapes in
    common with those for GPUs.
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
    if query.dim() != 4 or (attn_mask is not None and attn_mask.requires_grad):
        return None  # no fused kernel takes these
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, _with_heads_of(query, key), _with_heads_of(query, value))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, _with_heads_of(query, key), _with_heads_of(query, value))


def _with_heads_of(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The shape of keys or values once each head of the query has its own."""
    return (*key.shape[:1], query.shape[1], *key.shape[2:])


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
