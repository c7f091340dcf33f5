"""Run batches through a tapped model and collect what the estimators made of them."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm.auto import tqdm

from loraga.capture.isolation import is_bitsandbytes, kept, quiet
from loraga.capture.taps import Taps
from loraga.capture.weight_gradients import GradientSink, WholeWeight, own_weights
from loraga.config import InitConfig
from loraga.distributed.ranks import Ranks, merge
from loraga.distributed.sharding import is_sharded, resharded
from loraga.estimators import Dense, Estimate, Estimator, LayerSpec, StagingRing, Streaming, finish
from loraga.linalg import seed_of

LossFn = Callable[[nn.Module, Any], Tensor]

# bfloat16 buffers round once per micro-batch; beyond this many their rounding stagnates (design §4.3)
BFLOAT16_LIMIT = 256
# float16 gradients: the loss is scaled to about this before backward, and by this much less after an overflow
_FLOAT16_TARGET, _FLOAT16_BACKOFF, _FLOAT16_TRIES = 2.0**15, 2.0**-4, 6


@dataclass
class Estimation:
    """Estimates by layer name, and how they came about.

    `updates` counts the calls of a layer that brought a gradient, `skipped` those left out for NaN or Inf. All counts
    are over all ranks; `state_bytes` and `reduced_bytes` are this rank's.
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


def estimate(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    wanted: Mapping[str, int],
    loader: Iterable[Any],
    config: InitConfig,
    ranks: Ranks,
    *,
    loss_fn: LossFn | None,
    max_batches: int | None,
    seed: int,
    show_progress_bar: bool,
    whole: Mapping[str, WholeWeight] | None = None,
) -> Estimation:
    """Factors of the mean gradient of every target, `wanted[name]` triplets each. `model` is left as it was.

    `targets` are linear layers, whose gradient is a product that a tap sees. Gradients of the weights in `whole` are
    formed by autograd and summed in dense buffers, also with `config.estimator="streaming"` (float32 then). A stack of
    experts has estimates by the names of its `WholeWeight.parts`.

    Every one of `ranks` brings its own batches; the mean is over all of them, and the factors are the same bits on all.

    Raises:
        ValueError: no batch came, a batch has no usable loss, no target saw a gradient, every batch had NaN or Inf, or
            ranks do not agree on what to estimate.
        TypeError: a batch is no mapping and there is no `loss_fn`.
        RankFailed: another rank raised.
    """
    show = show_progress_bar and ranks.first
    together = is_sharded(model)
    total = _count(loader, max_batches)
    whole = whole or {}
    ranks.agree(targets=tuple(wanted.items()), whole=tuple(whole), options=config, seed=seed, sharded=together)
    many = ranks.any(total is None or total > BFLOAT16_LIMIT)
    device = _input_device(model)
    collector = _Collector(wanted, config, total, many, seed, device)
    started = time.perf_counter()
    with (
        collector,
        resharded(model),
        quiet(model),
        own_weights(whole) as weights,
        GradientSink(weights, collector.take),
        Taps(targets, collector.sink, whole) as taps,
    ):
        collector.prepare(targets, whole)
        bar = tqdm(total=total, desc="loraga: gradients", unit="batch", disable=not show)
        with bar:
            for index, batch in enumerate(ranks.batches(itertools.islice(loader, max_batches), together)):
                loss_of = partial(_loss, model, _move(batch, device), loss_fn, index)
                collector.absorb(loss_of, taps, ranks.any if together else bool)
                bar.update()
    called = taps.called.union(*(weight.parts(name) for name, weight in whole.items() if name in taps.called))
    counts = _counted(collector, called, ranks)
    if counts.batches == 0:
        raise ValueError("The loader gave no batch; loraga needs at least one to see a gradient.")
    return _conclude(collector, counts, ranks, started, show)


def estimate_step(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    wanted: Mapping[str, int],
    step: Callable[[], Any],
    config: InitConfig,
    ranks: Ranks,
    *,
    seed: int,
) -> Estimation:
    """As `estimate`, of a callback that runs forward and backward itself, as often as it likes.

    Every backward call is one micro-batch. `step` finds the model, which must not be sharded, as `quiet` leaves it (no
    dropout, nothing to train, so backward computes no weight gradient) and no gradient at any parameter; it may change
    modes and clear or clip gradients. All of that is put back. float16 losses go backward as `step` scales them.

    Raises:
        ValueError: `step` ran no backward that reached a target, all of them had NaN or Inf, or ranks do not agree on
            what to estimate.
        RankFailed: another rank raised.
    """
    ranks.agree(targets=tuple(wanted.items()), options=config, seed=seed)
    collector = _Collector(wanted, config, None, True, seed, _input_device(model))
    started = time.perf_counter()
    with (
        collector,
        kept(model),
        quiet(model),
        Taps(targets, collector.sink, on_backward=collector.next_micro_batch) as taps,
    ):
        collector.prepare(targets, {})
        step()
    collector.next_micro_batch()
    return _conclude(collector, _counted(collector, taps.called, ranks), ranks, started, show_progress_bar=False)


