"""The tap: what is seen of a layer in forward and backward, without touching its weight.

A forward hook on each target replaces the output y by an identity op on it. The op keeps the layer's input x with
`save_for_backward`: checkpointing drops and recomputes it like any saved tensor, and layers fed by one tensor share one
storage. In backward it hands (x, dy) to the function `on_pair`. The weight itself is never differentiated. So linear,
quantized and sharded layers work alike, and autograd computes no weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraga.capture.weight_gradients import WeightGradient
from loraga.linalg.precision import own_precision

OnPair = Callable[[str, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, root: Tensor | None, name: str, taps: Taps) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.taps = name, taps
        ctx.within = torch._C._current_graph_task_id()  # the backward that recomputes a checkpoint, else -1
        # An in-place op behind the layer must find a tensor it may write to, so the result may not be a view in
        # autograd's eyes. y itself, marked dirty, is that tensor, except where y is a view already: writing to one
        # costs a copy of its base's gradient, and an alias without view bookkeeping does not.
        if y._is_view():
            return torch.ops.aten._unsafe_view(y, y.shape)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (x,) = ctx.saved_tensors
        with torch.no_grad(), own_precision(dy.device):
            # reentrant checkpointing runs backward inside backward: the outer one is what the caller asked for
            ctx.taps.enter_backward(ctx.within if ctx.within >= 0 else torch._C._current_graph_task_id())
            ctx.taps.on_pair(ctx.name, *_matrices(x, dy))
        return dy, None, None, None, None


def _matrices(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, n) and dy (T, m), tokens flattened, in one dtype: the narrower, in which the layer itself multiplied.

    float64 becomes float32, in which the sums are kept.
    """
    x, dy = x.detach().reshape(-1, x.shape[-1]), dy.detach().reshape(-1, dy.shape[-1])
    if x.dtype != dy.dtype:
        dtype = dy.dtype if dy.element_size() < x.element_size() else x.dtype
        x, dy = x.to(dtype), dy.to(dtype)
    return (x.float(), dy.float()) if x.dtype == torch.float64 else (x, dy)


class Taps:
    """Context manager: taps on `targets`, taken off again on leaving, whatever happens inside.

    Args:
        targets (mapping of `str` to `nn.Module`): the layers; each takes x (..., n) and returns y (..., m).
        on_pair (callable): called as on_pair(name, x, dy), with x (T, n) and dy (T, m), once for each call of a layer,
            during backward.
        watched (mapping of `str` to `WeightGradient`, *optional*): further layers, which get no tap: `backward` reaches
            the parameter of each, so that a `WeightGradientHooks` sees its gradient.
        on_backward (callable, *optional*): called before the first `on_pair` of every backward call.

    Attributes:
        called (`set` of `str`): layers whose forward ran with gradients enabled.
        saw_float16 (`bool`): a layer multiplied in float16, whose small gradients vanish unless the loss is scaled.
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
                self._handles.append(weight.module.register_forward_hook(self._note(name, weight)))
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
        """Backward of `loss` as far as taps need it: no `.grad` of the model or of the caller's tensors is touched."""
        inputs = [*self._roots.values(), *(weight.value for weight in self._watched.values())]
        if self._reentrant or not inputs:  # reentrant checkpointing refuses named inputs
            loss.backward()
        else:
            torch.autograd.backward(loss, inputs=inputs)

    def enter_backward(self, number: int) -> None:
        """A tap was reached by the backward call of this number, as autograd counts them."""
        if number != self._backward_id:
            self._backward_id = number
            if self._on_backward is not None:
                self._on_backward()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Tensor | None:
            if not torch.is_grad_enabled():
                self._reentrant = True  # or a forward of the user's own that needs no gradient
                return None
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                raise TypeError(
                    f"Layer {name!r} ({type(module).__name__}) does not map one tensor to one tensor, so its gradient "
                    "cannot be seen; leave it out of target_modules."
                )
            self.called.add(name)
            self.saw_float16 |= y.dtype == torch.float16
            return _Tap.apply(y, x, self._root(y.device), name, self)

        return hook

    def _note(self, name: str, weight: WeightGradient) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, y: Any) -> None:
            if not torch.is_grad_enabled():
                self._reentrant = True
                return
            self.called.add(name)
            self.saw_float16 |= torch.float16 in (getattr(y, "dtype", None), weight.value.dtype)

        return hook

    def _root(self, device: torch.device) -> Tensor:
        """An input of every tap: the graph starts here where nothing upstream requires a gradient."""
        if device not in self._roots:
            self._roots[device] = torch.zeros((), device=device, requires_grad=True)
        return self._roots[device]
