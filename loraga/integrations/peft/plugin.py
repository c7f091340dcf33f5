"""Lets PEFT's own LoRA-GA calls run loraga.

PEFT works in two phases. `preprocess_loraga(model, config, train_step)` runs the user's step, and stores the gradient
of every target in an attribute of its layer. `get_peft_model` then calls `LoraLayer.lora_ga_init` for each layer, which
reads that attribute. This module replaces both functions, and stores a `SketchedGradient` in place of the gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from loraga._atomic_files import atomic_file
from loraga._messages import one_line
from loraga._version import release_of
from loraga.capture.run import Request, estimate_step
from loraga.config import InitConfig, Scale, check_choice
from loraga.distributed.ranks import Ranks
from loraga.distributed.sharding import check_injectable, check_layers, check_sharding
from loraga.factors import Factors
from loraga.integrations.accelerate import compute_device, is_offloaded
from loraga.integrations.hf_models import Conv1D
from loraga.integrations.peft.slots import adapters_disabled, slot_of
from loraga.integrations.peft.targets import find_targets
from loraga.integrations.peft.writing import fill, start_of
from loraga.linalg import seed_of, truncated_svd
from loraga.report import build as summary
from loraga.report.report import InitReport
from loraga.start import starts

# the releases of PEFT whose LoRA-GA was read, and with which the tests of this module pass
KNOWN = ((0, 19), (0, 20), (0, 21))
_FIRST = "0.19"

# the attribute of a layer in which PEFT stores its gradient between the two phases; keys of a cache file end with it
_ATTRIBUTE = "_peft_loraga_grad"
# PEFT's names of the scales, and ours
_SCALES: dict[str, Scale] = {"stable": "stable", "weight_svd": "weight-svd", "gd_scale": "gd", "unit": "unit"}
# PEFT's calls have no argument for a seed, so this one is always used, and runs can be repeated
_SEED = 0
# stacklevel with which a warning in `report.build` names the line of the user's call of preprocess_loraga; the wrapper
# of torch.no_grad around that function counts as a frame
_TO_CALLER = 5

_originals: list[tuple[Any, str, Any]] = []


def apply_to_peft() -> None:
    """Let PEFT's own LoRA-GA calls run loraga, with unchanged user code, until [`restore_peft`].

    ```py
    loraga.apply_to_peft()
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), target_modules="all-linear")
    preprocess_loraga(model, config, train_step)
    model = get_peft_model(model, config)
    ```

    `train_step` runs forward and backward as before, but no weight gradient is computed: a sketch follows the gradient
    of each layer (see [`fast_init`]). Each backward call is one micro-batch of the mean.

    What stays as in PEFT: names and options; the rank; the place of every adapter. A step that draws random numbers
    draws them from the global generators. A cache file is used if its names, shapes and ranks fit, whatever data it was
    made from. An adapter made without `preprocess_loraga` gets an ordinary start.

    What differs, on purpose:
    - **No base weight changes.** The adapter is an ordinary LoRA that starts at the base's function
      (`InitConfig(start="mirror")`), and what any trainer saves fits the original base. The argument
      `path_initial_model_for_weight_conversion` is not needed and does no harm. Quantized weights, tied
      weights and models that have adapters already work too.
    - A and B start as in the paper and its official code: orthonormal singular vectors of the gradient times one
      scale. PEFT multiplies B by the singular values and leaves A unscaled, so that its start depends on the scale of
      the loss.
    - The seed is fixed: the same input gives the same start. `"random"` takes disjoint directions for A and B. A
      `Conv1D` is taken with its true (out_features, in_features). The gradient of a layer that a forward calls
      twice is not halved. `"all-linear"` works. A layer with few singular directions, such as the head of a classifier,
      starts with those that it has.
    - During the step dropout is off and BatchNorm does not update its statistics; the step may call `model.train()`.
      Modes, `.grad`, `requires_grad`, buffers and hooks are afterwards as before, also when the step raises.
    - `_peft_loraga_grad` is a `SketchedGradient`: factors for the rank of the config, of the weight's `shape`. A larger
      rank needs another `preprocess_loraga`.
    - Where torch.distributed is initialised, every rank must call `preprocess_loraga`, each with batches of its own;
      the mean is over all of them and all ranks get the same adapter. If one raises, all do. Rank 0 writes the cache
      file, and it is used where all ranks find it.
    - Layers without a gradient are named in a warning, and in `model.loraga_report`.
    - These raise an error before the step runs: unknown options, sharded and offloaded weights, layers without
      a `weight` (GPTQ), `target_parameters`, `layer_replication`, and KaSA, whose own start changes the base.

    A `preprocess_loraga` that was imported before this call runs loraga too, since the function is changed inside. Two
    things still run PEFT's code: its `estimate_gradients`, if it was imported by name before this call (the gradients
    that it computes are then used), and copies of the code of these functions in other libraries.

    A second call has no effect.

    Raises:
        RuntimeError: this PEFT has no LoRA-GA, or is none of the releases this was checked with.
    """
    if _originals:
        return
    for owner, name, ours in _replacements():
        _originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, ours)


def restore_peft() -> None:
    """Undo [`apply_to_peft`]. Without an earlier call of it, this has no effect."""
    while _originals:
        setattr(*_originals.pop())


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(object, attribute, new value) for each replacement, after a check that this PEFT is one we know.

    `preprocess_loraga` is wrapped by `torch.no_grad`, and the wrapper refers to it by a closure cell. The cell is
    changed rather than the name in the module, so that a wrapper that was imported earlier calls the new function too.

    Raises:
        RuntimeError: this PEFT is another than was checked.
    """
    release = release_of(peft.__version__)
    if release < KNOWN[0]:
        _refuse(f"has no LoRA-GA; it came with {_FIRST}")
    if release not in KNOWN:
        _refuse("is not known to loraga")
    module = importlib.import_module("peft.tuners.lora.loraga")
    preprocess = getattr(module, "preprocess_loraga", None)
    inner = getattr(preprocess, "__wrapped__", None)
    cells = [cell for cell in getattr(preprocess, "__closure__", None) or () if cell.cell_contents is inner]
    expected = {
        "preprocess_loraga": (inner, ["model", "lora_config", "train_step", "cache_file"]),
        "estimate_gradients": (getattr(module, "estimate_gradients", None), ["model", "lora_config", "train_step"]),
        "LoraLayer.lora_ga_init": (
            getattr(LoraLayer, "lora_ga_init", None),
            ["self", "adapter_name", "lora_ga_config"],
        ),
    }
    for name, (function, parameters) in expected.items():
        if function is None or list(inspect.signature(function).parameters) != parameters:
            _refuse(f"has another {name} than loraga knows")
    if len(cells) != 1:
        _refuse("wraps preprocess_loraga in another way than loraga knows, or something else has replaced it")
    if {field.name for field in dataclasses.fields(peft.LoraGAConfig)} != {"direction", "scale", "stable_gamma"}:
        _refuse("has other options in LoraGAConfig than loraga knows")
    return [
        (cells[0], "cell_contents", _preprocess),
        (module, "estimate_gradients", _estimate_gradients),
        (LoraLayer, "lora_ga_init", _lora_ga_init),
    ]


