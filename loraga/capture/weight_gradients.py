"""Gradients that autograd forms itself, received one at a time.

Taps cannot be used for a layer whose weight gradient is not the product of its input and output gradient (convolutions,
embeddings, custom modules). Autograd forms the gradient of such a layer, a callback receives it, and its memory is
freed before autograd forms the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Receive = Callable[[str, Tensor], None]

# the first dimension of their weight counts inputs, not outputs
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_matrix(module: nn.Module, parameter: str = "weight") -> nn.Parameter | None:
    """The weight of a layer as a parameter that can be read as a matrix (m, n), or None if it cannot be.

    m is its first size and n the product of all others. It must be an ordinary floating-point parameter with storage:
    not quantized, not sharded, not computed from other parameters, and of 2 bytes per number or more.
    """
    weight = module._parameters.get(parameter)
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dim() < 2 or isinstance(module, _TRANSPOSED):
        return None
    return weight if weight.is_floating_point() and weight.element_size() >= 2 else None


@dataclass(frozen=True)
class WeightGradient:
    """A parameter whose gradient autograd forms, and how it is read as matrices (m, n).

    Attributes:
        module (`nn.Module`): the module that the parameter belongs to.
        parameter (`str`): its name in that module.
        stacked (`bool`): True if the first size counts experts, each with its own matrix. Otherwise the parameter is
            one matrix, whose m is the first size and whose n is the product of all others.
        transposed (`bool`): True if each matrix is stored as (n, m).
    """

    module: nn.Module
    parameter: str = "weight"
    stacked: bool = False
    transposed: bool = False

    @property
    def value(self) -> nn.Parameter:
        """The parameter that the module has at the moment."""
        return self.module.get_parameter(self.parameter)

    def parts(self, name: str) -> list[str]:
        """The names of the matrices of a layer called `name`: "name" for one, "name[0]", "name[1]", ... for more."""
        count = self.value.shape[0] if self.stacked else 1
        return [name] if count == 1 else [f"{name}[{index}]" for index in range(count)]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        first, *others = self.value.shape[1:] if self.stacked else self.value.shape
        return (math.prod(others), first) if self.transposed else (first, math.prod(others))

    def matrices(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views (m, n) or (m, ...) of a tensor of the parameter's shape; a sparse tensor is made dense first."""
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        stack = tensor.unbind(0) if self.stacked else (tensor,)
        return tuple(matrix.mT for matrix in stack) if self.transposed else stack


@contextmanager
def separate_parameters(weights: Mapping[str, WeightGradient]) -> Iterator[dict[str, nn.Parameter]]:
    """Give each module a new parameter on the storage of its weight; restore the old parameters on leaving.

    Several layers may share a weight (an embedding tied to the output layer). Autograd would add the gradients of all
    of them; with a separate parameter it forms that of the one layer.

    Raises:
        ValueError: a layer has no weight whose gradient can be taken (see `weight_matrix`).
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
    """Context manager: passes the gradients of `parameters` to `receive`, one at a time.

    When autograd has written a gradient, `receive` is called with it, and `.grad` is set to None before backward
    continues. So at most one gradient of these parameters exists, unless `receive` stores it. On leaving, also with an
    error, `requires_grad`, `.grad` and hooks are restored.

    Args:
        parameters (mapping of `str` to `nn.Parameter`): by layer; `requires_grad` is turned on for them.
        receive (callable): called as receive(name, gradient) during backward, without grad mode, each time a gradient
            is complete. That is once per backward, or several times where reentrant checkpointing runs backward in
            pieces. The gradient has the shape and dtype of the parameter and any strides; it may be sparse.
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
