"""Write the start of an adapter: every layer or none."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from loraga import offsets, recipes
from loraga.config import OFFSETS, InitConfig, check_choice
from loraga.factors import Factors
from loraga.integrations._config import TwoHalvesConfig, alpha_factor, double_rank, plain_start
from loraga.integrations._offloaded import give_storage, home_of
from loraga.integrations._slots import (
    base_weight,
    check_adapter,
    check_not_merged,
    dequantized,
    find_slots,
    quantized,
    ranks_and_alphas,
    short_name,
)
from loraga.linalg import seed_of, truncated_svd
from loraga.offsets import AdapterSlot, AnchoredLinear, ShiftedLinear, TwoHalves
from loraga.sharding import follow_names, is_distributed, is_sharded
from loraga.snapshot import structure, tensors

Start = tuple[torch.Tensor, torch.Tensor]

_WRITERS = {
    "anchor": offsets.write_anchor,
    "subtract": offsets.write_subtract,
    "zero-b": offsets.write_zero_b,
    "none": offsets.write_none,
}
_KINDS: dict[str, type[TwoHalves]] = {"anchor": AnchoredLinear, "subtract": ShiftedLinear}


def start_of(slot: AdapterSlot, factors: Factors, init: InitConfig, seed: int) -> Start:
    """A0 (r, n) and B0 (m, r) of one layer; see `recipes.start`."""
    sigma = None
    if init.method == "lora-ga" and init.scale == "weight-svd":
        if is_distributed(getattr(slot.base_layer, "weight", None)):
            raise ValueError(
                f"scale='weight-svd' needs the whole weight of {slot.name!r}, which is sharded; use scale='stable'."
            )
        sigma = truncated_svd(base_weight(slot), slot.rank, seed=seed_of(seed, slot.name)).S
    return recipes.start(factors, slot.rank, init, scaling=slot.scaling, name=slot.name, seed=seed, weight_sigma=sigma)


def write_start(
    peft_model: PeftModel,
    adapter_name: str,
    starts: Mapping[str, Start],
    offset: str,
    *,
    confirm: Callable[[], object] = lambda: None,
) -> None:
    """Give the layers of an adapter their start; all of them, or none if anything fails.

    With `"subtract"` the base weights change; while it runs, a copy of them is held in host memory.

    Args:
        peft_model (`PeftModel`): holds the adapter.
        adapter_name (`str`): its name.
        starts (`dict[str, tuple[Tensor, Tensor]]`): A0 (r, n) and B0 (m, r) by `AdapterSlot.name`. Layers that are
            missing stay an ordinary LoRA.
        offset (`str`): `"anchor"`, `"subtract"`, `"zero-b"` or `"none"`.
        confirm (callable): called when all is written; if it raises, nothing was.

    Raises:
        ValueError: the adapter cannot be initialised (see `check_adapter`), the offset does not go with the model
            (see `check_offset`), or a name, shape or value in `starts` does not fit.
    """
    check_adapter(peft_model, adapter_name)
    check_offset(peft_model, adapter_name, offset)
    slots, unsupported = find_slots(peft_model, adapter_name)
    _check_starts(slots, starts)
    _check_in_memory(peft_model, adapter_name, unsupported)
    if offset == "subtract":
        _warn_of_dropout(slots, adapter_name)
    config = peft_model.peft_config[adapter_name]
    undo = _remember(slots, adapter_name, base_too=offset == "subtract")
    try:
        plain = plain_start(config)
        for slot in slots:
            _make_plain(slot, adapter_name, alpha_factor(plain))
            if slot.name in starts:
                _reset_magnitude(slot, adapter_name)
                _WRITERS[offset](slot, *starts[slot.name])
            elif offset in _KINDS:
                offsets.freeze_nothing(slot, _KINDS[offset])
        if offset == "anchor":
            for slot in slots:
                _set_rank(slot, adapter_name, 2, alpha_factor(plain))
        if offset in _KINDS:
            kept = ranks_and_alphas(peft_model, adapter_name, unsupported)
            plain = double_rank(plain, offset, {slot.name: slot.rank for slot in slots}, kept)
        peft_model.peft_config[adapter_name] = plain
        follow_names(peft_model)
        confirm()
    except BaseException:
        for restore in undo:
            restore()
        follow_names(peft_model)
        peft_model.peft_config[adapter_name] = config
        raise


def restore_base(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Give the base model its weights back after `offset="subtract"`, by turning the adapter into `anchor`.

    The model's function stays what it is. The weights come back to within rounding of their dtype, not bit for bit;
    for the very same bits load the base model again. Call this before `unload()`, `delete_adapter()` or
    `disable_adapter()`, which otherwise leave the shifted weights. The trained parameters stay the same objects.

    Args:
        peft_model (`PeftModel`): holds the adapter.
        adapter_name (`str`): its name.

    Raises:
        ValueError: the adapter was not initialised with `"subtract"`, adapters are merged, or the model is sharded.
    """
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, TwoHalvesConfig) or getattr(config, "offset", None) != "subtract":
        raise ValueError(f"Adapter {adapter_name!r} was not initialised with offset='subtract'; nothing to restore.")
    check_not_merged(peft_model)
    if is_sharded(peft_model):
        raise ValueError("The weights of this model are sharded; call restore_base before fully_shard.")
    slots = [slot for slot in find_slots(peft_model, adapter_name)[0] if isinstance(slot.lora_A, ShiftedLinear)]
    undo = _remember(slots, adapter_name, base_too=True)
    try:
        for slot in slots:
            offsets.unshift(slot)
            _set_rank(slot, adapter_name, 2, alpha_factor(config))
        config.offset = "anchor"
    except BaseException:
        for restore in undo:
            restore()
        raise


