"""Run batches through a model with taps, merge the estimators over ranks and finish them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from loraga.capture.batches import LossFn, count_of, input_device, loss_of, moved
from loraga.capture.collector import Collector
from loraga.capture.isolation import isolated, preserved_gradients
from loraga.capture.taps import Taps
from loraga.capture.weight_gradients import WeightGradient, WeightGradientHooks, separate_parameters
from loraga.config import InitConfig
from loraga.distributed.ranks import Ranks
from loraga.distributed.sharding import is_sharded, resharded
from loraga.estimators import BFLOAT16_LIMIT, Estimate, finish, merge
from loraga.linalg.precision import own_precision
from loraga.ops import reference
from loraga.ops.triton import selection


@dataclass
class Estimation:
    """Estimates by layer name, and counts of what they were made from.

    Counts are sums over all ranks; `state_bytes` and `reduced_bytes` are those of this rank.

    Attributes:
        estimates (`dict[str, Estimate]`): factors and energy of every layer that got a gradient.
        updates (`dict[str, int]`): number of gradients that each layer got.
        skipped (`dict[str, int]`): how many of these were left out because of NaN or Inf.
        called (`set[str]`): layers whose forward ran.
        micro_batches, skipped_batches (`int`): how many there were, and how many had NaN or Inf in some layer.
        state_bytes (`int`): memory of all estimators.
        ranks (`int`): number of ranks.
        reduced_bytes (`int`): payload of this rank's collectives.
        seconds (`dict[str, float]`): time by part: "gradients", "factors" and, with several ranks, "merging".
    """

    estimates: dict[str, Estimate]
    updates: dict[str, int]
    skipped: dict[str, int]
    called: set[str]
    micro_batches: int
    skipped_batches: int
    state_bytes: int
    ranks: int
    reduced_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to estimate.

    Attributes:
        wanted (`dict[str, int]`): number of singular triplets by layer. A stack of experts has a name for each expert,
            see `WeightGradient.parts`.
        targets (`dict[str, nn.Module]`): linear layers. A tap receives x and dy, whose product is their gradient.
        init (`InitConfig`): estimator and buffers.
        seed (`int`): of the sketches.
        weights (`dict[str, WeightGradient]`): weights whose gradient autograd forms. It is summed in dense buffers, in
            float32 buffers with `init.estimator="streaming"`.
    """

    wanted: Mapping[str, int]
    targets: Mapping[str, nn.Module]
    init: InitConfig
    seed: int
    weights: Mapping[str, WeightGradient] = field(default_factory=dict)


@dataclass(frozen=True)
class Batches:
    """What to estimate from: at most `max_batches` batches of `loader`, each with the loss `loss_fn(model, batch)`."""

    loader: Iterable[Any]
    loss_fn: LossFn | None = None
    max_batches: int | None = None
    show_progress_bar: bool = False


def estimate(model: nn.Module, request: Request, batches: Batches, ranks: Ranks) -> Estimation:
    """Factors of the mean gradient over `batches` for every target. Afterwards `model` is as it was.

    Every one of `ranks` has its own batches. The mean is over the batches of all ranks, and all ranks return the same
    bits.

    Raises:
        ValueError: the loader is empty, a batch has no usable loss, no target got a gradient, every batch had NaN or
            Inf, or the ranks have different requests.
        TypeError: a batch is no mapping and there is no `loss_fn`.
        RankFailed: another rank raised.
    """
    show = batches.show_progress_bar and ranks.first
    together = is_sharded(model)
    total = count_of(batches.loader, batches.max_batches)
    _agree(model, request, ranks, together)
    many = ranks.any(total is None or total > BFLOAT16_LIMIT)
    device = input_device(model)
    collector = Collector(request.wanted, request.init, total, many, request.seed, device)
    started = time.perf_counter()
    with (
        collector,
        resharded(model),
        isolated(model),
        separate_parameters(request.weights) as parameters,
        WeightGradientHooks(parameters, collector.on_gradient),
        Taps(request.targets, collector.on_pair, request.weights) as taps,
    ):
        collector.prepare(request.targets, request.weights)
        with tqdm(total=total, desc="loraga: gradients", unit="batch", disable=not show) as bar:
            taken = itertools.islice(batches.loader, batches.max_batches)
            for index, batch in enumerate(ranks.batches(taken, together)):
                loss = partial(loss_of, model, moved(batch, device), batches.loss_fn, index)
                collector.absorb(loss, taps, ranks.any if together else bool)
                bar.update()
    called = taps.called.union(*(w.parts(name) for name, w in request.weights.items() if name in taps.called))
    counts = _counted(collector, called, ranks)
    if counts.batches == 0:
        raise ValueError("The loader gave no batch; loraga needs at least one to see a gradient.")
    return _conclude(collector, counts, ranks, started, show)


