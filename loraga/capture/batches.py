"""Batches of a loader: how many there are, which device their tensors go to, and the loss of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LossFn = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None, index: int) -> Tensor:
    """The loss of one micro-batch, a 0-dim tensor with an autograd graph. `index` is for error messages.

    Raises:
        ValueError: there is no loss, it is not one number, or it does not require a gradient.
        TypeError: the batch is no mapping, and there is no `loss_fn`.
    """
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        source = "loss_fn"
    elif isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        source = "the model's output.loss"
        if loss is None:
            raise ValueError(
                f"Micro-batch {index}: the model's output has no loss. Put labels into the batch (it has "
                f"{', '.join(map(str, batch))}), or give loss_fn(model, batch)."
            )
    else:
        raise TypeError(
            f"Micro-batch {index} is a {type(batch).__name__}, not a mapping that model(**batch) could take; give "
            "loss_fn(model, batch), which returns the loss."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"Micro-batch {index}: {source} is {got}; the loss must be one number (take its mean or sum).")
    if not loss.requires_grad:
        raise ValueError(
            f"Micro-batch {index}: {source} does not depend on any target layer (it needs no gradient). Was it "
            "detached or computed under no_grad, or are the target layers not part of the forward pass?"
        )
    return loss.reshape(())


def count_of(loader: Iterable[Any], max_batches: int | None) -> int | None:
    """How many micro-batches the loader yields at most, or None if that is not known.

    It is the smaller one of the loader's length and `max_batches`, where both are known.
    """
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # the __len__ of a DataLoader over an iterable dataset raises
        length = None
    return length if max_batches is None else max_batches if length is None else min(length, max_batches)


def input_device(model: nn.Module) -> torch.device:
    """The device of the first parameter that has storage (in language models, that of the input embedding)."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """`batch` with all tensors in nested mappings, lists and tuples on `device`; other values are not changed."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):  # keep its type, because a loss_fn may read attributes
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = moved(value, device)
        return copied
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]  # its annotation lists dtypes only
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch
