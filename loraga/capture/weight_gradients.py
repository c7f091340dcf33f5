"""Gradients that autograd forms itself, taken as soon as each exists.

A layer whose weight gradient is no product of its input and output gradient (convolutions, embeddings, custom modules)
is not covered by the taps. Its gradient is formed, handed over and freed before the next one comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Receive = Callable[[str, Tensor], None]

# the first index of their weight is that of the input, not of the output
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_matrix(module: nn.Module, parameter: str = "weight") -> nn.Parameter | None:
    """The weight of a layer that can be seen as a matrix (m, n) = (its first size, all others), or None.

    It must be an ordinary floating parameter with storage: not quantized, not sharded, not computed from others.
    """
    weight = module._parameters.get(parameter)
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dim() < 2 or isinstance(module, _TRANSPOSED):
        return None
    return weight if weight.is_floating_point() and weight.element_size() >= 2 else None


@dataclass(frozen=True)
class WeightGradient:
    """A parameter whose gradient autograd forms, and how it is read as matrices (m, n).

    Attributes:
        module (`nn.Module`): holds it.
        parameter (`str`): its name there.
        stacked (`bool`): the first size counts experts, each with a matrix of its own; otherwise it is one matrix, its
            first size by all others.
        transposed (`bool`): it is stored as (n, m).
    """

    module: nn.Module
    parameter: str = "weight"
    stacked: bool = False
    transposed: bool = False

    @property
    def value(self) -> nn.Parameter:
        """The parameter as it is now."""
        return self.module.get_parameter(self.parameter)

    def parts(self, name: str) -> list[str]:
        """What the matrices are called in a layer called `name`."""
        count = self.value.shape[0] if self.stacked else 1
        return [name] if count == 1 else [f"{name}[{index}]" for index in range(count)]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        first, *others = self.value.shape[1:] if self.stacked else self.value.shape
        return (math.prod(others), first) if self.transposed else (first, math.prod(others))

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views (m, n) or (m, ...) of a tensor of the parameter's shape; a sparse one is made dense."""
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        stack = tensor.unbind(0) if self.stacked else (tensor,)
        return tuple(matrix.mT for matrix in stack) if self.transposed else stack


@contextmanager
def separate_parameters(weights: Mapping[str, WeightGradient]) -> Iterator[dict[str, nn.Parameter]]:
    """Give each module a parameter of its own on the storage of its weight; the old ones are back on leaving.

    A weight that other layers use too (an embedding tied to the output layer) would collect their gradients as well.
    """
    with ExitStack() as undo:
        own: dict[str, nn.Parameter] = {}
        for name, stored in weights.items():
            module = stored.module
            weight = weight_matrix(module, stored.parameter)
            if weight is None:
                raise ValueError(f"Layer {name!r} ({type(module).__name__}) has no weight whose gradient can be taken.")
            own[name] = nn.Parameter(weight.detach(), requires_grad=False)
            undo.callback(module._parameters.__setitem__, stored.parameter, weight)
            module._parameters[stored.parameter] = own[name]
        yield own


class WeightGradientHooks:
    """Context manager: gradients of `parameters`, one at a time.

    Autograd writes a gradient, `receive` gets it, and `.grad` is None again before backward goes on, so that at most
    one gradient of these parameters exists unless `receive` keeps it. On leaving, `requires_grad`, `.grad` and hooks
    are as before, whatever happened inside.

    Args:
        parameters (mapping of `str` to `nn.Parameter`): whose gradients to take; `requires_grad` is turned on for them.
        receive (callable): called as receive(name, gradient) within backward, without grad mode, once each time a
            gradient is complete (several times where reentrant checkpointing runs backward in pieces). The gradient
            has the shape of the parameter, any strides, and the parameter's dtype; it may be sparse.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], receive: Receive) -> None:
        self._parameters = dict(parameters)
        self._receive = receive
        self._undo = ExitStack()

    def __enter__(self) -> WeightGradientHooks:
        with ExitStack() as undo:
            for name, parameter in self._parameters.items():
                undo.callback(setattr, parameter, "grad", parameter.grad)
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.grad = None
                parameter.requires_grad_(True)
                undo.callback(parameter.register_post_accumulate_grad_hook(self._hook(name)).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # the hook runs because autograd has just written it
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self._receive(name, gradient.detach())

        return hook