def estimate_step(model: nn.Module, request: Request, step: Callable[[], Any], ranks: Ranks) -> Estimation:
    """Like `estimate`, for a callback that runs forward and backward itself, any number of times.

    Every backward call is one micro-batch. The model must not be sharded. While `step` runs, the model is `isolated`:
    there is no dropout, and no parameter requires a gradient, so backward computes no weight gradient. No parameter has
    a `.grad` at the start. `step` may change modes, and clear or clip gradients; all of that is restored. loraga does
    not scale a float16 loss here, `step` must do that.

    Raises:
        ValueError: `step` ran no backward that reached a target, every one had NaN or Inf, or the ranks have different
            requests.
        RankFailed: another rank raised.
    """
    _agree(model, request, ranks, together=False)
    collector = Collector(request.wanted, request.init, None, True, request.seed, input_device(model))
    started = time.perf_counter()
    with (
        collector,
        preserved_gradients(model),
        isolated(model),
        Taps(request.targets, collector.on_pair, on_backward=collector.next_micro_batch) as taps,
    ):
        collector.prepare(request.targets, {})
        step()
    collector.next_micro_batch()
    return _conclude(collector, _counted(collector, taps.called, ranks), ranks, started, show_progress_bar=False)


def _agree(model: nn.Module, request: Request, ranks: Ranks, together: bool) -> None:
    """Raise ValueError unless all ranks have the same request, and all or none of them a sharded model.

    Then check the kernels on the devices of `model`, unless they were checked before, and choose what all ranks use.
    """
    ranks.agree(
        targets=tuple(request.wanted.items()),
        weights=tuple(request.weights),
        options=request.init,
        seed=request.seed,
        sharded=together,
    )
    devices = {parameter.device for parameter in model.parameters()}
    if together and torch.cuda.is_available():  # weights in host memory are computed with here (FSDP2's CPU offload)
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    with own_precision(torch.device("cuda")):
        selection.agree(ranks, devices)


@dataclass
class _Counts:
    """Sums over all ranks. `updates` and `skipped` have only layers that got a gradient on some rank."""

    batches: int
    skipped_batches: int
    updates: dict[str, int]
    skipped: dict[str, int]
    called: set[str]
    loss_scale: float  # factor that the merged sums include


def _counted(collector: Collector, called: set[str], ranks: Ranks) -> _Counts:
    """Sum the counts of all ranks. Every rank then has an estimator of each layer that got a gradient on any rank.

    Each rank sends one row per layer: updates, skipped updates, whether its forward ran, m and n. A row before them has
    the rank's micro-batches, its skipped ones and the exponent of its loss scale. The merged sums get the smallest
    scale, so a rank's sums are multiplied by at most 1 and cannot overflow.

    Raises ValueError if a layer has different shapes on different ranks.
    """
    exponent = round(math.log2(collector.loss_scale or 1.0))
    outcomes, left_out = collector.outcomes, collector.outcomes.left_out()
    rows = [[outcomes.micro_batches, outcomes.incomplete_batches(), exponent, 0, 0]]
    for name in collector.wanted:
        estimator = collector.estimators.get(name)
        m, n = (estimator.spec.m, estimator.spec.n) if estimator is not None else (0, 0)
        rows.append([outcomes.updates[name], left_out[name], int(name in called), m, n])
    tables = ranks.gather(rows, collector.device)
    totals = [table[0] for table in tables]
    counts = _Counts(
        batches=sum(of_rank[0] for of_rank in totals),
        skipped_batches=sum(of_rank[1] for of_rank in totals),
        updates={},
        skipped={},
        called=set(),
        loss_scale=2.0 ** min((of_rank[2] for of_rank in totals if of_rank[0]), default=0),
    )
    for name, *of_ranks in zip(collector.wanted, *(table[1:] for table in tables), strict=True):
        updates, skipped, calls = (sum(row[column] for row in of_ranks) for column in range(3))
        if calls:
            counts.called.add(name)
        if updates == 0:
            continue
        counts.updates[name], counts.skipped[name] = updates, skipped
        shapes = {(row[3], row[4]) for row in of_ranks if row[3]}
        if len(shapes) > 1:
            raise ValueError(f"Layer {name!r} has different shapes on different ranks: {sorted(shapes)}.")
        if name not in collector.estimators:
            collector.make(name, *shapes.pop())
    return counts


