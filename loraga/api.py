"""The library's two calls as steps: batch → tap → estimator → factors → recipe → start → adapter.

docs/architecture.md draws these steps, and names the folder of each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraga._messages import listed
from loraga.capture.batches import LossFn
from loraga.capture.isolation import rng_untouched
from loraga.capture.run import Batches, Estimation, Request, estimate
from loraga.capture.weight_gradients import WeightGradient
from loraga.config import EstimatorName, InitConfig
from loraga.distributed.ranks import Ranks
from loraga.distributed.sharding import check_injectable, check_layers, check_sharding, resharded
from loraga.factors import Factors
from loraga.integrations import peft as adapters
from loraga.linalg import seed_of
from loraga.report import build as summary
from loraga.report.report import InitReport
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

    A few batches go forward and backward through `model`. A sketch follows the gradient of each target layer's weight,
    so that the gradient itself is never formed. Train the result as any PEFT model, with the learning rate of full
    fine-tuning rather than that of LoRA.

    The result is the ordinary LoRA that PEFT alone would have made, with other numbers in A and B: no base weight,
    class, name, shape, config or hook differs. With `method="lora-ga"` the model computes the same function as the
    base until it is trained. With `"lora-one"` A and B already hold one step of descent.

    Where torch.distributed is initialised, every rank must make this call, each with its own batches. The mean is taken
    over the batches of all ranks, and all ranks get the same adapter. If one rank raises, all do.

    ```py
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.randn(32, 8), torch.randn(32, 4)) for _ in range(4)]
    peft_model = loraga.fast_init(
        model,
        batches,
        LoraConfig(r=4, target_modules=["0", "2"]),
        loss_fn=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    )
    print(peft_model.loraga_report)
    ```

    Sources: LoRA-GA, arXiv 2407.05000; LoRA-One, arXiv 2502.01235; the sketch, Halko, Martinsson and Tropp 2011,
    algorithm 4.4. docs/starts.md explains what differs from the papers.

    Args:
        model (`nn.Module`): a plain model, which gets adapters as `get_peft_model` would give it, or a `PeftModel`,
            whose adapter `adapter_name` is initialised anew. The `PeftModel` may be inside `DistributedDataParallel`,
            or sharded by FSDP2. Modes, `requires_grad`, `.grad`, hooks and the global random generators are afterwards
            as they were before. If the call raises, the whole model is as it was before.
        loader (iterable): of batches. A batch that is a mapping is passed as `model(**batch)`, with its tensors moved
            to the model's device.
        lora_config (`peft.LoraConfig`, *optional*): for a plain model only. If it is left out, r is 16, lora_alpha is
            64, and all linear layers are targets.
        init (`InitConfig`, *optional*): method, start, direction, scale, estimator.
        loss_fn (callable, *optional*): loss_fn(model, batch) returns the scalar loss. If it is left out, the loss is
            `output.loss`.
        max_batches (`int`, *optional*): the largest number of batches to take. The gradient is their mean, and every
            batch has the same weight.
        adapter_name (`str`): which adapter.
        seed (`int`): of the sketch, of `direction="random"`, and of the rows and layers that keep an ordinary start.
            The same seed and the same input give the same bits.
        show_progress_bar (`bool`): show progress over batches and layers.

    Returns:
        `peft.PeftModel` with the attribute `loraga_report` (`loraga.InitReport`). In a layer of (m, n) = (out_features,
        in_features), A is (r, n) and B is (m, r), in the dtype and on the device that PEFT gave them.

    Raises:
        ValueError: no target is found, there is no batch, no usable loss, no gradient at any target, NaN or Inf in
            every batch, an option is out of range, there is no such adapter, or its first start changed the base
            weights. The message names the layer or the value, and what to do.
        TypeError: a batch is no mapping and there is no `loss_fn`, or an argument or an adapter has another type than
            needed.
        RuntimeError: another rank raised, or did not come within the process group's timeout.
    """
    # without inference mode, since parameters made in it could never be trained
    with _undone_on_error() as undo, Ranks() as ranks, torch.inference_mode(False), rng_untouched():
        init = _checked(init, max_batches)
        model = _without_ddp(model)
        adapter = _adapter_to_start(model, lora_config, adapter_name, seed, undo)
        request = _request_for(adapter, init, seed)
        batches = Batches(loader, loss_fn, max_batches, show_progress_bar)
        with adapters.adapters_disabled(adapter.peft_model):
            estimation = estimate(model, request, batches, ranks)  # batch, tap, estimator, factors
        report = summary.report_of(adapter.parts, adapter.others, estimation, init, seed)

        began = time.perf_counter()
        values = _starts(adapter, estimation, report, init, seed)  # recipe, start
        if ranks.first:
            summary.warn_about(report, stacklevel=3)  # before the first write, since a warning may be made an error
        adapters.write_start(adapter, values, seed=seed, confirm=ranks.meet)
        report.seconds["adapter"] = time.perf_counter() - began
    adapter.peft_model.loraga_report = report
    return adapter.peft_model


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
    """The truncated SVD of each target layer's mean gradient over the batches of `loader`; `model` is not changed.

    ```py
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(32, 8) for _ in range(4)]
    factors = loraga.estimate_factors(
        model, batches, ["0", "2"], rank=2, loss_fn=lambda model, batch: model(batch).square().mean()
    )
    gradient = factors["0"].U * factors["0"].S @ factors["0"].Vh  # (16, 8), the best approximation of rank 2
    ```

    Source: docs/architecture.md, "The streaming estimator" (Halko, Martinsson and Tropp 2011, algorithm 4.4, on a sum
    that grows).

    Args:
        model (`nn.Module`): a plain model, or a `PeftModel`, whose adapters are switched off meanwhile.
        loader (iterable): of batches, see [`fast_init`].
        target_modules (`str` or iterable of `str`, *optional*): in every form that PEFT takes: a list of names or
            suffixes, a regular expression, `"all-linear"`, or `None` for PEFT's defaults for the architecture.
            Convolutions, embeddings and other layers with a `weight` of two or more dimensions are targets too where
            they are named: autograd forms their gradient, which is added to a dense buffer and freed at once.
        rank (`int`): singular triplets per layer. The start of an adapter of rank r needs r of them.
        estimator (`str`): `"streaming"` or `"dense"`. Layers that are not linear have dense buffers with both (float32
            with `"streaming"`).
        loss_fn, max_batches, seed, show_progress_bar: as in [`fast_init`].

    Returns:
        `dict[str, Factors]`: by module name in `model`: U (m, rank), S (rank,) and Vh (rank, n), float32, where (m, n)
        is (out_features, in_features) also for layers that store the transpose. S has the unit of the gradient: that
        of the loss over that of the weight. Layers that saw no gradient, or none without NaN or Inf, are left out, and
        a warning names them.

    Raises:
        ValueError: as [`fast_init`]; also where `rank` is below 1, or above min(m, n) of a target.
        TypeError, RuntimeError: as [`fast_init`]. As there, every rank must make this call.
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


@contextmanager
def _undone_on_error() -> Iterator[ExitStack]:
    """A stack whose callbacks run if the block raises, and are dropped if it does not."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def _checked(init: InitConfig | None, max_batches: int | None) -> InitConfig:
    if init is not None and not isinstance(init, InitConfig):
        raise TypeError(f"init must be a loraga.InitConfig, not a {type(init).__name__}.")
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(f"max_batches={max_batches!r} must be a whole number of at least 1, or None for all.")
    return init or InitConfig()