@dataclass
class _Counts:
    """What all ranks together took in. Layers without a gradient are in none but `called`."""

    batches: int
    skipped_batches: int
    updates: dict[str, int]
    skipped: dict[str, int]
    called: set[str]
    loss_scale: float  # that the merged sums carry


def _counted(collector: _Collector, called: set[str], ranks: Ranks) -> _Counts:
    """Sum up over ranks, and make estimators of layers that only other ranks saw."""
    exponent = round(math.log2(collector.loss_scale or 1.0))
    rows = [[collector.micro_batches, collector.skipped_batches(), exponent, 0, 0]]
    for name in collector.wanted:
        estimator = collector.estimators.get(name)
        m, n = (estimator.spec.m, estimator.spec.n) if estimator is not None else (0, 0)
        skipped = int(collector.skipped.get(name, 0))
        rows.append([collector.updates[name], skipped, int(name in called), m, n])
    tables = ranks.gather(rows, collector.device)
    heads = [table[0] for table in tables]
    counts = _Counts(
        batches=sum(head[0] for head in heads),
        skipped_batches=sum(head[1] for head in heads),
        updates={},
        skipped={},
        called=set(),
        loss_scale=2.0 ** min((head[2] for head in heads if head[0]), default=0),
    )
    for name, *seen in zip(collector.wanted, *(table[1:] for table in tables), strict=True):
        updates, skipped, calls = (sum(row[column] for row in seen) for column in range(3))
        if calls:
            counts.called.add(name)
        if updates == 0:
            continue
        counts.updates[name], counts.skipped[name] = updates, skipped
        shapes = {(row[3], row[4]) for row in seen if row[3]}
        if len(shapes) > 1:
            raise ValueError(f"Layer {name!r} has different shapes on different ranks: {sorted(shapes)}.")
        if name not in collector.estimators:
            collector.make(name, *shapes.pop())
    return counts


def _conclude(
    collector: _Collector, counts: _Counts, ranks: Ranks, started: float, show_progress_bar: bool
) -> Estimation:
    """Merge over ranks what was collected since `started`, and finish it."""
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
    # each micro-batch weighs the same, left out ones nothing
    summed = {name: counts.batches * (1 - counts.skipped[name] / counts.updates[name]) for name in estimators}
    divisors = {name: max(count, 1.0) * counts.loss_scale for name, count in summed.items()}
    bar = tqdm(total=len(estimators), desc="loraga: factors", unit="layer", disable=not show_progress_bar)
    with bar:
        estimates = _of_first_rank(finish(estimators, divisors, bar.update), ranks)
    seconds = {"gradients": observed - started, "factors": time.perf_counter() - merged}
    if ranks.size > 1:
        seconds["merging"] = merged - observed
    return Estimation(
        estimates,
        counts.updates,
        counts.skipped,
        counts.called,
        counts.batches,
        counts.skipped_batches,
        state_bytes,
        ranks.size,
        ranks.reduced_bytes,
        seconds,
    )


def _of_first_rank(estimates: dict[str, Estimate], ranks: Ranks) -> dict[str, Estimate]:
    """Rank 0's results on every rank."""
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