def _remember(slots: list[AdapterSlot], adapter_name: str, base_too: bool) -> tuple[Callable[[], None], ...]:
    """What puts these layers back, values and structure."""
    modules: list[nn.Module] = []
    values: list[torch.Tensor] = []
    for slot in slots:
        parts: list[nn.Module] = [slot.lora_A, slot.lora_B]
        magnitude = _magnitude(slot, adapter_name)
        if magnitude is not None:
            parts.append(magnitude)
        modules += [slot.layer, *parts]
        values += [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        if base_too:
            values.append(slot.base_layer.weight)
    # values last: by then the parameters are where they were
    return structure(modules), tensors(values)


def _check_starts(slots: list[AdapterSlot], starts: Mapping[str, Start]) -> None:
    by_name = {slot.name: slot for slot in slots}
    for name, (A0, B0) in starts.items():
        slot = by_name.get(name)
        if slot is None:
            raise ValueError(f"There is a start for {name!r}, which is no linear layer of this adapter.")
        (m, n), r = slot.shape, slot.rank
        if A0.shape != (r, n) or B0.shape != (m, r):
            raise ValueError(
                f"The start of {name!r} has shapes {tuple(A0.shape)} and {tuple(B0.shape)}; its adapter needs "
                f"A ({r}, {n}) and B ({m}, {r})."
            )
        if not (torch.isfinite(A0).all() and torch.isfinite(B0).all()):
            raise ValueError(f"The start of {name!r} has NaN or Inf in it.")


def _check_in_memory(peft_model: PeftModel, adapter_name: str, others: Iterable[str]) -> None:
    """Layers loraga does not start need a start from PEFT, which gives none with `low_cpu_mem_usage=True`."""
    for name in others:
        layer = peft_model.base_model.model.get_submodule(name)
        if any(p.is_meta for key, p in layer.named_parameters() if adapter_name in key.split(".")):
            raise ValueError(
                f"The adapter of layer {name!r} has no weights yet, and loraga starts linear layers only. Make the "
                "adapter without low_cpu_mem_usage=True."
            )


def check_offset(peft_model: PeftModel, adapter_name: str, offset: str) -> None:
    """Raise `ValueError` unless `offset` can be applied to this adapter.

    All but `"subtract"` can, except to DoRA in a sharded model.
    `"subtract"` needs base weights that are not quantized, sharded, shared with another module, or used by other
    adapters. The message names the layer and the offsets that work.
    """
    check_choice("offset", offset, OFFSETS)
    slots = find_slots(peft_model, adapter_name)[0]
    if is_sharded(peft_model):
        _check_sharded(slots, adapter_name, offset)
    if offset == "subtract":
        check_alone(peft_model.peft_config, adapter_name)
        check_subtractable(peft_model, {slot.name: slot.base_layer for slot in slots})


def _check_sharded(slots: list[AdapterSlot], adapter_name: str, offset: str) -> None:
    if offset == "subtract":
        raise ValueError(
            "offset='subtract' does not change the weights of a sharded model; use offset='anchor' or 'zero-b', or "
            "initialise before fully_shard."
        )
    for slot in slots:
        if _magnitude(slot, adapter_name) is not None:
            raise ValueError(
                f"The DoRA magnitude of {slot.name!r} is the norm of a sharded weight; initialise before fully_shard."
            )


def check_alone(adapter_names: Iterable[str], adapter_name: str) -> None:
    """Raise `ValueError` if `"subtract"` for one adapter would change what another computes."""
    others = [name for name in adapter_names if name != adapter_name]
    if others:
        raise ValueError(
            f"offset='subtract' changes the base weights, and with them what adapter {others[0]!r} beside "
            f"{adapter_name!r} computes. Use offset='anchor' or 'zero-b', which leave the base as it is."
        )


def check_subtractable(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError` unless the weight of every target can be added to without changing anything else."""
    for name, module in targets.items():
        if quantized(module):
            raise ValueError(
                f"offset='subtract' cannot change the quantized weight of {name!r} ({type(module).__name__}). Use "
                "offset='anchor' or 'zero-b', which leave it as it is."
            )
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and parameter.numel():
            owners[parameter.device, parameter.data_ptr()].append(short_name(name))
    for name, module in targets.items():
        weight = cast(torch.Tensor, module.weight)
        if weight.is_meta:
            raise ValueError(
                f"offset='subtract' cannot change the weight of {name!r}, which is offloaded or not loaded yet. Use "
                "offset='anchor' or 'zero-b', which leave it as it is."
            )
        names = owners[weight.device, weight.data_ptr()]
        if len(names) > 1:
            raise ValueError(
                f"offset='subtract' cannot change the weight of {names[0]!r} alone: {names[1]!r} shares it. Exclude "
                "one (exclude_modules) or use offset='anchor', which leaves the base as it is."
            )


def _warn_of_dropout(slots: list[AdapterSlot], adapter_name: str) -> None:
    rate = max((getattr(slot.layer.lora_dropout[adapter_name], "p", 0.0) for slot in slots), default=0.0)
    if rate:
        warnings.warn(
            f"offset='subtract' with lora_dropout={rate}: in training mode, what was subtracted from the base and what "
            "the adapter adds do not cancel under dropout. Use lora_dropout=0 or offset='anchor'.",
            stacklevel=4,
        )


def _make_plain(slot: AdapterSlot, adapter_name: str, factor: float) -> None:
    """Undo an earlier anchor, and give weights to an adapter that PEFT made without (`low_cpu_mem_usage`, offload)."""
    if isinstance(slot.lora_A, AnchoredLinear):
        offsets.drop_anchor(slot)
        _set_rank(slot, adapter_name, 1, 1 / factor)
    if slot.lora_A.weight.is_meta:
        give_storage(slot.layer, adapter_name)
        magnitude = _magnitude(slot, adapter_name)
        if magnitude is not None:
            magnitude.to_empty(device=home_of(slot.base_layer))
            _reset_magnitude(slot, adapter_name)


def _set_rank(slot: AdapterSlot, adapter_name: str, times: int, alpha_times: float) -> None:
    slot.layer.r[adapter_name] = times * slot.rank
    slot.layer.lora_alpha[adapter_name] *= alpha_times


def _magnitude(slot: AdapterSlot, adapter_name: str) -> Any:
    magnitudes = dict(slot.layer.lora_magnitude_vector.items())
    return magnitudes.get(adapter_name)


def _reset_magnitude(slot: AdapterSlot, adapter_name: str) -> None:
    """DoRA's magnitude is the norm of the weight as it is now: the base's, whatever was trained before."""
    magnitude = _magnitude(slot, adapter_name)
    if magnitude is not None:
        with torch.no_grad():
            weight = dequantized(slot.base_layer)
            assert weight is not None  # PEFT has computed a magnitude of it
            nothing = torch.zeros((), device=weight.device, dtype=weight.dtype)
            magnitude.weight.copy_(magnitude.get_weight_norm(weight, nothing, slot.scaling))