def _without_ddp(model: nn.Module) -> nn.Module:
    """The `PeftModel` inside `DistributedDataParallel`; any other model as it is, and `inject` refuses a wrapper."""
    inner = adapters.inner_model(model)
    return inner if isinstance(inner, adapters.PeftModel) else model


def _adapter_to_start(
    model: nn.Module, lora_config: LoraConfig | None, adapter_name: str, seed: int, undo: ExitStack
) -> adapters.Adapter:
    """The adapter of a `PeftModel`, or a fresh one in a plain model, after all checks that need no batch.

    `undo` receives what takes a fresh adapter out again.
    """
    if isinstance(model, adapters.PeftModel):
        if lora_config is not None:
            raise ValueError(
                f"The model is a PeftModel already, so adapter {adapter_name!r} keeps its own config; leave "
                "lora_config out, or pass the base model."
            )
        check_sharding(model)
        peft_model = model
    else:
        check_sharding(model)
        check_injectable(model)
        undo.callback(adapters.remember_model(model))
        peft_model = _inject(model, lora_config, adapter_name, seed)
    with resharded(model):  # a forward before this call may have left the weights of sharded layers gathered
        adapter = adapters.Adapter.of(peft_model, adapter_name)
    if not adapter.slots:
        raise ValueError(
            f"Adapter {adapter_name!r} has no layer to initialise; its layers are: "
            + "; ".join(f"{name} ({reason})" for name, reason in adapter.others.items())
        )
    check_layers(model, {slot.name: slot.base_layer for slot in adapter.slots})
    adapters.check_magnitudes(adapter)
    return adapter


def _inject(model: nn.Module, lora_config: LoraConfig | None, adapter_name: str, seed: int) -> PeftModel:
    """A fresh adapter. PEFT draws its numbers from `seed`, and layers that loraga cannot start keep them."""
    with rng_untouched():
        torch.default_generator.manual_seed(seed_of(seed, adapter_name))
        return adapters.inject(model, lora_config, adapter_name)


def _request_for(adapter: adapters.Adapter, init: InitConfig, seed: int) -> Request:
    """What to estimate for an adapter: the triplets that the start of each layer needs."""
    weights = {slot.name: slot.weight_gradient for slot in adapter.slots if slot.weight_gradient is not None}
    return Request(
        wanted={part.name: starts.triplets(init, part.rank, part.shape) for part in adapter.parts},
        targets={slot.name: slot.base_layer for slot in adapter.slots if slot.weight_gradient is None},
        weights=weights,
        init=init,
        seed=seed,
    )


def _starts(
    adapter: adapters.Adapter, estimation: Estimation, report: InitReport, init: InitConfig, seed: int
) -> dict[str, starts.Start]:
    """A and B of every layer that has a gradient, by name.

    Raises:
        ValueError: no layer has one.
    """
    found = {
        layer.name: adapters.start_of(part, estimation.estimates[layer.name].factors, init, seed)
        for part, layer in zip(adapter.parts, report.layers, strict=False)  # the report has other layers behind
        if layer.initialised
    }
    if not found:
        seen = [estimate.factors.S[0] for estimate in estimation.estimates.values()]
        if all(largest == 0 for largest in seen):
            raise ValueError("The gradient is zero at every target layer; check the loss and the labels.")
        reasons = listed([f"{layer.name} ({layer.reason})" for layer in report.layers])
        raise ValueError(f"No target layer has a gradient to start from: {reasons}. Check the loss and the data.")
    return found