class _Collector:
    """The estimators of this rank and the record of what was finite.

    Args:
        wanted: triplets by layer.
        micro_batches: of this rank, where that is known.
        many: more of them than a bfloat16 buffer bears, on some rank.
        device: for the state of layers that tell no other.
    """

    def __init__(
        self,
        wanted: Mapping[str, int],
        config: InitConfig,
        micro_batches: int | None,
        many: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self.wanted, self.device = wanted, device
        self.estimators: dict[str, Estimator] = {}
        self.updates: Counter[str] = Counter()
        self.skipped: dict[str, Tensor] = {}
        self.loss_scale: float | None = None  # that the sums carry; None as long as no float16 was seen
        self._config, self._micro_batches, self._many, self._seed = config, micro_batches, many, seed
        self._devices: dict[str, torch.device] = {}
        self._calls: Counter[str] = Counter()
        self._flags: dict[tuple[str, int], Tensor] = {}
        self._summed: set[tuple[str, int]] = set()
        self._weight = 1.0
        self._finite: list[dict[torch.device, Tensor]] = []
        self._rings: dict[torch.device, StagingRing] = {}
        self._whole: Mapping[str, WholeWeight] = {}
        self.staging_bytes = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        for ring in self._rings.values():  # whatever happened: nothing may be on its way when the memory goes
            ring.close()

    def _next_call(self, name: str) -> tuple[str, int] | None:
        """A key for this call of a layer in this micro-batch; None where an earlier try has summed it."""
        key = (name, self._calls[name])
        self._calls[name] += 1
        return None if key in self._summed else key

    def sink(self, name: str, x: Tensor, dy: Tensor) -> None:
        key = self._next_call(name)
        if key is None:
            return
        if name not in self.estimators or self._elsewhere(name, dy.device):
            self.estimators[name] = self._estimator(name, dy.shape[1], x.shape[1], dy.device)
        self._flags[key] = self.estimators[name].update(x, dy, self._weight)

    def _elsewhere(self, name: str, device: torch.device) -> bool:
        """Was the estimator made beside a weight that is computed with on another `device` (FSDP2's CPU offload)?"""
        unused = self.updates[name] == 0 and self._calls[name] == 1
        return unused and self.estimators[name].spec.device != device

    def take(self, name: str, gradient: Tensor) -> None:
        """A whole gradient, as `GradientSink` hands it over."""
        whole = self._whole[name]
        for part, matrix in zip(whole.parts(name), whole.matrices(gradient), strict=True):
            key = self._next_call(part)
            if key is not None:
                estimator = self.estimators[part]
                assert isinstance(estimator, Dense)  # `prepare` made it
                self._flags[key] = estimator.add(matrix, self._weight)

    def prepare(self, targets: Mapping[str, nn.Module], whole: Mapping[str, WholeWeight]) -> None:
        """Make the estimators of layers whose shape and device are known before the first batch.

        State that is allocated amid the activations of a backward pass keeps their freed memory from being reused in
        one piece (measured on a 105 M Llama: 7 % of the peak).
        """
        for name, module in targets.items():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.is_meta:
                continue
            self._devices[name] = weight.device
            if type(module) is nn.Linear and weight.dim() == 2:
                self.make(name, weight.shape[0], weight.shape[1])
            elif isinstance(module, nn.Linear) and is_bitsandbytes(module):  # its weight may be packed
                self.make(name, module.out_features, module.in_features)
        self._whole = whole
        for name, stored in whole.items():
            for part in stored.parts(name):
                self.estimators[part] = self._estimator(part, *stored.shape, stored.value.device, whole=True)

    def make(self, name: str, m: int, n: int) -> None:
        """The estimator of a layer none of whose gradients was seen yet, beside its weight."""
        self.estimators[name] = self._estimator(name, m, n, self._devices.get(name, self.device))

    def _estimator(self, name: str, m: int, n: int, device: torch.device, whole: bool = False) -> Estimator:
        rank = self.wanted[name]
        if rank > min(m, n):
            raise ValueError(
                f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) has {min(m, n)} singular directions, "
                f"and rank={rank} were asked for; lower the rank or leave the layer out."
            )
        spec = LayerSpec(name, m, n, rank, seed_of(self._seed, name), device)
        return make_estimator(spec, self._config, self._micro_batches, self._many, self._ring(device), whole)

    def _ring(self, device: torch.device) -> StagingRing | None:
        """The ring through which dense buffers in host memory are summed, if they are wanted there."""
        if self._config.buffer_device != "cpu" or device.type != "cuda":
            return None
        if device not in self._rings:
            self._rings[device] = StagingRing(device, self._config.staging_bytes)
            self.staging_bytes += self._rings[device].device_bytes
        return self._rings[device]

    def absorb(self, loss_of: Callable[[], Tensor], taps: Taps, anywhere: Callable[[bool], bool]) -> None:
        """One micro-batch: forward, backward, and every target's update on the way.

        What is done `anywhere` among the ranks that compute it together, all of them do.
        """
        self._summed = set()
        loss = loss_of()
        if self._flags:
            raise ValueError("loss_fn ran backward itself; let it return the loss, and loraga runs backward.")
        if taps.saw_float16:
            self._backward_float16(loss, loss_of, taps, anywhere)
        else:
            self._backward(loss, taps)
        self._close_micro_batch()

    def next_micro_batch(self) -> None:
        """What was seen since the last call was one micro-batch; nothing was none."""
        if self._flags:
            self._close_micro_batch()

    def _close_micro_batch(self) -> None:
        finite: dict[torch.device, Tensor] = {}
        for (name, _), flag in self._flags.items():
            self.updates[name] += 1
            self.skipped[name] = self.skipped[name] + ~flag if name in self.skipped else (~flag).long()
            finite[flag.device] = finite[flag.device] & flag if flag.device in finite else flag
        self._finite.append(finite)
        self._flags.clear()
        self._calls.clear()

    def _backward(self, loss: Tensor, taps: Taps) -> None:
        self._calls.clear()
        taps.backward(loss)
        for ring in self._rings.values():  # the caller may write anew into what the layers were fed
            ring.join()

    def _backward_float16(
        self, loss: Tensor, loss_of: Callable[[], Tensor], taps: Taps, anywhere: Callable[[bool], bool]
    ) -> None:
        """Backward of a scaled loss, so that small gradients do not vanish, and again smaller where they overflow.

        What a layer has summed already in an earlier try is left out of the next. Scales are powers of two, so that
        weighting them out again is exact.
        """
        value = abs(float(loss.detach()))
        usable = math.isfinite(value)
        scale = _FLOAT16_TARGET / 2.0 ** round(math.log2(value)) if usable and value > 0 else _FLOAT16_TARGET
        for attempt in range(_FLOAT16_TRIES):
            if attempt:
                loss = loss_of()
            if self.loss_scale is None:
                self.loss_scale = scale
            self._weight = self.loss_scale / scale
            self._backward(loss.float() * scale, taps)
            self._summed.update(key for key, flag in self._flags.items() if flag)
            if not anywhere(usable and len(self._summed) < len(self._flags)):
                break
            scale *= _FLOAT16_BACKOFF

    @property
    def micro_batches(self) -> int:
        """How many there were."""
        return len(self._finite)

    def skipped_batches(self) -> int:
        """Micro-batches in which some layer met NaN or Inf."""
        return sum(not all(bool(flag) for flag in flags.values()) for flags in self._finite)


