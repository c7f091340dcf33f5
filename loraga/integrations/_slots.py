"""The layers of a LoRA adapter, seen one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loraga.integrations._offloaded import is_offloaded, loaded, lost_to_offload, without_storage
from loraga.integrations._targets import INNER_PREFIX, is_linear_like
from loraga.offsets import AdapterSlot, ShiftedLinear, TwoHalves
from loraga.quiet import is_packed_for_inference


def check_is_lora(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise `ValueError` if there is no such adapter, `TypeError` if it is not LoRA."""
    config = peft_model.peft_config.get(adapter_name)
    if config is None:
        known = ", ".join(repr(name) for name in peft_model.peft_config)
        raise ValueError(f"There is no adapter {adapter_name!r} in this model; it has {known}.")
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        raise TypeError(f"Adapter {adapter_name!r} is of type {config.peft_type}; loraga initialises LoRA adapters.")


def check_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise unless `adapter_name` is a LoRA adapter of `peft_model` that can be initialised now.

    Raises:
        TypeError: the adapter is of another kind than LoRA.
        ValueError: there is no such adapter, adapters are merged, the base weights were changed by
            `offset="subtract"`, or a layer is on the meta device together with its adapter.
    """
    check_is_lora(peft_model, adapter_name)
    _check_base_is_original(peft_model)
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and without_storage(module, adapter_name):
            _check_can_have_storage(short_name(name), module, adapter_name)


def _check_can_have_storage(name: str, layer: LoraLayer, adapter_name: str) -> None:
    base = layer.get_base_layer()
    if is_offloaded(base) and not lost_to_offload(layer, adapter_name):
        dora = "PEFT's DoRA needs it in memory all the time. Use use_dora=False"
        other = "PEFT made its adapter on the meta device, where only those of linear layers can be mended. Exclude it"
        raise ValueError(
            f"The weight of layer {name!r} is offloaded, and "
            f"{dora if adapter_name in layer.lora_magnitude_vector else other}, or load the model into memory."
        )
    if not is_offloaded(base) and getattr(getattr(base, "weight", None), "is_meta", False):
        raise ValueError(
            f"The weight of layer {name!r} is not loaded yet (meta device), or not by a hook of its own, and PEFT made "
            "its adapter there too, where no start can be written. Load the model into memory, in a smaller dtype or "
            "quantized if need be, or offload it with accelerate's cpu_offload, disk_offload or dispatch_model."
        )


def check_not_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"Adapter {', '.join(module.merged_adapters)} is merged into layer {short_name(name)!r}; call "
                "unmerge_adapter() first."
            )


def _check_base_is_original(model: nn.Module) -> None:
    check_not_merged(model)
    for name, module in model.named_modules():
        if isinstance(module, ShiftedLinear):
            raise ValueError(
                f"Layer {short_name(name)!r} was initialised with offset='subtract', so the base weights are not the "
                "original ones. Call loraga.restore_base(model) first, or load the base model again."
            )


def short_name(name: str) -> str:
    """A parameter's or module's name as the base model knows it."""
    name = name.removeprefix(INNER_PREFIX).replace(".base_layer", "")
    return re.sub(r"\.lora_[AB]\..*$", "", name).removesuffix(".weight")


def check_backward(model: nn.Module) -> None:
    """Raise `ValueError` if a layer has no backward, so that no gradient would reach what is below it."""
    for name, module in model.named_modules():
        if is_packed_for_inference(module):
            raise ValueError(
                f"bitsandbytes has repacked the weight of layer {short_name(name)!r} for inference on this CPU, as it "
                "does when a 4-bit layer runs in eval mode, and that form has no backward. Load the model again, and "
                "initialise and train it before it is evaluated."
            )


def find_slots(peft_model: PeftModel, adapter_name: str) -> tuple[list[AdapterSlot], dict[str, str]]:
    """All layers of a LoRA adapter: those loraga can initialise, and the others with the reason why not.

    The others (embeddings, convolutions, attention blocks taken as one layer, `target_parameters`, variants of LoRA)
    keep PEFT's ordinary start. Names are module names of the base model.
    """
    slots: list[AdapterSlot] = []
    unsupported: dict[str, str] = {}
    tied = getattr(peft_model.peft_config[adapter_name], "target_modules_to_tie", None) or ()
    for name, layer in peft_model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
            continue
        reason = _why_not(layer, adapter_name)
        if reason is None and name.rpartition(".")[2] in tied:
            reason = "its adapter is tied to the embedding's"
        if reason is None:
            slots.append(slot_of(name, layer, adapter_name))
        else:
            unsupported[name] = reason
    return slots, unsupported


def _why_not(layer: LoraLayer, adapter_name: str) -> str | None:
    base = layer.get_base_layer()
    kind = type(base).__name__
    if type(layer).__name__ == "ParamWrapper":
        return "it adapts a parameter (target_parameters), not a linear layer"
    if not is_linear_like(base):
        return f"{kind} is not a linear layer"
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith("DoraLinear"):
        return f"{type(variant).__name__} changes what a LoRA layer computes"
    for linear in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
        if type(linear) is not nn.Linear and not isinstance(linear, TwoHalves):
            return f"its adapter is made of {type(linear).__name__}"
    return None


def slot_of(name: str, layer: LoraLayer, adapter_name: str) -> AdapterSlot:
    """One layer of an adapter, which must be linear-like."""
    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    trained = lora_A.trained if isinstance(lora_A, TwoHalves) else lora_A.weight
    return AdapterSlot(
        name=name,
        layer=layer,
        base_layer=layer.get_base_layer(),
        transposed=bool(getattr(layer, "fan_in_fan_out", False)),
        lora_A=lora_A,
        lora_B=lora_B,
        rank=trained.shape[0],
        scaling=layer.scaling[adapter_name],
        shape=(lora_B.out_features, lora_A.in_features),
    )


def ranks_and_alphas(peft_model: PeftModel, adapter_name: str, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """PEFT's r and alpha of layers of an adapter, by the name that PEFT matches with `rank_pattern`."""
    found = {}
    for name in names:
        layer = peft_model.base_model.model.get_submodule(name)
        parameter = getattr(layer, "parameter_name", None)
        key = f"{name.replace('.base_layer', '')}.{parameter}" if parameter else name
        found[key] = layer.r[adapter_name], layer.lora_alpha[adapter_name]
    return found


