"""Find the modules that PEFT adapts, and inject a fresh adapter into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._dynamo import OptimizedModule

from loraga._rollback import remember_model
from loraga.capture.weight_gradients import weight_matrix
from loraga.integrations.hf_models import Conv1D
from loraga.integrations.peft.config import ORDINARY_STARTS, plain_start
from loraga.integrations.peft.storage import give_storage, lost_to_offload

# in a PeftModel the names of the base model's modules start with this
INNER_PREFIX = "base_model.model."
# wrappers that keep a list of a model's parameters or rename them, and the attribute with the model
_WRAPPERS = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module", OptimizedModule: "_orig_mod"}


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, or `model` itself.

    The wrapper only averages gradients of weights over ranks, and loraga has none computed.
    """
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner


def find_target_names(
    model: nn.Module,
    target_modules: str | Iterable[str] | None = "all-linear",
    exclude_modules: str | Iterable[str] | None = None,
) -> dict[str, nn.Module]:
    """Modules of `model` that PEFT would adapt and whose gradient is a matrix. The model is not changed.

    Args:
        model (`nn.Module`): a plain model or a `PeftModel`.
        target_modules (`str`, list of `str` or `None`): as in `LoraConfig`: name suffixes, a regular expression,
            `"all-linear"`, or `None` for PEFT's default of this model type.
        exclude_modules (`str` or list of `str`, *optional*): as in `LoraConfig`.

    Returns:
        `dict[str, nn.Module]`: by module name in `model`, in the model's order. Each is a linear layer
        (`is_linear_like`) or another with a `weight_matrix`, such as an embedding or a convolution. Where PEFT has put
        an adapter layer around a target, the module is the target and the name is that of the adapter layer.

    Raises:
        ValueError: no such module matches, or PEFT has no default for this model type.
        TypeError: the `PeftModel` is one of prompt learning.
    """
    config = LoraConfig(target_modules=_plain_targets(target_modules), exclude_modules=_plain_targets(exclude_modules))
    if isinstance(model, PeftModel) and any(other.is_prompt_learning for other in model.peft_config.values()):
        raise TypeError("This PeftModel learns a prompt, which cannot be switched off; pass model.get_base_model().")
    base, prefix = (model.base_model.model, INNER_PREFIX) if isinstance(model, PeftModel) else (model, "")
    targets = _find(base, config, lambda module: is_linear_like(module) or weight_matrix(module) is not None)
    return {prefix + name: module for name, module in targets.items()}


def find_targets(base: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linear layers that PEFT would adapt with `config`, by name; `base` is no `PeftModel`.

    `config.target_modules` is resolved, see `_resolve_targets`.

    Raises:
        ValueError: as `find_target_names`.
    """
    return _find(base, config, is_linear_like)


def _find(base: nn.Module, config: LoraConfig, fits: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The targets for which `fits` is true; `config.target_modules` is resolved, see `_resolve_targets`."""
    asked = config.target_modules
    targets = {name: _inner(module) for name, module in _matches(base, config) if fits(_inner(module))}
    if not targets:
        raise ValueError(_nothing_found(base, config, asked))
    return targets


def inject(model: nn.Module, lora_config: LoraConfig | None, adapter_name: str) -> PeftModel:
    """Put a fresh LoRA adapter into a plain model, in place, as `get_peft_model` does.

    Args:
        model (`nn.Module`): without adapters.
        lora_config (`LoraConfig`, *optional*): not changed; `None` means r 16, lora_alpha 64, all linear layers. The
            scaling lora_alpha / r is then that of rsLoRA with lora_alpha 16, in a form that every reader of adapters
            understands.
        adapter_name (`str`): its name.

    Returns:
        `PeftModel`: around `model`, whose target layers PEFT has replaced by its own.

    Raises:
        TypeError: `lora_config` is no `LoraConfig`, or `model` is a `PeftModel`.
        ValueError: no target is found, or the model has adapters already, or is inside a wrapper. The model is then
            as it was before.
    """
    if isinstance(model, PeftModel):
        raise TypeError("inject needs a plain model; this one is a PeftModel with adapters of its own.")
    for wrapper, attribute in _WRAPPERS.items():
        if isinstance(model, wrapper):
            raise ValueError(
                f"The model is wrapped in {wrapper.__name__}, which would neither see the adapter's parameters nor "
                f"keep their names; pass model.{attribute}, and wrap what comes back."
            )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("This model carries PEFT layers already; pass the PeftModel around it, or unload() it first.")
    if lora_config is None:
        lora_config = LoraConfig(r=16, lora_alpha=64, target_modules="all-linear")
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config must be a peft.LoraConfig, not {type(lora_config).__name__}.")
    config = _ordinary(lora_config)
    resolved = copy.copy(config)
    _resolve_targets(model, resolved)
    if not config.target_parameters and not any(True for _ in _matches(model, resolved)):
        raise ValueError(_nothing_found(model, config, config.target_modules))
    if config.layer_replication is None:  # with it, PEFT must resolve the targets itself, after it has added layers
        config = resolved
    restore = remember_model(model)
    try:
        with warnings.catch_warnings():
            # the warning asks for nothing: PEFT corrects the value itself, for every Conv1D
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer) and lost_to_offload(layer, adapter_name):
                give_storage(layer, adapter_name)
        return peft_model
    except BaseException:
        restore()
        raise