def _refuse(why: str) -> NoReturn:
    known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN)
    raise RuntimeError(
        f"loraga.apply_to_peft: PEFT {peft.__version__} {why}. Checked releases: {known}. Install one of them, or call "
        "loraga.fast_init, which works with any PEFT."
    )


# ------------------------------------------------------------------------------------------------ the first phase


@dataclasses.dataclass(frozen=True)
class SketchedGradient:
    """The factors of a layer's mean gradient that its adapter needs, in place of PEFT's full gradient.

    Attributes:
        name (`str`): module name of the layer in the base model.
        factors (`Factors`): U (m, q), S (q,), Vh (q, n) of the gradient (m, n) = (out_features, in_features), with q
            as `starts.triplets` says.
        shape (`torch.Size`): of the weight as the layer stores it, as the full gradient would have.
    """

    name: str
    factors: Factors
    shape: torch.Size

    def to(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error that explains itself: PEFT's own initialisation calls this first.

        Raises:
            ValueError: always, since there is no full gradient.
        """
        raise ValueError(
            f"The gradient of {self.name!r} was sketched by loraga.apply_to_peft(), and PEFT's own initialisation "
            "cannot use it; call restore_peft() only after get_peft_model."
        )


@dataclasses.dataclass(frozen=True)
class _Target:
    """A layer to estimate: its (m, n), the adapter's r, and the number of triplets that its start needs."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    rank: int
    triplets: int

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def if_zero(self) -> str:
        return "gradient is zero"


# by target: its factors, or the reason why there are none
_Found = dict[str, "Factors | str"]


def _preprocess(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Replaces `peft.preprocess_loraga`, with the same arguments.

    Raises:
        ValueError: an option, a target or the cache file does not fit, or no target saw a gradient. The message names
            it, and no layer has got an attribute.
        RankFailed: another rank raised.
    """
    report = None
    with Ranks() as ranks:
        targets = _targets(model, lora_config)
        missing = cache_file is None or not os.path.exists(cache_file) or not os.path.getsize(cache_file)
        if ranks.any(missing):
            found, report = _estimate(model, lora_config, targets, train_step, ranks)
            if cache_file is not None and ranks.first:
                _write(cache_file, found)
        else:
            found = _read(cast(str, cache_file), targets)
            ordinary = {name: reason for name, reason in found.items() if isinstance(reason, str)}
            if ordinary and ranks.first:
                summary.warn_of_ordinary(ordinary, _TO_CALLER - 1)
        ranks.meet()
    _attach(model, targets, found, report)


def _estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any]) -> None:
    """Replaces `peft.tuners.lora.loraga.estimate_gradients`, with the same arguments."""
    with Ranks() as ranks:
        targets = _targets(model, lora_config)
        found, report = _estimate(model, lora_config, targets, train_step, ranks)
        ranks.meet()
    _attach(model, targets, found, report)


def _targets(model: nn.Module, lora_config: LoraConfig) -> list[_Target]:
    """The layers that get an adapter.

    Raises:
        ValueError: an option does not fit, or a layer cannot be started.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, give the LoraConfig both init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    init = _options(lora_config.lora_ga_config)
    for option in ("target_parameters", "layer_replication", "kasa_config"):
        if getattr(lora_config, option, None):
            raise ValueError(f"PEFT's LoRA-GA does not go with {option}; leave it out, or use loraga.fast_init.")
    check_sharding(model)
    check_injectable(model)
    base = model.base_model.model if isinstance(model, PeftModel) else model
    try:
        modules = find_targets(base, copy.copy(lora_config))
    except ValueError as error:
        raise ValueError(f"No supported layers found for LoRA-GA. {error}") from None
    check_layers(model, modules)
    targets = []
    for name, module in modules.items():
        if is_offloaded(module) or not isinstance(getattr(module, "weight", None), torch.Tensor):
            why = "is offloaded" if is_offloaded(module) else "has no weight that PEFT's LoRA-GA could ask for"
            raise ValueError(f"Layer {name!r} ({type(module).__name__}) {why}; leave it out, or use loraga.fast_init.")
        patterns = lora_config.rank_pattern or {}
        rank = patterns.get(get_pattern_key(patterns.keys(), name), lora_config.r)
        shape = _shape_of(module)
        targets.append(_Target(name, module, shape, rank, starts.triplets(init, rank, shape)))
    return targets


def _shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features). The shape of the weight would not do, since a packed weight has another one."""
    if isinstance(module, Conv1D):
        n, m = module.weight.shape
        return m, n
    return module.out_features, module.in_features  # type: ignore[return-value]


def _options(lora_ga_config: Any) -> InitConfig:
    check_choice("scale", lora_ga_config.scale, tuple(_SCALES))
    return InitConfig(
        direction=lora_ga_config.direction,
        scale=_SCALES[lora_ga_config.scale],
        stable_gamma=lora_ga_config.stable_gamma,
    )


def _estimate(
    model: nn.Module, lora_config: LoraConfig, targets: list[_Target], train_step: Callable[[], Any], ranks: Ranks
) -> tuple[_Found, InitReport]:
    init = _options(lora_config.lora_ga_config)
    request = Request(
        wanted={target.name: target.triplets for target in targets},
        targets={target.name: target.module for target in targets},
        init=init,
        seed=_SEED,
    )
    with adapters_disabled(model):
        estimation = estimate_step(model, request, train_step, ranks)
    report = summary.report_of(targets, {}, estimation, init, _SEED)
    if not report.initialised:
        raise ValueError("The gradient is zero at every target layer; check the loss and the labels.")
    if ranks.first:
        summary.warn_about(report, _TO_CALLER)
    found: _Found = {
        layer.name: estimation.estimates[layer.name].factors if layer.initialised else layer.reason
        for layer in report.layers
    }
    return found, report


def _attach(
    model: nn.Module, targets: list[_Target], found: Mapping[str, Factors | str], report: InitReport | None
) -> None:
    if report is not None:
        model.loraga_report = report  # type: ignore[assignment]  # PEFT hands it on to the PeftModel
    for target in targets:
        factors = found[target.name]
        vars(target.module).pop(_ATTRIBUTE, None)  # from an earlier run
        if isinstance(factors, Factors):
            sketched = SketchedGradient(target.name, factors, target.module.weight.shape)  # type: ignore[arg-type]
            setattr(target.module, _ATTRIBUTE, sketched)


# ------------------------------------------------------------------------------------------------ the cache file


def _write(cache_file: str, found: Mapping[str, Factors | str]) -> None:
    """Write the cache file, with PEFT's keys. It has tensors and strings only, so that reading it runs no code."""
    content = {_key(name): vars(value) if isinstance(value, Factors) else value for name, value in found.items()}
    with atomic_file(cache_file) as temporary:
        torch.save(content, temporary)


def _read(cache_file: str, targets: list[_Target]) -> _Found:
    """Read the factors of `targets` from a cache file. One that PEFT itself wrote, with full gradients, works too.

    Raises:
        ValueError: the file is no cache file, or does not fit the layers. The message names the layer.
    """

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"The cache file {os.fspath(cache_file)!r} {why}. Delete it, or name another.")

    try:
        content = torch.load(cache_file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        refuse(f"cannot be read ({type(error).__name__}: {one_line(error)})")
    if not isinstance(content, Mapping):
        refuse("holds no gradients by layer")
    found: _Found = {}
    for target in targets:
        value = content.get(_key(target.name))
        if value is None:
            refuse(f"knows nothing of layer {target.name!r}")
        if isinstance(value, str):
            found[target.name] = value
            continue
        if isinstance(value, torch.Tensor):
            if value.shape != target.module.weight.shape:
                refuse(f"has a gradient of shape {tuple(value.shape)} for layer {target.name!r}, which has another")
            factors = _factorize(value, target.transposed, target.triplets, target.name)
        else:
            factors = Factors(**value)
        if factors.shape != target.shape:
            refuse(f"is of another model: layer {target.name!r} is {target.shape} here and {factors.shape} there")
        if factors.rank < target.triplets:
            refuse(
                f"was made for a smaller rank: it holds {factors.rank} singular triplets of layer {target.name!r}, and "
                f"r={target.rank} needs {target.triplets}"
            )
        found[target.name] = factors.to(target.module.weight.device)
    return found


def _key(name: str) -> str:
    return f"{name}.{_ATTRIBUTE}"


def _factorize(gradient: torch.Tensor, transposed: bool, triplets: int, name: str) -> Factors:
    """The factors of a full gradient that PEFT itself computed, in the shape of the weight."""
    gradient = gradient.detach().to(torch.float32)
    return truncated_svd(gradient.mT if transposed else gradient, triplets, seed=seed_of(_SEED, name))


# ------------------------------------------------------------------------------------------------ the second phase


def _lora_ga_init(layer: LoraLayer, adapter_name: str, lora_ga_config: Any) -> None:
    """Replaces `LoraLayer.lora_ga_init`: starts one layer's adapter, and does not change its base weight.

    A layer without a gradient gets an ordinary start: either a warning of `preprocess_loraga` has named it, or PEFT is
    reading the adapter from a file and will overwrite A and B next.

    Raises:
        ValueError: the config is missing or does not go with the gradient.
    """
    base = layer.get_base_layer()
    gradient = getattr(base, _ATTRIBUTE, None)
    if gradient is None:
        layer.reset_lora_parameters(adapter_name, True)
        return
    if lora_ga_config is None:
        raise ValueError("lora_ga_config must be provided with init_lora_weights='lora_ga': LoraGAConfig(...).")
    init = _options(lora_ga_config)
    known = isinstance(gradient, SketchedGradient)
    slot = slot_of(gradient.name if known else type(base).__name__, layer, adapter_name)
    if slot.A.is_meta:
        raise ValueError("PEFT's LoRA-GA needs adapter weights to write to; leave out low_cpu_mem_usage=True.")
    needed = starts.triplets(init, slot.rank, slot.shape)
    factors = gradient.factors if known else _factorize(gradient, slot.transposed, needed, slot.name)
    if factors.rank < needed:
        raise ValueError(
            f"Layer {slot.name!r}: preprocess_loraga ran for a smaller rank ({factors.rank} singular triplets, and "
            f"r={slot.rank} needs {needed}); run it again with this config."
        )
    # A and B are not on the layer's device yet: PEFT moves them after this
    fill(slot, {slot.name: start_of(slot, factors.to(compute_device(base)), init, _SEED)}, _SEED)
    delattr(base, _ATTRIBUTE)
