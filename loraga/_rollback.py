"""Record the structure or the values of a model, to restore them if something fails after a change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def remember_model(model: nn.Module) -> Callable[[], None]:
    """Record the structure of `model`; the returned function restores it, on the same module objects.

    Recorded are the class and the attributes of every module, the contents of those attributes that are dicts, lists or
    sets (children, parameters, buffers, hooks), the `requires_grad` of every parameter, and the values in the `config`
    of the top module. Values of tensors are not recorded: `remember_values` does that.
    """
    undo = [_remember_module(module) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    if hasattr(config, "__dict__"):
        undo.append(_remember_dict(vars(config)))

    def restore() -> None:
        for restore_part in undo:
            restore_part()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return restore


def remember_modules(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Like `remember_model`, but only class and attributes of single modules, not those of their children."""
    undo = [_remember_module(module) for module in modules]

    def restore() -> None:
        for restore_part in undo:
            restore_part()

    return restore


def remember_values(values: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Copy tensors to host memory; the returned function writes the copies back, bit for bit. Skips meta tensors."""
    copies = [(value, value.detach().to("cpu", copy=True)) for value in values if not value.is_meta]

    def restore() -> None:
        with torch.no_grad():
            for value, copy in copies:
                value.copy_(copy)

    return restore


def _remember_module(module: nn.Module) -> Callable[[], None]:
    module_class = module.__class__
    attributes = _remember_dict(module.__dict__)
    containers = [_remember_container(value) for value in module.__dict__.values() if type(value) in (list, set)]
    dicts = [_remember_dict(value) for value in module.__dict__.values() if isinstance(value, dict)]

    def restore() -> None:
        module.__class__ = module_class
        attributes()
        for restore_part in (*containers, *dicts):
            restore_part()

    return restore


def _remember_dict(value: dict[Any, Any]) -> Callable[[], None]:
    # restored in place: hook handles and other owners have references to these dict objects
    saved = dict(value)

    def restore() -> None:
        value.clear()
        value.update(saved)

    return restore


def _remember_container(value: Any) -> Callable[[], None]:
    saved = value.copy()

    def restore() -> None:
        value.clear()
        value.extend(saved) if isinstance(value, list) else value.update(saved)

    return restore