def _ordinary(lora_config: LoraConfig) -> LoraConfig:
    """A copy of the user's config with an ordinary start, which reads no gradient and changes no base weight."""
    start = lora_config.init_lora_weights
    if start not in (*ORDINARY_STARTS, "lora_ga"):
        warnings.warn(
            f"init_lora_weights={start!r} is left aside: loraga sets the start of this adapter. Leave it out of "
            "the LoraConfig, or use get_peft_model for that start.",
            stacklevel=6,  # past inject and three functions of api.py, to the caller of fast_init
        )
    if getattr(lora_config, "kasa_config", None) is not None:
        raise ValueError(
            "kasa_config changes the base weights as soon as the adapter is made, and loraga starts at the base. Leave "
            "it out, or use get_peft_model for KaSA."
        )
    config = plain_start(copy.deepcopy(lora_config))
    if not config.init_lora_weights:  # layers that the gradient does not start need PEFT's ordinary start
        config.init_lora_weights = True
    return config


def _plain_targets(targets: str | Iterable[str] | None) -> str | list[str] | None:
    return targets if targets is None or isinstance(targets, str) else list(targets)


def _resolve_targets(model: nn.Module, config: LoraConfig) -> None:
    """Replace `None` and "all-linear" in `config.target_modules` by the names that PEFT would use.

    "all-linear" leaves the output layer of a transformers model out, and works for models that PEFT does not know, too.

    Raises:
        ValueError: `None`, and PEFT has no default for this model type.
    """
    targets = config.target_modules
    if targets is None and not config.target_parameters:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if defaults is None:
            raise ValueError(
                f"PEFT has no default target_modules for {type(model).__name__} (model type {model_type!r}); name them "
                "in the LoraConfig, or use target_modules='all-linear'."
            )
        config.target_modules = defaults if isinstance(defaults, str) else set(defaults)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        names = set(config.target_modules) - {""} - _output_layer_names(model)
        config.target_modules = names


def _output_layer_names(model: nn.Module) -> set[str]:
    """The names of the layer that a transformers model calls its output embeddings; none of any other model."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        module = find() if find is not None else None
    except (NotImplementedError, AttributeError):
        module = None
    output = None if module is None else _inner(module)
    return {name for name, module in model.named_modules() if module is output}


def _matches(base: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, around which PEFT would put an adapter; `config.target_modules` is resolved first."""
    _resolve_targets(base, config)
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = (*inside, name + ".")
        if check_target_module_exists(config, name):
            yield name, module


def _inner(module: nn.Module) -> nn.Module:
    """The target inside an adapter layer, or `module` itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear_like(module: nn.Module) -> bool:
    """Whether PEFT takes a module for a linear layer: by its class, or by `in_features` and `out_features`."""
    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _nothing_found(model: nn.Module, config: LoraConfig, asked: Any) -> str:
    """The message for targets that match nothing: what was asked for, and which layers there are."""
    linear = [name for name, module in model.named_modules() if name and is_linear_like(module)]
    known = ", ".join(repr(name) for name in linear[:4]) or "no linear layer at all"
    text = f"target_modules={asked!r} finds no linear layer in {type(model).__name__}, which has {known}"
    text += f" and {len(linear) - 4} more." if len(linear) > 4 else "."
    for option in ("exclude_modules", "modules_to_save", "layers_to_transform"):
        value = getattr(config, option, None)
        if value is not None:
            text += f" Note {option}={value!r}."
    return text
