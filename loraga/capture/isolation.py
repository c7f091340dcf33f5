"""A model held still while it is looked at: nothing random, nothing learned, and everything put back afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from loraga._rollback import remember_values
from loraga.integrations.bitsandbytes import is_bitsandbytes


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch (CPU and CUDA) back on leaving."""
    python, host = random.getstate(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(host)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Freeze parameters and switch off what is random or keeps statistics, for the time of the context.

    All modules are put into eval mode (no dropout, BatchNorm statistics stand still) except where training mode is
    what makes the code path work: modules that checkpoint activations only while training (transformers), recurrent
    layers, whose cuDNN backward exists only in training mode, and layers of bitsandbytes. On those the dropout rates
    are zero instead. torch's own transformer layers keep to their ordinary path: in eval mode with nothing to train
    they would take one for inference, which calls no layer or passes nested tensors. What torch.compile made runs as
    it was written. Gradients are enabled also where the caller had disabled them. Modes, `requires_grad` and rates are
    as before afterwards, whatever happens inside.
    """
    with ExitStack() as undo:
        checkpointing = False
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            checkpoints = bool(getattr(module, "gradient_checkpointing", False))
            checkpointing |= checkpoints
            module.training = checkpoints or isinstance(module, nn.RNNBase) or is_bitsandbytes(module)
            if module.training:
                for owner in (module, getattr(module, "config", None)):
                    _zero_rates(owner, undo.callback)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    # by name: accelerate makes offloaded parameters anew in every forward
                    undo.callback(_require_grad, module, name)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if checkpointing:
            _let_gradients_start_at_embeddings(model, undo)
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        # what `module.compile()` made knows no hooks, and would be compiled anew around each of them
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def preserved_gradients(model: nn.Module) -> Iterator[None]:
    """Put `.grad`, `requires_grad` and buffers back on leaving, whatever code of the caller's does to them.

    Meanwhile no parameter has a gradient, so that clearing or clipping them touches none of the caller's.
    """
    with ExitStack() as undo:
        undo.callback(remember_values(model.buffers()))
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
        yield


def _require_grad(module: nn.Module, name: str) -> None:
    parameter = module._parameters.get(name)
    if parameter is not None:
        parameter.requires_grad_(True)


def _zero_rates(owner: Any, later: Callable[..., Any]) -> None:
    for key, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, float) and ("dropout" in key or "layerdrop" in key) and value != 0.0:
            later(setattr, owner, key, value)
            setattr(owner, key, 0.0)


def _let_gradients_start_at_embeddings(model: nn.Module, undo: ExitStack) -> None:
    """Reentrant checkpointing builds no graph for blocks whose inputs need no gradient.

    Every part is asked for its own: encoder and decoder, or image and text, may start at different ones.
    """

    def require(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and torch.is_grad_enabled():
            output.requires_grad_(True)

    for embeddings in dict.fromkeys(map(_input_embeddings, model.modules())):
        if isinstance(embeddings, nn.Module):
            undo.callback(embeddings.register_forward_hook(require).remove)


def _input_embeddings(module: Any) -> Any:
    try:
        return module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
