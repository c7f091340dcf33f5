"""What a loader gives: how many batches come, where their tensors go, and the loss of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LossFn = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None, index: int) -> Tensor:
    """The scalar loss of one micro-batch, with a graph."""
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
    """How many micro-batches will come, where that can be known."""
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset has __len__, and it raises
        length = None
    return length if max_batches is None else max_batches if length is None else min(length, max_batches)


def input_device(model: nn.Module) -> torch.device:
    """Where the batch goes: the first parameter that has storage (of an embedding, in language models)."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in nested mappings, lists and tuples on `device`; anything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):  # of the same kind, for a loss_fn that reads attributes
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = moved(value, device)
        return copied
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]  # its annotation knows dtypes only
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch
