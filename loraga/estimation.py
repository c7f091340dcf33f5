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

from loraga.config import InitConfig
from loraga.estimators import Dense, Estimate, Estimator, LayerSpec, StagingRing, Streaming, finish
from loraga.linalg import seed_of
from loraga.quiet import kept, quiet
from loraga.sink import GradientSink, WholeWeight, own_weights
from loraga.taps import Taps

LossFn = Callable[[nn.Module, Any], Tensor]

# bfloat16 buffers round once per micro-batch; beyond this many their rounding stagnates (design §4.3)
_BFLOAT16_LIMIT = 256
# float16 gradients: the loss is scaled to about this before backward, and by this much less after an overflow
_FLOAT16_TARGET, _FLOAT16_BACKOFF, _FLOAT16_TRIES = 2.0**15, 2.0**-4, 6


@dataclass
class Estimation:
    """Estimates by layer name, and how they came about.

    `updates` counts the calls of a layer that brought a gradient, `skipped` those left out for NaN or Inf.
    """

    estimates: dict[str, Estimate]
    updates: dict[str, int]
    skipped: dict[str, int]
    called: set[str]
    micro_batches: int
    skipped_batches: int
    state_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)


def estimate(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    loader: Iterable[Any],
    config: InitConfig,
    *,
    loss_fn: LossFn | None,
    max_batches: int | None,
    seed: int,
    show_progress_bar: bool,
    whole: Mapping[str, WholeWeight] | None = None,
) -> Estimation:
    """Factors of the mean gradient of every target, `ranks[name]` triplets each. `model` is left as it was.

    `targets` are linear layers, whose gradient is a product that a tap sees. Gradients of the weights in `whole` are
    formed by autograd and summed in dense buffers, also with `config.estimator="streaming"` (float32 then). A stack of
    experts has estimates by the names of its `WholeWeight.parts`.

    Raises:
        ValueError: no batch came, a batch has no usable loss, no target saw a gradient, or every batch had NaN or Inf.
        TypeError: a batch is no mapping and there is no `loss_fn`.
    """
    total = _count(loader, max_batches)
    whole = whole or {}
    collector = _Collector(ranks, config, total, seed)
    device = _input_device(model)
    started = time.perf_counter()
    with (
        collector,
        quiet(model),
        own_weights(whole) as weights,
        GradientSink(weights, collector.take),
        Taps(targets, collector.sink, whole) as taps,
    ):
        collector.prepare(targets, whole)
        bar = tqdm(total=total, desc="loraga: gradients", unit="batch", disable=not show_progress_bar)
        with bar:
            for index, batch in enumerate(itertools.islice(loader, max_batches)):
                batch = _move(batch, device)
                collector.absorb(partial(_loss, model, batch, loss_fn, index), taps)
                bar.update()
    if collector.micro_batches == 0:
        raise ValueError("The loader gave no batch; loraga needs at least one to see a gradient.")
    called = taps.called.union(*(weight.parts(name) for name, weight in whole.items() if name in taps.called))
    return _conclude(collector, ranks, called, started, show_progress_bar)


def estimate_step(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    step: Callable[[], Any],
    config: InitConfig,
    *,
    seed: int,
) -> Estimation:
    """As `estimate`, of a callback that runs forward and backward itself, as often as it likes.

    Every backward call is one micro-batch. `step` finds the model as `quiet` leaves it (no dropout, nothing to train,
    so backward computes no weight gradient) and no gradient at any parameter; it may change modes and clear or clip
    gradients. All of that is put back. float16 losses go backward as `step` scales them.

    Raises:
        ValueError: `step` ran no backward that reached a target, or all of them had NaN or Inf.
    """
    collector = _Collector(ranks, config, None, seed)
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
    return _conclude(collector, ranks, taps.called, started, show_progress_bar=False)


def _conclude(
    collector: _Collector, ranks: Mapping[str, int], called: set[str], started: float, show_progress_bar: bool
) -> Estimation:
    """Factors of what was collected since `started`."""
    batches = collector.micro_batches
    estimators = {name: collector.estimators[name] for name in ranks if name in collector.updates}
    if not estimators:
        raise ValueError(
            f"None of the {len(ranks)} target layers saw a gradient: "
            + ("none was called by the forward pass." if not called else "the loss does not depend on them.")
            + " Check target_modules and the loss."
        )
    skipped_batches = collector.skipped_batches()
    if skipped_batches == batches and not collector.any_kept():
        raise ValueError(
            f"All {batches} micro-batches gave NaN or Inf gradients, so there is nothing to start from; check the "
            "loss, the data and the dtype (float16 overflows easily, bfloat16 does not)."
        )
    state_bytes = sum(e.state_bytes for e in collector.estimators.values()) + collector.staging_bytes
    updates = collector.updates
    skipped = {name: int(count) for name, count in collector.skipped.items()}
    observed = time.perf_counter()
    # each micro-batch weighs the same, left out ones nothing
    summed = {name: batches * (1 - skipped[name] / updates[name]) for name in estimators}
    divisors = {name: max(count, 1.0) * (collector.loss_scale or 1.0) for name, count in summed.items()}
    bar = tqdm(total=len(estimators), desc="loraga: factors", unit="layer", disable=not show_progress_bar)
    with bar:
        estimates = finish(estimators, divisors, bar.update)
    return Estimation(
        estimates,
        dict(updates),
        skipped,
        called,
        batches,
        skipped_batches,
        state_bytes,
        {"gradients": observed - started, "factors": time.perf_counter() - observed},
    )


class _Collector:
    """The estimators and the record of what was finite."""

    def __init__(self, ranks: Mapping[str, int], config: InitConfig, micro_batches: int | None, seed: int) -> None:
        self.estimators: dict[str, Estimator] = {}
        self.updates: Counter[str] = Counter()
        self.skipped: dict[str, Tensor] = {}
        self.loss_scale: float | None = None  # that the sums carry; None as long as no float16 was seen
        self._ranks, self._config, self._micro_batches, self._seed = ranks, config, micro_batches, seed
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
        if name not in self.estimators:
            self.estimators[name] = self._make(name, dy.shape[1], x.shape[1], dy.device)
        self._flags[key] = self.estimators[name].update(x, dy, self._weight)

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
            if type(module) is nn.Linear and isinstance(weight, Tensor) and weight.dim() == 2 and not weight.is_meta:
                self.estimators[name] = self._make(name, weight.shape[0], weight.shape[1], weight.device)
        self._whole = whole
        for name, weight in whole.items():
            for part in weight.parts(name):
                self.estimators[part] = self._make(part, *weight.shape, weight.value.device, whole=True)

    def _make(self, name: str, m: int, n: int, device: torch.device, whole: bool = False) -> Estimator:
        rank = self._ranks[name]
        if rank > min(m, n):
            raise ValueError(
                f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) has {min(m, n)} singular directions, "
                f"and rank={rank} were asked for; lower the rank or leave the layer out."
            )
        spec = LayerSpec(name, m, n, rank, seed_of(self._seed, name), device)
        if self._config.estimator == "streaming" and not whole:
            return Streaming(spec, self._micro_batches) if Streaming.pays(spec) else Dense(spec)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(self._config.buffer_dtype)
        if dtype is None:
            few = self._micro_batches is not None and self._micro_batches <= _BFLOAT16_LIMIT
            dtype = torch.bfloat16 if few and self._config.estimator == "dense" else torch.float32
        return Dense(spec, dtype, self._ring(device))

    def _ring(self, device: torch.device) -> StagingRing | None:
        if self._config.buffer_device != "cpu" or device.type != "cuda":
            return None
        if device not in self._rings:
            self._rings[device] = StagingRing(device, self._config.staging_bytes)
            self.staging_bytes += self._rings[device].device_bytes
        return self._rings[device]

    def absorb(self, loss_of: Callable[[], Tensor], taps: Taps) -> None:
        """One micro-batch: forward, backward, and every target's update on the way."""
        self._summed = set()
        loss = loss_of()
        if self._flags:
            raise ValueError("loss_fn ran backward itself; let it return the loss, and loraga runs backward.")
        if taps.saw_float16:
            self._backward_float16(loss, loss_of, taps)
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

    def _backward_float16(self, loss: Tensor, loss_of: Callable[[], Tensor], taps: Taps) -> None:
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
            if len(self._summed) == len(self._flags) or not usable:
                break
            scale *= _FLOAT16_BACKOFF

    @property
    def micro_batches(self) -> int:
        """How many there were."""
        return len(self._finite)

    def skipped_batches(self) -> int:
        """Micro-batches in which some layer met NaN or Inf."""
        return sum(not all(bool(flag) for flag in flags.values()) for flags in self._finite)

    def any_kept(self) -> bool:
        """Did any layer sum anything?"""
        return any(int(count) < self.updates[name] for name, count in self.skipped.items())


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
