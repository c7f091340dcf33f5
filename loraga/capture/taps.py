"""The tap: it records input and output gradient of a layer, without using the layer's weight.

A forward hook on each target replaces the output y by an identity op on it. The op saves the layer's input x with
`save_for_backward`. Checkpointing drops and recomputes x like any saved tensor, and layers with the same input share
one storage. In backward the op calls the function `on_pair` with (x, dy). The weight itself is never differentiated.
Therefore linear, quantized and sharded layers work in the same way, and autograd computes no weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraga.capture.weight_gradients import WeightGradient

OnPair = Callable[[str, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, root: Tensor | None, name: str, taps: Taps) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.taps = name, taps
        # number of the backward call that recomputes a checkpoint, or -1 in an ordinary forward
        ctx.within = torch._C._current_graph_task_id()
        # The next op may change the result in place, so autograd must not treat the result as a view. y itself, marked
        # dirty, fulfils that unless y is a view. A write to a view would cost a copy of the gradient of its base;
        # `_unsafe_view` returns an alias that autograd does not treat as a view.
        if y._is_view():
            alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
            return alias
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            # reentrant checkpointing runs a backward call inside another; the outer one is the caller's
            ctx.taps.enter_backward(ctx.within if ctx.within >= 0 else torch._C._current_graph_task_id())
            ctx.taps.on_pair(ctx.name, *_matrices(x, dy))
        return dy, None, None, None, None


_apply_tap: Callable[[Tensor, Tensor, Tensor | None, str, Taps], Tensor] = _Tap.apply


def _matrices(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, n) and dy (T, m) with all leading dimensions flattened, in one dtype.

    Where their dtypes differ, both get the smaller one, because the layer itself computed in it. float64 becomes
    float32, the dtype of the sums.
    """
    x, dy = x.detach().reshape(-1, x.shape[-1]), dy.detach().reshape(-1, dy.shape[-1])
    if x.dtype != dy.dtype:
        dtype = dy.dtype if dy.element_size() < x.element_size() else x.dtype
        x, dy = x.to(dtype), dy.to(dtype)
    return (x.float(), dy.float()) if x.dtype == torch.float64 else (x, dy)


class Taps:
    """Context manager: puts taps on `targets`, and removes them on leaving, also with an error.

    Args:
        targets (mapping of `str` to `nn.Module`): the layers; each takes x (..., n) and returns y (..., m).
        on_pair (callable): called as on_pair(name, x, dy), with x (T, n) and dy (T, m), once for each call of a layer,
            during backward.
        watched (mapping of `str` to `WeightGradient`, *optional*): further layers, which get no tap. `backward`
        computes
            the gradient of the parameter of each, so that a `WeightGradientHooks` receives it.
        on_backward (callable, *optional*): called before the first `on_pair` of every backward call.

    Attributes:
        called (`set` of `str`): layers whose forward ran with gradients enabled.
        saw_float16 (`bool`): some layer computed in float16. Its small gradients underflow unless the loss is scaled.

    Raises:
        TypeError: in forward, if a target does not map one tensor to one tensor.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        on_pair: OnPair,
        watched: Mapping[str, WeightGradient] | None = None,
        on_backward: Callable[[], None] | None = None,
    ) -> None:
        self._targets = targets
        self.on_pair = on_pair
        self._watched = watched or {}
        self._on_backward = on_backward
        self._backward_id = -1
        self._handles: list[Any] = []
        self._roots: dict[torch.device, Tensor] = {}
        self._reentrant = False
        self.called: set[str] = set()
        self.saw_float16 = False

    def __enter__(self) -> Taps:
        try:
            for name, module in self._targets.items():
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
            for name, weight in self._watched.items():
                self._handles.append(weight.module.register_forward_hook(self._watch(name, weight)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def backward(self, loss: Tensor) -> None:
        """Run backward of `loss` as far as taps need it; no `.grad` of the model or of the caller's tensors changes."""
        inputs = [*self._roots.values(), *(weight.value for weight in self._watched.values())]
        if self._reentrant or not inputs:  # reentrant checkpointing raises where inputs are given
            loss.backward()
        else:
            torch.autograd.backward(loss, inputs=inputs)

    def enter_backward(self, number: int) -> None:
        """Call `on_backward` when a backward call reaches its first tap; autograd gives each call a `number`."""
        if number != self._backward_id:
            self._backward_id = number
            if self._on_backward is not None:
                self._on_backward()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
            if not torch.is_grad_enabled():
                # reentrant checkpointing runs its first forward so; the caller may also run one without gradients
                self._reentrant = True
                return None
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                raise TypeError(
                    f"Layer {name!r} ({type(module).__name__}) does not map one tensor to one tensor, so its gradient "
                    "cannot be seen; leave it out of target_modules."
                )
            self.called.add(name)
            self.saw_float16 |= y.dtype == torch.float16
            return _apply_tap(y, x, self._root(y.device), name, self)

        return hook

    def _watch(self, name: str, weight: WeightGradient) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if not torch.is_grad_enabled():
                self._reentrant = True
                return
            self.called.add(name)
            self.saw_float16 |= torch.float16 in (getattr(y, "dtype", None), weight.value.dtype)

        return hook

    def _root(self, device: torch.device) -> Tensor:
        """A scalar that requires a gradient and is an input of every tap: it makes y require one in any case."""
        if device not in self._roots:
            self._roots[device] = torch.zeros((), device=device, requires_grad=True)
        return self._roots[device]
