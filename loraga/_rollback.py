"""Remember how a model is built, to put it back in place if something fails after it was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def remember_model(model: nn.Module) -> Callable[[], None]:
    """Record the structure of `model`; the returned function puts it back, on the same module objects.

    Recorded are every module's class and attributes (with the contents of dicts, lists and sets they hold: children,
    parameters, buffers, hooks) and every parameter's `requires_grad`, for the top module also the values of its
    `config`. Values of tensors are not: `remember_values` does that.
    """
    undo = [_remember_module(module) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    if hasattr(config, "__dict__"):
        undo.append(_remember_dict(vars(config)))

    def restore() -> None:
        for put_back in undo:
            put_back()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return restore


def remember_modules(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """As `remember_model`, of single modules without their children's own attributes."""
    undo = [_remember_module(module) for module in modules]

    def restore() -> None:
        for put_back in undo:
            put_back()

    return restore


def remember_values(values: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Copy tensors to host memory; the returned function writes the copies back, bit for bit."""
    copies = [(value, value.detach().to("cpu", copy=True)) for value in values if not value.is_meta]

    def restore() -> None:
        with torch.no_grad():
            for value, copy in copies:
                value.copy_(copy)

    return restore


def _remember_module(module: nn.Module) -> Callable[[], None]:
    kind = module.__class__
    attributes = _remember_dict(module.__dict__)
    containers = [_remember_container(value) for value in module.__dict__.values() if type(value) in (list, set)]
    dicts = [_remember_dict(value) for value in module.__dict__.values() if isinstance(value, dict)]

    def restore() -> None:
        module.__class__ = kind
        attributes()
        for put_back in (*containers, *dicts):
            put_back()

    return restore


def _remember_dict(value: dict) -> Callable[[], None]:
    # refilled, not replaced: hook handles and other owners keep references to these very dicts
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
