"""Contexts in which a model computes gradients without randomness and without changes that remain afterwards."""

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
    """Restore the state of the global generators of Python, NumPy and torch (CPU and CUDA) on leaving."""
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
    """Freeze the parameters of `model` and switch off what is random or updates statistics, inside the context.

    All modules are put into eval mode, in which dropout does nothing and BatchNorm does not update its statistics. Some
    modules need training mode to work: those of transformers that checkpoint activations only while training, recurrent
    layers, whose cuDNN backward exists only in training mode, and layers of bitsandbytes. They stay in training mode,
    and their dropout rates are set to zero.

    torch's own transformer layers have a fast path for inference, which they would choose in eval mode without trained
    parameters. It does not call the linear layers or passes nested tensors to them, so it is switched off. Compiled
    modules run without compilation. Gradients are enabled also where the caller disabled them. On leaving, also with an
    error, modes, `requires_grad` and rates are restored.
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
                    # by name, because accelerate creates new parameter objects for offloaded weights in every forward
                    undo.callback(_require_grad, module, name)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if checkpointing:
            _let_gradients_start_at_embeddings(model, undo)
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        # code that `module.compile()` made before calls no hooks, and would be compiled again for each hook
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def preserved_gradients(model: nn.Module) -> Iterator[None]:
    """Restore `.grad`, `requires_grad` and buffers on leaving, whatever the caller's code does to them inside.

    Inside, every `.grad` is None at first, so code that clears or clips gradients does not change the caller's.
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


def _zero_rates(owner: Any, undo_by: Callable[..., Any]) -> None:
    """Set the dropout and layerdrop rates of `owner` to zero; `undo_by` is given the calls that restore them."""
    for key, value in list(getattr(owner, "__dict__", {}).items()):
        if isinstance(value, float) and ("dropout" in key or "layerdrop" in key) and value != 0.0:
            undo_by(setattr, owner, key, value)
            setattr(owner, key, 0.0)


def _let_gradients_start_at_embeddings(model: nn.Module, undo: ExitStack) -> None:
    """Make the outputs of all input embeddings require a gradient.

    Reentrant checkpointing builds no graph for a block whose inputs need no gradient. Every module is asked for its
    input embeddings, because encoder and decoder, or image and text, may start at different ones.
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
