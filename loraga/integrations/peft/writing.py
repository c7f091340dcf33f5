"""Write the start of an adapter into the A and B that PEFT made: in every layer, or in none if anything fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from loraga._rollback import remember_modules, remember_values
from loraga.capture.isolation import rng_untouched
from loraga.config import InitConfig
from loraga.distributed.sharding import filled, is_distributed, is_sharded
from loraga.factors import Factors
from loraga.integrations.accelerate import compute_device
from loraga.integrations.peft.config import plain_start
from loraga.integrations.peft.slots import Adapter, AdapterSlot, base_weight, dequantized
from loraga.integrations.peft.storage import give_storage
from loraga.linalg import seed_of, truncated_svd
from loraga.start import starts
from loraga.start.starts import Start


def start_of(slot: AdapterSlot, factors: Factors, init: InitConfig, seed: int) -> Start:
    """The start of one layer, or of one of a slot's `parts`: A (k, n) and B (m, k), float32, see `starts.start`.

    Raises:
        ValueError: as `starts.start`; also where `scale="weight-svd"` needs a weight that is sharded or that PEFT
            cannot dequantize.
    """
    sigma = None
    if init.method == "lora-ga" and init.scale == "weight-svd":
        if is_distributed(getattr(slot.base_layer, "weight", None)):
            raise ValueError(
                f"scale='weight-svd' needs the whole weight of {slot.name!r}, which is sharded; use scale='stable'."
            )
        sigma = truncated_svd(base_weight(slot), min(slot.rank, *slot.shape), seed=seed_of(seed, slot.name)).S
    return starts.start(
        factors,
        slot.rank,
        init,
        scaling=slot.scaling,
        growth=slot.growth,
        name=slot.name,
        seed=seed,
        weight_sigma=sigma,
    )


def write_start(
    adapter: Adapter,
    starts: Mapping[str, Start],
    *,
    seed: int = 0,
    confirm: Callable[[], object] = lambda: None,
) -> None:
    """Give the layers of an adapter their start: all of them, or none if anything fails.

    The numbers go into the A and B that PEFT made. Beside them only DoRA's magnitudes, the bias of B and the options of
    the start in the adapter's config are reset. Rows for which a layer's start has no numbers, and layers without a
    start, become ordinary LoRA, also if they were trained before.

    Args:
        adapter (`Adapter`): to be started.
        starts (`dict[str, tuple[Tensor, Tensor]]`): A (k, n) and B (m, k) with k <= r, by the names of the
            `Adapter.parts`.
        seed (`int`): of the ordinary rows.
        confirm (callable): called when everything is written. If it raises, all is put back as it was.

    Raises:
        ValueError: a name, shape or value in `starts` does not fit, or a layer that loraga cannot start has no memory
            for its adapter.
    """
    _check_starts(adapter.slots, starts)
    _check_in_memory(adapter)
    check_magnitudes(adapter)
    configs = adapter.peft_model.peft_config
    config = configs[adapter.name]
    undo = _remember(adapter.slots, adapter.name)
    try:
        for slot in adapter.slots:
            _write_slot(slot, adapter.name, starts, seed, gaussian=config.init_lora_weights == "gaussian")
        configs[adapter.name] = plain_start(config)
        confirm()
    except BaseException:
        for restore in undo:
            restore()
        configs[adapter.name] = config
        raise


def _write_slot(slot: AdapterSlot, adapter_name: str, starts: Mapping[str, Start], seed: int, gaussian: bool) -> None:
    """Write the start of one layer, and its DoRA magnitude if it has one."""
    magnitude = _magnitude(slot, adapter_name)
    if slot.A.is_meta:  # PEFT made it without memory (`low_cpu_mem_usage`, offload)
        with rng_untouched():
            give_storage(slot.layer, adapter_name)
        if magnitude is not None:
            magnitude.to_empty(device=compute_device(slot.base_layer))
    fill(slot, starts, seed, gaussian)
    if magnitude is not None:
        _reset_magnitude(slot, magnitude)


def fill(slot: AdapterSlot, starts: Mapping[str, Start], seed: int, gaussian: bool = False) -> None:
    """Write A and B of a layer: the start of each of its `parts`, and PEFT's ordinary numbers in all other rows."""
    bias = getattr(slot.lora_B, "bias", None)
    with torch.no_grad():
        for parameter, value in zip((slot.A, slot.B), _values(slot, starts, seed, gaussian), strict=True):
            parameter.copy_(filled(parameter, value))
        if bias is not None:
            bias.zero_()


