"""The library's two calls, top to bottom: batch → tap → estimator → factors → recipe → start → adapter."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraga._messages import listed
from loraga.capture.batches import LossFn
from loraga.capture.isolation import rng_untouched
from loraga.capture.run import Batches, Request, estimate
from loraga.capture.weight_gradients import WeightGradient
from loraga.config import EstimatorName, InitConfig
from loraga.distributed.ranks import Ranks
from loraga.distributed.sharding import check_injectable, check_layers, check_sharding, resharded
from loraga.factors import Factors
from loraga.integrations import peft as adapters
from loraga.linalg import seed_of
from loraga.report import build as summary
from loraga.report.report import INITIALISED
from loraga.start import starts

if TYPE_CHECKING:
    from loraga.integrations.peft import LoraConfig, PeftModel


def fast_init(
    model: nn.Module,
    loader: Iterable[Any],
    lora_config: LoraConfig | None = None,
    *,
    init: InitConfig | None = None,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    adapter_name: str = "default",
    seed: int = 0,
    show_progress_bar: bool = True,
) -> PeftModel:
    """Start a LoRA adapter in the leading singular directions of the full fine-tuning gradient (LoRA-GA).

    A few batches go forward and backward through `model`; the gradient of each target layer's weight is followed by a
    sketch and never formed (arXiv 2407.05000 for the method, Halko, Martinsson, Tropp 2011 for the sketch). Train the
    result as any PEFT model, at full fine-tuning's learning rate rather than LoRA's.

    The result is the ordinary LoRA that PEFT alone would have made, with other numbers in A and B: no base weight,
    class, name, shape, config or hook differs. The model's function is the base's at the start, except with LoRA-One.

    Where torch.distributed is initialised, every rank must make this call, each with its own batches; the mean is over
    all of them, and the adapter the same on all ranks. If one raises, all do.

    Args:
        model (`nn.Module`): a plain model, which gets adapters as `get_peft_model` would give it, or a `PeftModel`,
            also in `DistributedDataParallel` or sharded by FSDP2, whose adapter `adapter_name` is initialised anew.
            Modes, `requires_grad`, `.grad`, hooks and the global random generators are as before afterwards, and the
            whole model is when anything raises.
        loader (iterable): of batches. A mapping goes in as `model(**batch)`, its tensors moved to the model's device.
        lora_config (`peft.LoraConfig`, *optional*): for a plain model; left out, r 16, alpha 64, all linear layers.
        init (`InitConfig`, *optional*): method, start, direction, scale, estimator.
        loss_fn (callable, *optional*): loss_fn(model, batch) returns the scalar loss. Left out, it is `output.loss`.
        max_batches (`int`, *optional*): take no more batches than these. The gradient is their mean, each batch
            weighted the same.
        adapter_name (`str`): which adapter.
        seed (`int`): of the sketch, of `direction="random"`, and of rows and layers that stay ordinary. Same seed, same
            input: same bits.
        show_progress_bar (`bool`): show progress over batches and layers.

    Returns:
        `peft.PeftModel` with the attribute `loraga_report` (`loraga.InitReport`).

    Raises:
        ValueError: no target found, no batch, no usable loss, no gradient at any target, NaN or Inf in every batch, an
            option out of range, an adapter that is not there, or one whose first start changed the base weights. The
            message names the layer or value and what to do.
        TypeError: a batch is no mapping and there is no `loss_fn`.
        RuntimeError: another rank raised, or did not come within the process group's timeout.
    """
    restore = None
    try:
        # parameters made in inference mode could never be trained
        with Ranks() as ranks, torch.inference_mode(False), rng_untouched():
            init = _checked(init, max_batches)
            inner = adapters.inner_model(model)
            plain = not isinstance(inner, adapters.PeftModel)
            model = model if plain else inner
            if not plain and lora_config is not None:
                raise ValueError(
                    f"The model is a PeftModel already, so adapter {adapter_name!r} keeps its own config; leave "
                    "lora_config out, or pass the base model."
                )
            check_sharding(model)
            if plain:
                check_injectable(model)
            restore = adapters.remember_model(model) if plain else None
            peft_model = _inject(model, lora_config, adapter_name, seed) if plain else model
            with resharded(model):  # a layer whose weight a forward left gathered is a sharded one all the same
                adapter = adapters.Adapter.of(peft_model, adapter_name)
            if not adapter.slots:
                raise ValueError(
                    f"Adapter {adapter_name!r} has no layer to initialise; its layers are: "
                    + "; ".join(f"{name} ({reason})" for name, reason in adapter.others.items())
                )
            check_layers(model, {slot.name: slot.base_layer for slot in adapter.slots})
            adapters.check_magnitudes(adapter)
            request = Request(
                wanted={part.name: starts.triplets(init, part.rank, part.shape) for part in adapter.parts},
                targets={slot.name: slot.base_layer for slot in adapter.slots if slot.weight_gradient is None},
                weights={slot.name: slot.weight_gradient for slot in adapter.slots if slot.weight_gradient is not None},
                init=init,
                seed=seed,
            )
            batches = Batches(loader, loss_fn, max_batches, show_progress_bar)
            with adapters.adapters_disabled(peft_model):
                estimation = estimate(model, request, batches, ranks)
            report = summary.report_of(adapter.parts, adapter.others, estimation, init, seed)
            began = time.perf_counter()
            written = {
                layer.name: adapters.start_of(part, estimation.estimates[layer.name].factors, init, seed)
                for part, layer in zip(adapter.parts, report.layers, strict=False)
                if layer.status == INITIALISED
            }
            if not written:
                raise ValueError("The gradient is zero at every target layer; check the loss and the labels.")
            if ranks.first:
                summary.warn_about(report, stacklevel=3)  # before anything is written: a warning may be made an error
            adapters.write_start(adapter, written, seed=seed, confirm=ranks.meet)
            report.seconds["adapter"] = time.perf_counter() - began
    except BaseException:
        if restore is not None:
            restore()
        raise
    peft_model.loraga_report = report
    return peft_model


def estimate_factors(
    model: nn.Module,
    loader: Iterable[Any],
    target_modules: str | Iterable[str] | None = "all-linear",
    rank: int = 16,
    *,
    estimator: EstimatorName = "streaming",
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> dict[str, Factors]:
    """The truncated SVD of each target layer's mean gradient over the batches of `loader`; `model` is left as it was.

    Args:
        model (`nn.Module`): a plain model or a `PeftModel` (its adapters are switched off meanwhile).
        loader (iterable): of batches, see [`fast_init`].
        target_modules (`str` or iterable of `str`, *optional*): in every form PEFT takes: a list of names or suffixes,
            a regular expression, `"all-linear"`, or `None` for PEFT's defaults for the architecture. Convolutions,
            embeddings and other layers with a `weight` of two or more dimensions are targets too where they are named:
            autograd forms their gradient, which is added to a dense buffer and freed at once.
        rank (`int`): triplets per layer; the start of an adapter of rank r needs r.
        estimator (`str`): `"streaming"` or `"dense"`; layers that are not linear have dense buffers with both (float32
            with `"streaming"`).
        loss_fn, max_batches, seed, show_progress_bar: as in [`fast_init`].

    Returns:
        `dict[str, Factors]`: by module name of `model`: U (m, rank), S (rank,), Vh (rank, n), float32, where (m, n) is
        (out_features, in_features) also for layers that store the transpose. Layers that saw no gradient, or none
        without NaN or Inf, are left out, with a warning that names them.

    Raises:
        ValueError, TypeError, RuntimeError: as [`fast_init`], also in that every rank must call it.
    """
    with Ranks() as ranks, rng_untouched():
        init = _checked(InitConfig(estimator=estimator), max_batches)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank={rank!r} must be a whole number of at least 1.")
        model = adapters.inner_model(model)
        check_sharding(model)
        targets = adapters.find_target_names(model, target_modules)
        check_layers(model, targets)
        linear = {name: module for name, module in targets.items() if adapters.is_linear_like(module)}
        request = Request(
            wanted=dict.fromkeys(targets, rank),
            targets=linear,
            weights={name: WeightGradient(module) for name, module in targets.items() if name not in linear},
            init=init,
            seed=seed,
        )
        with adapters.adapters_disabled(model):
            estimation = estimate(model, request, Batches(loader, loss_fn, max_batches, show_progress_bar), ranks)
    unseen = {name: reason for name in targets if (reason := summary.why_unseen(name, estimation))}
    if unseen and ranks.first:
        left_out = listed([f"{name} ({reason})" for name, reason in unseen.items()])
        warnings.warn(f"These layers are left out of the result: {left_out}.", stacklevel=2)
    if estimation.skipped_batches and ranks.first:
        layers = listed([name for name, count in estimation.skipped.items() if count])
        warnings.warn(summary.skipped(estimation) + f" at {layers}.", stacklevel=2)
    return {name: result.factors for name, result in estimation.estimates.items() if name not in unseen}


def _checked(init: InitConfig | None, max_batches: int | None) -> InitConfig:
    if init is not None and not isinstance(init, InitConfig):
        raise TypeError(f"init must be a loraga.InitConfig, not a {type(init).__name__}.")
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(f"max_batches={max_batches!r} must be a whole number of at least 1, or None for all.")
    return init or InitConfig()


def _inject(model: nn.Module, lora_config: LoraConfig | None, adapter_name: str, seed: int) -> PeftModel:
    """A fresh adapter; where the gradient will not decide its start, `seed` does."""
    with rng_untouched():
        torch.random.default_generator.manual_seed(seed_of(seed, adapter_name))
        return adapters.inject(model, lora_config, adapter_name)
