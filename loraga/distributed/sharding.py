"""Models whose parameters are sharded over processes: checks which sharding is supported, and writes to shards.

FSDP2 (`fully_shard`) is supported: it gathers a layer's weight inside its forward only, so a tap receives complete
activations. The other ways raise an error that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank has only a part of the parameters, so that a forward pass waits for other ranks."""
    return _fsdp2(model) != [] or any(map(is_distributed, model.parameters()))


def is_distributed(value: Any) -> bool:
    """Whether `value` is a `DTensor`."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _fsdp2(model: nn.Module) -> list[Any]:
    """The modules of `model` that `fully_shard` was called on."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Context that shards the parameters of FSDP2 modules again, on entering and on leaving.

    FSDP2 keeps the parameters of the outermost module gathered after a forward without backward. If an error ends a
    forward, the modules that ran at that moment keep theirs.
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
    """Raise `ValueError` if parameters cannot be used as they are, as with DeepSpeed ZeRO-3 and FSDP1."""
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
    """Raise `ValueError` if `fully_shard` was called on `model`: it would not manage an adapter that is added now."""
    if _fsdp2(model):
        raise ValueError(
            "The model is sharded by fully_shard already, which would not know of an adapter added now: its gradients "
            "would differ from rank to rank. Add the adapter with get_peft_model first, then call fully_shard, then "
            "fast_init on the PeftModel; or call fast_init on the whole model and fully_shard what comes back."
        )


def check_layers(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` if a target is tensor-parallel: each rank computes only a part of its output or sum."""
    managed = {id(module) for unit in _fsdp2(model) for module in unit.modules()}
    for name, layer in targets.items():
        weight: Any = getattr(layer, "weight", None)
        parallel = getattr(layer, "_hf_tp_plan", None)
        if parallel is None and is_distributed(weight):
            cuts = [placement for placement in weight.placements if not placement.is_replicate()]
            # FSDP shards along one dimension of the mesh, and gathers the weight before it computes
            if len(cuts) > (id(layer) in managed):
                parallel = ", ".join(map(str, weight.placements))
        if parallel is not None:
            raise ValueError(
                f"Layer {name!r} is tensor-parallel ({parallel}): a rank sees a part of its gradient only. Leave it "
                "out of target_modules, use FSDP2, or initialise without tensor parallelism (`loraga init`) and load "
                "the adapter."
            )


def filled(like: Any, value: Tensor) -> Tensor:
    """`value`, which all ranks have, with the device mesh and placements of `like`; ranks do not communicate."""
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def gathered(value: Any) -> Tensor:
    """All numbers of a tensor that may be sharded; every rank must call this."""
    full: Tensor = value.full_tensor() if is_distributed(value) else value
    return full