def _values(slot: AdapterSlot, starts: Mapping[str, Start], seed: int, gaussian: bool) -> Start:
    """A and B to write, in PEFT's shape."""
    parts = slot.parts()
    if all(part.name in starts and len(starts[part.name][0]) == slot.rank for part in parts):
        return slot.joined([starts[part.name] for part in parts])
    values = []
    for part, (A, B) in zip(parts, slot.matrices(*_ordinary(slot, seed, gaussian)), strict=True):
        A0, B0 = starts.get(part.name, (A[:0], B[:, :0]))
        A0, B0 = A0.to(A), B0.to(B)
        values.append((torch.cat([A0, A[len(A0) :]]), torch.cat([B0, B[:, len(A0) :]], dim=1)))
    return slot.joined(values)


def _ordinary(slot: AdapterSlot, seed: int, gaussian: bool) -> Start:
    """PEFT's own start of a layer, drawn on the host, so that it is the same on every device and every rank."""
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, slot.name))
    A, B = (torch.zeros(p.shape, device="cpu", dtype=torch.float32) for p in (slot.A, slot.B))
    if isinstance(slot.lora_B, nn.ParameterDict):  # of an embedding, where PEFT draws B and sets A to zero
        B.normal_(generator=generator)
    elif gaussian:
        A.normal_(std=1 / slot.rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, B


def _remember(slots: list[AdapterSlot], adapter_name: str) -> tuple[Callable[[], None], ...]:
    """Functions that put these layers back, to be called in this order."""
    holders = [module for slot in slots for module in (slot.lora_A, slot.lora_B)]
    magnitudes = [m for slot in slots if (m := _magnitude(slot, adapter_name)) is not None]
    modules = [*(slot.layer for slot in slots), *holders, *magnitudes]
    values = [parameter for module in (*holders, *magnitudes) for parameter in module.parameters()]
    # the values come last: the modules must have their old parameters again before numbers are written into them
    return remember_modules(modules), remember_values(values)


def _check_starts(slots: list[AdapterSlot], starts: Mapping[str, Start]) -> None:
    """Raise `ValueError` if a start has no layer, another shape than its layer needs, or NaN or Inf."""
    by_name = {part.name: part for slot in slots for part in slot.parts()}
    for name, (A0, B0) in starts.items():
        slot = by_name.get(name)
        if slot is None:
            raise ValueError(f"There is a start for {name!r}, which is no layer of this adapter that can have one.")
        (m, n), r = slot.shape, slot.rank
        k = len(A0)
        if k > r or A0.shape != (k, n) or B0.shape != (m, k):
            raise ValueError(
                f"The start of {name!r} has shapes {tuple(A0.shape)} and {tuple(B0.shape)}; its adapter needs "
                f"A (k, {n}) and B ({m}, k) with k at most {r}."
            )
        if not (torch.isfinite(A0).all() and torch.isfinite(B0).all()):
            raise ValueError(f"The start of {name!r} has NaN or Inf in it.")


def _check_in_memory(adapter: Adapter) -> None:
    """Raise `ValueError` if a layer that loraga cannot start is on the meta device.

    Such a layer needs its start from PEFT, which gives none with `low_cpu_mem_usage=True`.
    """
    for name in adapter.others:
        layer = adapter.peft_model.base_model.model.get_submodule(name)
        if any(p.is_meta for key, p in layer.named_parameters() if adapter.name in key.split(".")):
            raise ValueError(
                f"The adapter of layer {name!r} has no weights yet, and loraga does not start it. Make the "
                "adapter without low_cpu_mem_usage=True."
            )


def check_magnitudes(adapter: Adapter) -> None:
    """Raise `ValueError` if a DoRA magnitude would have to be computed from a sharded weight."""
    if not is_sharded(adapter.peft_model):
        return
    for slot in adapter.slots:
        if _magnitude(slot, adapter.name) is not None:
            raise ValueError(
                f"The DoRA magnitude of {slot.name!r} is the norm of a sharded weight; initialise before fully_shard."
            )


def _magnitude(slot: AdapterSlot, adapter_name: str) -> Any:
    magnitudes = dict(slot.layer.lora_magnitude_vector.items())
    return magnitudes.get(adapter_name)


def _reset_magnitude(slot: AdapterSlot, magnitude: Any) -> None:
    """Set DoRA's magnitude to the norm of the base weight, whatever was trained before."""
    with torch.no_grad():
        weight = dequantized(slot.base_layer)
        assert weight is not None  # PEFT has read it too, to compute the magnitude
        nothing = torch.zeros((), device=weight.device, dtype=weight.dtype)
        magnitude.weight.copy_(magnitude.get_weight_norm(weight, nothing, slot.scaling))
