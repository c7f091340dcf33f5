"""The layers of a LoRA adapter: which of them loraga can start, and what it has to know of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loraga.capture.weight_gradients import WeightGradient, weight_matrix
from loraga.distributed.sharding import gathered, is_distributed
from loraga.integrations.accelerate import is_offloaded, loaded
from loraga.integrations.bitsandbytes import is_packed_for_inference
from loraga.integrations.peft.storage import lost_to_offload, without_storage
from loraga.integrations.peft.targets import INNER_PREFIX, is_linear_like
from loraga.report.report import TIED

# values of init_lora_weights with which PEFT changes the base weights when it makes an adapter
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq")
# the modules in which PEFT keeps A and B of layers that loraga can start
_HOLDERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ParameterDict)


@dataclass(frozen=True)
class AdapterSlot:
    """One target layer with its A and B.

    A target is usually one matrix W (m, n). Where PEFT adapts a parameter that stacks the matrices of several experts
    (`target_parameters`), `parts` gives a slot for each of them.

    Attributes:
        name (`str`): module name of the target in the base model, as PEFT matches it. Where PEFT adapts a parameter,
            the parameter's name follows, after a dot.
        layer (`nn.Module`): PEFT's layer around the target.
        base_layer (`nn.Module`): the target itself.
        transposed (`bool`): the target stores W as (n, m), as transformers' `Conv1D` does.
        lora_A (`nn.Module`): the module that A, (rank, n), is a parameter of: a linear layer, a convolution, whose
            weight is A reshaped, or the `ParameterDict` of an embedding.
        lora_B (`nn.Module`): the module that B, (m, rank), is a parameter of.
        rank (`int`): r; with several experts, that of each expert.
        scaling (`float`): PEFT's s, the factor of B A.
        growth (`float`): the factor by which s grows when the rank is halved and alpha stays: 2, or √2 with rsLoRA.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features) of the target; with several experts, of each.
        key (`str`): the name of the parameters A and B in `lora_A` and `lora_B`.
        experts (`int`): the number of matrices in the target. With several, the rows of A, (experts * rank, n), are
            those of the first expert, then those of the second, and so on. In B, (m, rank * experts), the expert is the
            faster index of the columns. `start_of` and reports take each expert separately, see `parts`.
        part (`int`): the index of the expert, in one of the `parts`.
        weight_gradient (`WeightGradient`, *optional*): the target's weight, where autograd has to form its gradient.
        path (`str`): module name of `layer` in the base model.
    """

    name: str
    layer: Any
    base_layer: Any
    transposed: bool
    lora_A: nn.Module
    lora_B: nn.Module
    rank: int
    scaling: float
    growth: float
    shape: tuple[int, int]
    key: str = "weight"
    experts: int = 1
    part: int = 0
    weight_gradient: WeightGradient | None = None
    path: str = ""

    @property
    def A(self) -> nn.Parameter:
        """The parameter A, in the shape in which PEFT keeps it. It is read anew each time, since it may be replaced."""
        return self.lora_A.get_parameter(self.key)

    @property
    def B(self) -> nn.Parameter:
        """The parameter B, likewise."""
        return self.lora_B.get_parameter(self.key)

    @property
    def weight(self) -> torch.Tensor:
        """The target's weight as it is stored."""
        return self.base_layer.weight if self.weight_gradient is None else self.weight_gradient.value

    @property
    def if_zero(self) -> str:
        """The reason to report where the gradient is zero."""
        return "gradient is zero" if self.experts == 1 else "no token reached this expert"

    def parts(self) -> list[AdapterSlot]:
        """One slot for each matrix in the target."""
        if self.weight_gradient is None or self.experts == 1:
            return [self]
        return [
            replace(self, name=name, part=index) for index, name in enumerate(self.weight_gradient.parts(self.name))
        ]

    def matrices(self, A: torch.Tensor, B: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views (rank, n) and (m, rank) for each of the `parts`, of A and B in PEFT's shape and of any rank."""
        if self.experts == 1:
            return [(A.flatten(1), B.flatten(1))]
        rank = A.shape[0] // self.experts
        A, B = A.view(self.experts, rank, *A.shape[1:]), B.view(B.shape[0], rank, self.experts)
        return list(zip(A, B.unbind(2), strict=True))

    def joined(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in PEFT's shape, from those of the `parts`: the inverse of `matrices`."""
        if self.experts > 1:
            return torch.cat([A for A, _ in parts]), torch.stack([B for _, B in parts], dim=2).flatten(1)
        ((A, B),) = parts
        sizes, ones = self.A.shape[2:], self.B.shape[2:]
        A = A.view(A.shape[0], A.shape[1] // math.prod(sizes), *sizes) if sizes else A
        return A, B.reshape(*B.shape, *ones)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that can be started now, with its layers.

    Attributes:
        peft_model (`PeftModel`): the model that has the adapter.
        name (`str`): of the adapter.
        slots (`list[AdapterSlot]`): the layers that loraga can start.
        others (`dict[str, str]`): the other layers of the adapter by name, each with the reason why loraga cannot.
    """

    peft_model: PeftModel
    name: str
    slots: list[AdapterSlot]
    others: dict[str, str]

    @classmethod
    def of(cls, peft_model: PeftModel, adapter_name: str) -> Adapter:
        """Find the layers of an adapter.

        Raises:
            TypeError: the adapter is no LoRA.
            ValueError: there is no such adapter, or it cannot be started (see `check_adapter`).
        """
        check_adapter(peft_model, adapter_name)
        slots, others = find_slots(peft_model, adapter_name)
        return cls(peft_model, adapter_name, slots, others)

    @property
    def parts(self) -> list[AdapterSlot]:
        """One slot for each matrix in the layers."""
        return [part for slot in self.slots for part in slot.parts()]


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
        TypeError: the adapter is no LoRA.
        ValueError: there is no such adapter, adapters are merged, the adapter's first start changed the base weights,
            or a layer is on the meta device together with its adapter.
    """
    check_is_lora(peft_model, adapter_name)
    check_not_merged(peft_model)
    _check_base_is_original(peft_model, adapter_name)
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and without_storage(module, adapter_name):
            _check_can_have_storage(short_name(name), module, adapter_name)


def _check_can_have_storage(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Raise `ValueError` if an adapter on the meta device cannot be given memory, so that no start can be written."""
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
    """Raise `ValueError` if a layer has an adapter merged into its weight."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"Adapter {', '.join(module.merged_adapters)} is merged into layer {short_name(name)!r}; call "
                "unmerge_adapter() first."
            )


def _check_base_is_original(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise `ValueError` if PEFT subtracted this adapter's first start from the base weights."""
    start = str(peft_model.peft_config[adapter_name].init_lora_weights).lower()
    changed = start.startswith(_CHANGE_THE_BASE)
    if start == "lora_ga":  # PEFT changes the base only at layers for which preprocess_loraga has left a gradient
        slots, _ = find_slots(peft_model, adapter_name)
        changed = not all(is_fresh(slot) for slot in slots)
    if changed:
        raise ValueError(
            f"Adapter {adapter_name!r} was made with init_lora_weights={start!r}, which changes the base weights "
            "(PEFT's own LoRA-GA does; with loraga.apply_to_peft it does not). Load the base model again and make the "
            "adapter with init_lora_weights=True."
        )


def short_name(name: str) -> str:
    """The name that a module, or the layer of a parameter, has in the base model."""
    name = name.removeprefix(INNER_PREFIX).replace(".base_layer", "")
    return re.sub(r"\.lora_(embedding_)?[AB]\..*$", "", name).removesuffix(".weight")


def check_backward(model: nn.Module) -> None:
    """Raise `ValueError` if a layer has no backward, so that no gradient would reach the layers before it."""
    for name, module in model.named_modules():
        if is_packed_for_inference(module):
            raise ValueError(
                f"bitsandbytes has repacked the weight of layer {short_name(name)!r} for inference on this CPU, as it "
                "does when a 4-bit layer runs in eval mode, and that form has no backward. Load the model again, and "
                "initialise and train it before it is evaluated."
            )


def find_slots(peft_model: PeftModel, adapter_name: str) -> tuple[list[AdapterSlot], dict[str, str]]:
    """All layers of a LoRA adapter: those that loraga can start, and the others by name, with the reason why it cannot.

    loraga can start linear layers, convolutions, embeddings and parameters (`target_parameters`: fused experts). The
    others (attention blocks that PEFT takes as one layer, grouped convolutions, variants of LoRA) keep PEFT's ordinary
    start. Names are module names in the base model.
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
            reason = TIED
        if reason is None:
            slots.append(slot_of(name, layer, adapter_name))
        else:
            unsupported[name] = reason
    return slots, unsupported


def _why_not(layer: LoraLayer, adapter_name: str) -> str | None:
    """The reason why loraga cannot start this layer, or None if it can."""
    base = layer.get_base_layer()
    wrapper = _is_wrapper(layer)
    if not wrapper and not is_linear_like(base):
        reason = _why_no_matrix(base)
        if reason is not None:
            return reason
    if (wrapper or not is_linear_like(base)) and weight_matrix(base, _parameter_name(layer)) is None:
        weight = f"{_parameter_name(layer)} of {type(base).__name__}"
        if is_distributed(getattr(base, _parameter_name(layer), None)):
            return f"{weight} is sharded; to start it, initialise before fully_shard"
        return f"the gradient of {weight} cannot be taken (quantized, offloaded or computed)"
    if wrapper and layer.get_param().dim() == 3 and layer.num_experts == 1 and not _swapped(layer):
        return "PEFT does not orient a single transposed expert"
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith("DoraLinear"):
        return f"{type(variant).__name__} changes what a LoRA layer computes"
    for holder in _holders(layer, adapter_name)[:2]:
        if type(holder) not in _HOLDERS:
            return f"its adapter is made of {type(holder).__name__}"
    return None


def _why_no_matrix(base: nn.Module) -> str | None:
    """The reason why PEFT's adapter of this layer is not W + s B A, or None if it is."""
    name = type(base).__name__
    if isinstance(base, nn.Embedding):
        if base.max_norm is not None:
            return f"{name} with max_norm rescales its adapter, too"
        return "a tensor parallel embedding" if getattr(base, "_hf_tp_plan", None) is not None else None
    if not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{name} is not a linear layer, convolution or embedding"
    if base.groups > 1:
        return f"{name} with groups={base.groups}: PEFT's adapter mixes the groups, so it is no change of the weight"
    if set(base.dilation) != {1} or base.padding_mode != "zeros":
        return (
            f"{name} with dilation={base.dilation} and padding_mode={base.padding_mode!r}: PEFT's adapter has neither"
        )
    return None


def _is_wrapper(layer: LoraLayer) -> bool:
    """Whether this layer adapts a parameter of a module (`target_parameters`) rather than the module."""
    return type(layer).__name__ == "ParamWrapper"


def _parameter_name(layer: LoraLayer) -> str:
    return layer.parameter_name if _is_wrapper(layer) else "weight"


def _swapped(layer: LoraLayer) -> bool:
    """Whether PEFT takes the experts as (experts, out, in). Releases without the attribute take (experts, in, out)."""
    return bool(getattr(layer, "_did_swap_in_out_features", False))


def _holders(layer: LoraLayer, adapter_name: str) -> tuple[nn.Module, nn.Module, str]:
    """The module with A, the module with B, and the name of the parameter in each."""
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A, layer.lora_embedding_B, adapter_name
    return layer.lora_A[adapter_name], layer.lora_B[adapter_name], "weight"


def slot_of(name: str, layer: LoraLayer, adapter_name: str) -> AdapterSlot:
    """The slot of a layer that loraga can start, see `find_slots`."""
    lora_A, lora_B, key = _holders(layer, adapter_name)
    A, B = lora_A.get_parameter(key), lora_B.get_parameter(key)
    base, wrapper = layer.get_base_layer(), _is_wrapper(layer)
    weight_gradient = None
    if wrapper or not is_linear_like(base):
        stacked = wrapper and layer.get_param().dim() == 3
        transposed = (isinstance(base, nn.Embedding) and not wrapper) or (stacked and not _swapped(layer))
        weight_gradient = WeightGradient(base, _parameter_name(layer), stacked, transposed)
    experts = layer.num_experts if wrapper else 1
    return AdapterSlot(
        name=name_in_patterns(name, layer),
        layer=layer,
        base_layer=base,
        transposed=bool(getattr(layer, "fan_in_fan_out", False))
        if weight_gradient is None
        else weight_gradient.transposed,
        lora_A=lora_A,
        lora_B=lora_B,
        rank=A.shape[0] // experts,
        scaling=layer.scaling[adapter_name],
        growth=math.sqrt(2) if layer.use_rslora[adapter_name] else 2.0,
        shape=(B.shape[0], math.prod(A.shape[1:])),
        key=key,
        experts=experts,
        weight_gradient=weight_gradient,
        path=name,
    )


def name_in_patterns(path: str, layer: LoraLayer) -> str:
    """The name of a layer at `path` in the base model that PEFT matches with the keys of `rank_pattern`."""
    return f"{path.replace('.base_layer', '')}.{layer.parameter_name}" if _is_wrapper(layer) else path


def is_fresh(slot: AdapterSlot) -> bool:
    """Whether A or B is zero, as in PEFT's ordinary start, so that the adapter changes nothing yet."""
    return any(value.is_meta or not gathered(value.detach()).any() for value in (slot.A, slot.B))


def dequantized(base: nn.Module) -> torch.Tensor | None:
    """A target's weight as the layer lays it out, dequantized; `None` if it has none that PEFT can read."""
    stored = getattr(base, "weight", None)
    if not isinstance(stored, torch.Tensor) and not hasattr(base, "W_q"):
        return None
    weight: torch.Tensor = dequantize_module_weight(base).detach()
    if isinstance(stored, torch.Tensor) and base.weight is not stored:
        base.weight = stored  # on a CPU PEFT has replaced the parameter of bitsandbytes by a copy
    return weight


def base_weight(slot: AdapterSlot) -> torch.Tensor:
    """The target's weight W (m, n), dequantized where it is quantized; one expert's in one of the `parts`.

    Raises:
        ValueError: PEFT cannot dequantize its storage format.
    """
    if slot.weight_gradient is not None:
        return slot.weight_gradient.matrices(slot.weight.detach())[slot.part].flatten(1)
    with loaded(slot.base_layer):
        weight = dequantized(slot.base_layer)
    expected = slot.shape[::-1] if slot.transposed else slot.shape
    if weight is None or not weight.is_floating_point() or tuple(weight.shape) != expected:
        raise ValueError(
            f"The weight of {slot.name!r} ({type(slot.base_layer).__name__}) is stored in a form that PEFT cannot "
            "dequantize; use a scale other than 'weight-svd'."
        )
    return weight.mT if slot.transposed else weight


@contextmanager
def adapters_disabled(peft_model: nn.Module) -> Iterator[None]:
    """Context manager: the model computes what its base alone would. `requires_grad` does not change.

    Raises:
        ValueError: an adapter is merged, or a layer has no backward.
    """
    check_not_merged(peft_model)
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