def make_estimator(
    spec: LayerSpec,
    config: InitConfig,
    micro_batches: int | None,
    many: bool = False,
    ring: StagingRing | None = None,
    whole: bool = False,
) -> Estimator:
    """What follows the gradient of one layer, by what was asked for and what pays.

    `many`: too many micro-batches may come for a bfloat16 buffer. `whole`: autograd forms the gradient, which a dense
    buffer sums. `ring`: dense buffers that were asked for lie in host memory.
    """
    if config.estimator == "streaming" and not whole:
        return Streaming(spec, micro_batches) if Streaming.pays(spec) else Dense(spec)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.buffer_dtype)
    if dtype is None:
        dtype = torch.float32 if many or config.estimator == "streaming" else torch.bfloat16
    return Dense(spec, dtype, ring)


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn | None, index: int) -> Tensor:
    """The scalar loss of one micro-batch, with a graph."""
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        source = "loss_fn"
    elif isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        source = "the model's output.loss"
        if loss is None:
            raise ValueError(
                f"Micro-batch {index}: the model's output has no loss. Put labels into the batch (it has "
                f"{', '.join(map(str, batch))}), or give loss_fn(model, batch)."
            )
    else:
        raise TypeError(
            f"Micro-batch {index} is a {type(batch).__name__}, not a mapping that model(**batch) could take; give "
            "loss_fn(model, batch), which returns the loss."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"Micro-batch {index}: {source} is {got}; the loss must be one number (take its mean or sum).")
    if not loss.requires_grad:
        raise ValueError(
            f"Micro-batch {index}: {source} does not depend on any target layer (it needs no gradient). Was it "
            "detached or computed under no_grad, or are the target layers not part of the forward pass?"
        )
    return loss.reshape(())


def _count(loader: Iterable[Any], max_batches: int | None) -> int | None:
    """How many micro-batches will come, where that can be known."""
    try:
        length = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset has __len__, and it raises
        length = None
    return length if max_batches is None else max_batches if length is None else min(length, max_batches)


def _input_device(model: nn.Module) -> torch.device:
    """Where the batch goes: the first parameter that has storage (of an embedding, in language models)."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def _move(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in nested mappings, lists and tuples on `device`; anything else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):  # of the same kind, for a loss_fn that reads attributes
        moved = copy.copy(batch)
        for key, value in batch.items():
            moved[key] = _move(value, device)
        return moved
    if isinstance(batch, PackedSequence):
        return batch.to(device)  # type: ignore[arg-type]  # its annotation knows dtypes only
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_move(value, device) for value in batch)
    return batch
