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
from loraga.estimators import Dense, Estimate, Estimator, LayerSpec, Streaming, finish
from loraga.linalg import seed_of
from loraga.quiet import quiet
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
) -> Estimation:
    """Factors of the mean gradient of every target, `ranks[name]` triplets each. `model` is left as it was.

    Raises:
        ValueError: no batch came, a batch has no usable loss, no target saw a gradient, or every batch had NaN or Inf.
        TypeError: a batch is no mapping and there is no `loss_fn`.
    """
    total = _count(loader, max_batches)
    collector = _Collector(ranks, config, total, seed)
    collector.prepare(targets)
    device = _input_device(model)
    started = time.perf_counter()
    batches = 0
    with quiet(model), Taps(targets, collector.sink) as taps:
        bar = tqdm(total=total, desc="loraga: gradients", unit="batch", disable=not show_progress_bar)
        with bar:
            for index, batch in enumerate(itertools.islice(loader, max_batches)):
                batch = _move(batch, device)
                collector.absorb(partial(_loss, model, batch, loss_fn, index), taps)
                batches += 1
                bar.update()
    if batches == 0:
        raise ValueError("The loader gave no batch; loraga needs at least one to see a gradient.")
    estimators = {name: collector.estimators[name] for name in targets if name in collector.updates}
    if not estimators:
        raise ValueError(
            f"None of the {len(targets)} target layers saw a gradient: "
            + ("none was called by the forward pass." if not taps.called else "the loss does not depend on them.")
            + " Check target_modules and loss_fn."
        )
    skipped_batches = collector.skipped_batches()
    if skipped_batches == batches and not collector.any_kept():
        raise ValueError(
            f"All {batches} micro-batches gave NaN or Inf gradients, so there is nothing to start from; check the "
            "loss, the data and the dtype (float16 overflows easily, bfloat16 does not)."
        )
    state_bytes = sum(e.state_bytes for e in collector.estimators.values())
    updates = collector.updates
    skipped = {name: int(count) for name, count in collector.skipped.items()}
    observed = time.perf_counter()
    # each micro-batch weighs the same, left out ones nothing
    kept = {name: batches * (1 - skipped[name] / updates[name]) for name in estimators}
    divisors = {name: max(count, 1.0) * (collector.loss_scale or 1.0) for name, count in kept.items()}
    bar = tqdm(total=len(estimators), desc="loraga: factors", unit="layer", disable=not show_progress_bar)
    with bar:
        estimates = finish(estimators, divisors, bar.update)
    return Estimation(
        estimates,
        dict(updates),
        skipped,
        taps.called,
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

    def sink(self, name: str, x: Tensor, dy: Tensor) -> None:
        key = (name, self._calls[name])
        self._calls[name] += 1
        if key in self._summed:
            return
        if name not in self.estimators:
            self.estimators[name] = self._make(name, dy.shape[1], x.shape[1], dy.device)
        self._flags[key] = self.estimators[name].update(x, dy, self._weight)

    def prepare(self, targets: Mapping[str, nn.Module]) -> None:
        """Make the estimators of layers whose shape and device are known before the first batch.

        State that is allocated amid the activations of a backward pass keeps their freed memory from being reused in
        one piece (measured on a 105 M Llama: 7 % of the peak).
        """
        for name, module in targets.items():
            weight = getattr(module, "weight", None)
            if type(module) is nn.Linear and isinstance(weight, Tensor) and weight.dim() == 2 and not weight.is_meta:
                self.estimators[name] = self._make(name, weight.shape[0], weight.shape[1], weight.device)

    def _make(self, name: str, m: int, n: int, device: torch.device) -> Estimator:
        rank = self._ranks[name]
        if rank > min(m, n):
            raise ValueError(
                f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) has {min(m, n)} singular directions, "
                f"and rank={rank} were asked for; lower the rank or leave the layer out."
            )
        spec = LayerSpec(name, m, n, rank, seed_of(self._seed, name), device)
        return make_estimator(spec, self._config, self._micro_batches)

    def absorb(self, loss_of: Callable[[], Tensor], taps: Taps) -> None:
        """One micro-batch: forward, backward, and every target's update on the way."""
        self._flags, self._summed = {}, set()
        loss = loss_of()
        if self._flags:
            raise ValueError("loss_fn ran backward itself; let it return the loss, and loraga runs backward.")
        if taps.saw_float16:
            self._backward_float16(loss, loss_of, taps)
        else:
            self._backward(loss, taps)
        finite: dict[torch.device, Tensor] = {}
        for (name, _), flag in self._flags.items():
            self.updates[name] += 1
            self.skipped[name] = self.skipped[name] + ~flag if name in self.skipped else (~flag).long()
            finite[flag.device] = finite[flag.device] & flag if flag.device in finite else flag
        self._finite.append(finite)

    def _backward(self, loss: Tensor, taps: Taps) -> None:
        self._calls.clear()
        taps.backward(loss)

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

    def skipped_batches(self) -> int:
        """Micro-batches in which some layer met NaN or Inf."""
        return sum(not all(bool(flag) for flag in flags.values()) for flags in self._finite)

    def any_kept(self) -> bool:
        """Did any layer sum anything?"""
        return any(int(count) < self.updates[name] for name, count in self.skipped.items())


def make_estimator(spec: LayerSpec, config: InitConfig, micro_batches: int | None) -> Estimator:
    """What follows the gradient of one layer, by what was asked for and what pays."""
    if config.estimator == "streaming":
        return Streaming(spec, micro_batches) if Streaming.pays(spec) else Dense(spec)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.buffer_dtype)
    if dtype is None:
        few = micro_batches is not None and micro_batches <= _BFLOAT16_LIMIT
        dtype = torch.bfloat16 if few else torch.float32
    return Dense(spec, dtype, host=config.buffer_device == "cpu")


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