def _conclude(
    collector: Collector, counts: _Counts, ranks: Ranks, started: float, show_progress_bar: bool
) -> Estimation:
    """Merge the sums of all ranks, divide them by their number of micro-batches and factorize the means.

    `started` is the `time.perf_counter()` before the first batch.

    Raises ValueError if no layer got a gradient, or every micro-batch had NaN or Inf in all layers.
    """
    observed = time.perf_counter()
    if not counts.updates:
        raise ValueError(
            f"None of the {len(collector.wanted)} target layers saw a gradient: "
            + ("none was called by the forward pass." if not counts.called else "the loss does not depend on them.")
            + " Check target_modules and the loss."
        )
    if counts.skipped_batches == counts.batches and counts.skipped == counts.updates:
        raise ValueError(
            f"All {counts.batches} micro-batches gave NaN or Inf gradients, so there is nothing to start from; check "
            "the loss, the data and the dtype (float16 overflows easily, bfloat16 does not)."
        )
    state_bytes = sum(e.state_bytes for e in collector.estimators.values()) + collector.staging_bytes
    estimators = {name: collector.estimators[name] for name in counts.updates}
    merge(ranks, estimators, counts.loss_scale / (collector.loss_scale or 1.0))
    merged = time.perf_counter()
    # A layer's mean is over the micro-batches without NaN or Inf. If a layer was called several times per micro-batch,
    # a skipped call counts as its share of a micro-batch.
    summed = {name: counts.batches * (1 - counts.skipped[name] / counts.updates[name]) for name in estimators}
    divisors = {name: max(count, 1.0) * counts.loss_scale for name, count in summed.items()}
    bar = tqdm(total=len(estimators), desc="loraga: factors", unit="layer", disable=not show_progress_bar)
    with bar:
        estimates = _of_first_rank(finish(estimators, divisors, bar.update), ranks)
    reference.forget()
    seconds = {"gradients": observed - started, "factors": time.perf_counter() - merged}
    if ranks.size > 1:
        seconds["merging"] = merged - observed
    return Estimation(
        estimates=estimates,
        updates=counts.updates,
        skipped=counts.skipped,
        called=counts.called,
        micro_batches=counts.batches,
        skipped_batches=counts.skipped_batches,
        state_bytes=state_bytes,
        ranks=ranks.size,
        reduced_bytes=ranks.reduced_bytes,
        seconds=seconds,
    )


def _of_first_rank(estimates: dict[str, Estimate], ranks: Ranks) -> dict[str, Estimate]:
    """Replace the results of every rank by those of rank 0, whose bits may differ on different hardware."""
    if ranks.size == 1:
        return estimates
    tensors = [t for e in estimates.values() for t in (e.factors.U, e.factors.S, e.factors.Vh)]
    ranks.from_first_(tensors)
    energies = torch.tensor([e.energy for e in estimates.values()], dtype=torch.float64, device=tensors[0].device)
    ranks.from_first_([energies])
    return {
        name: Estimate(estimate.factors, energy)
        for (name, estimate), energy in zip(estimates.items(), energies.tolist(), strict=True)
    }