def quantized(base: nn.Module) -> bool:
    """Whether a target's weight is stored in a form that cannot simply be added to."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or any(hasattr(base, name) for name in ("qweight", "W_q", "quant_state")):
        return True
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.ndim != 2:
        return True
    if any(hasattr(weight, name) for name in ("quant_state", "CB", "SCB", "tensor_impl", "block_size", "qdata")):
        return True
    # any other tensor subclass with arithmetic of its own, such as torchao's; plain Parameters are fine
    return type(weight) not in (nn.Parameter, torch.Tensor) and type(weight).__module__.split(".")[0] != "torch"


def dequantized(base: nn.Module) -> torch.Tensor | None:
    """A target's weight as the layer stores it, dequantized, or `None` where PEFT cannot do that."""
    stored = getattr(base, "weight", None)
    if not isinstance(stored, torch.Tensor) and not hasattr(base, "W_q"):
        return None
    weight = dequantize_module_weight(base).detach()
    if isinstance(stored, torch.Tensor) and base.weight is not stored:
        base.weight = stored  # PEFT puts a copy in place of what bitsandbytes keeps on a CPU
    return weight


def base_weight(slot: AdapterSlot) -> torch.Tensor:
    """The target's weight W (m, n), dequantized where it is stored otherwise.

    Raises:
        ValueError: its storage format is not known to PEFT.
    """
    with loaded(slot.base_layer):
        weight = dequantized(slot.base_layer)
    if (
        weight is None
        or not weight.is_floating_point()
        or tuple(weight.shape) != (slot.shape[::-1] if slot.transposed else slot.shape)
    ):
        raise ValueError(
            f"The weight of {slot.name!r} ({type(slot.base_layer).__name__}) is stored in a form that PEFT cannot "
            "dequantize; use a scale other than 'weight-svd'."
        )
    return weight.mT if slot.transposed else weight


@contextmanager
def adapters_disabled(peft_model: nn.Module) -> Iterator[None]:
    """The base model's own function for the time of the context; `requires_grad` is not touched.

    Raises:
        ValueError: an adapter is merged, the base weights were changed by `offset="subtract"`, or a layer has no
            backward.
    """
    _check_base_is_original(peft_model)
    check_backward(peft_model)
    switches = [m for m in peft_model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [module._disable_adapters for module in switches]
    try:
        for module in switches:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module._disable_adapters = value
