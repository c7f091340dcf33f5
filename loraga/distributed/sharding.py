"""Models cut up over processes: which ways of doing so loraga works with, and writing to what is sharded.

FSDP2 (`fully_shard`) gathers a layer's weight inside its forward only, so a tap sees whole activations and nothing of
the sharding. The other ways are refused, each with what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Does a forward pass wait for other ranks, because each holds a part of the parameters only?"""
    return _fsdp2(model) != [] or any(map(is_distributed, model.parameters()))


def is_distributed(value: Any) -> bool:
    """Is it a `DTensor`?"""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _fsdp2(model: nn.Module) -> list:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Have parameters sharded on entering and on leaving.

    FSDP2 leaves those of the outermost module gathered after a forward without backward, and whatever it was at when a
    forward is cut short.
    """
    units = _fsdp2(model)
    try:
        for unit in units:
            unit.reshard()
        yield
    finally:
        for unit in units:
            unit.reshard()


def check_sharding(model: nn.Module) -> None:
    """Raise `ValueError` if the parameters are not there to compute with, as under DeepSpeed ZeRO-3 and FSDP1."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_shape"):
            raise ValueError(
                f"DeepSpeed ZeRO-3 has partitioned this model ({name!r} and others), and loraga cannot look into it. "
                "Initialise before DeepSpeed takes over: write an adapter with `loraga init MODEL --data FILE --output "
                "DIR` and start from it with PeftModel.from_pretrained(model, DIR, is_trainable=True)."
            )
        if type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"The model is wrapped in FullyShardedDataParallel, whose flat parameters ({name!r}) no adapter can be "
                "put beside. Use fully_shard (FSDP2), or call loraga first and wrap what comes back."
            )


def check_injectable(model: nn.Module) -> None:
    """Raise `ValueError` if an adapter put into `model` now would be left out of its sharding."""
    if _fsdp2(model):
        raise ValueError(
            "The model is sharded by fully_shard already, which would not know of an adapter added now: its gradients "
            "would differ from rank to rank. Add the adapter with get_peft_model first, then call fully_shard, then "
            "fast_init on the PeftModel; or call fast_init on the whole model and fully_shard what comes back."
        )


def check_layers(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` if a target computes a part of its output or of its sum only (tensor parallelism)."""
    managed = {id(module) for unit in _fsdp2(model) for module in unit.modules()}
    for name, layer in targets.items():
        weight: Any = getattr(layer, "weight", None)
        parallel = getattr(layer, "_hf_tp_plan", None)
        if parallel is None and is_distributed(weight):
            cuts = [placement for placement in weight.placements if not placement.is_replicate()]
            # FSDP cuts along one dimension of the mesh, and computes with the whole weight
            if len(cuts) > (id(layer) in managed):
                parallel = ", ".join(map(str, weight.placements))
        if parallel is not None:
            raise ValueError(
                f"Layer {name!r} is tensor-parallel ({parallel}): a rank sees a part of its gradient only. Leave it "
                "out of target_modules, use FSDP2, or initialise without tensor parallelism (`loraga init`) and load "
                "the adapter."
            )


def filled(like: Any, value: Tensor) -> Tensor:
    """`value`, which all ranks have, distributed as `like` is; no communication."""
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def gathered(value: Any) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks must ask for it."""
    return value.full_tensor() if is_distributed(value) else value
