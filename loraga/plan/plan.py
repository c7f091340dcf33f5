"""Predicts what an initialisation needs, from shapes alone: state, flops, time at given ceilings, memory, traffic.

The computation runs on the meta device, where tensors have no numbers, and `dry_run` counts it op by op. It consists of
forward and backward of transformers' own code, the taps, the updates of the estimators and their `finish`, and for
comparison the training step of PEFT's LoRA. So there is no formula for any architecture here, and none that has to be
adapted when a model changes.

A model has long lists of equal blocks. Dry runs use three and four blocks of each list, and the rest is extrapolated.
That is exact, because every count grows by the same amount with each further block. A peak does so only if it stays at
the same place, and therefore peaks are counted by phase.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraga._messages import one_line, size_text
from loraga._version import release_of
from loraga.capture.isolation import isolated
from loraga.capture.taps import Taps
from loraga.config import InitConfig
from loraga.estimators import (
    BFLOAT16_LIMIT,
    WAITING_BYTES,
    WORKING_STATES,
    Estimator,
    LayerSpec,
    Streaming,
    finish_in_chunks,
    make_estimators,
    pair_bytes,
)
from loraga.integrations import peft as adapters
from loraga.integrations.peft import AdapterSlot
from loraga.plan.dry_run import Ceilings, Cost, DryRun
from loraga.start import starts

if TYPE_CHECKING:
    from loraga.integrations.peft import LoraConfig

# Results of a dry run by key, such as "flops" or ("peak", phase).
Found = defaultdict[Any, float]
META = torch.device("meta")
# Blocks of each list in the first dry run. The second has one more, which shows the growth per block.
_BLOCKS = 3
_MOMENTS = 2  # AdamW stores two numbers for each trained one


@dataclass(frozen=True)
class Layers:
    """Target layers of one shape and rank. Bytes and flops are sums over all `count` layers.

    Attributes:
        shape (`tuple[int, int]`): (out_features, in_features).
        count (`int`): number of layers.
        kind (`str`): the estimator, "streaming" or "dense".
        columns (`int`): columns of the sketch, 0 for "dense".
        state_bytes (`int`): state of the estimators.
        merged_bytes (`int`): what a rank sends in all-reduces.
        flops (`float`): of the updates for one micro-batch.
    """

    shape: tuple[int, int]
    count: int
    kind: str
    columns: int
    state_bytes: int
    merged_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """The arguments of `plan` and its predictions. Bytes are those of one rank.

    Attributes:
        parameters (`int`): of the model, without the adapter.
        dtype (`str`): of the model's first parameter, such as "bfloat16".
        rank (`int`): `r` of the adapter.
        rows, length, micro_batches, checkpointing, ranks, ceilings: the arguments of `plan`.
        layers (`list[Layers]`): target layers by shape and rank.
        weight_bytes, adapter_bytes (`int`): of the model with its buffers, and of the adapter.
        model_flops (`float`): of forward and backward of one micro-batch, where the base is frozen.
        update_flops (`float`): of the estimators' updates for one micro-batch.
        seconds (`dict[str, float]`): time of all micro-batches by part, empty without ceilings.
        peaks (`dict[str, float]`): peak memory in bytes, weights included, of "initialisation" and of
            "LoRA training step" (one micro-batch with AdamW). `CHECKPOINTED` at the end of a key means with gradient
            checkpointing.
        merged_bytes (`int`): what a rank sends in all-reduces.
        broadcast_bytes (`int`): factors that rank 0 sends.
    """

    parameters: int
    dtype: str
    rank: int
    rows: int
    length: int
    micro_batches: int
    checkpointing: bool
    layers: list[Layers]
    weight_bytes: int
    adapter_bytes: int
    model_flops: float
    update_flops: float
    ceilings: Ceilings | None
    seconds: dict[str, float]
    peaks: dict[str, float]
    ranks: int
    merged_bytes: int
    broadcast_bytes: int

    @property
    def state_bytes(self) -> int:
        """State of all estimators."""
        return sum(layers.state_bytes for layers in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `state_bytes` as plain values, for JSON."""
        return {**asdict(self), "state_bytes": self.state_bytes}

    def __str__(self) -> str:
        rows = [
            f"{layers.count:8d}  {f'{layers.shape[0]} x {layers.shape[1]}':15s} "
            + (f"streaming, {layers.columns} columns" if layers.columns else "dense").ljust(24)
            + f"{size_text(layers.state_bytes):>10s}"
            for layers in self.layers
        ]
        lines = [
            f"{self.parameters / 1e9:.2f} billion parameters, {size_text(self.weight_bytes)} in {self.dtype}; LoRA r "
            f"{self.rank} {size_text(self.adapter_bytes)}; {self.micro_batches} micro-batches of {self.rows} x "
            f"{self.length} tokens" + (f" on each of {self.ranks} ranks" if self.ranks > 1 else ""),
            f"{'layers':>8s}  {'out x in':15s} {'estimator':24s}{'state':>10s}",
            *rows,
            f"{sum(layers.count for layers in self.layers):8d}  {'':40s}{size_text(self.state_bytes):>10s}",
            f"work per micro-batch: model {_flops(self.model_flops)}, ours {_flops(self.update_flops)} "
            f"({self.update_flops / self.model_flops:.1%})",
        ]
        if self.ceilings is not None:
            total = sum(self.seconds.values())
            lines.append(
                f"time, a prediction at {self.ceilings.flops / 1e12:g} TFLOP/s and {self.ceilings.bytes / 1e9:g} GB/s, "
                f"which nothing exceeds: {total:.3g} s ("
                + ", ".join(f"{part} {seconds:.3g} s" for part, seconds in self.seconds.items())
                + ")"
            )
        lines.append("peak memory, a prediction    without     with gradient checkpointing")
        for what in ("initialisation", "LoRA training step"):
            without, within = (self.peaks.get(what + way) for way in ("", CHECKPOINTED))
            lines.append(f"  {what:24s} {size_text(without):>10s} {size_text(within):>10s}")
        if self.ranks > 1:
            lines.append(
                f"merging {self.ranks} ranks: {size_text(self.merged_bytes)} per rank in all-reduces, and "
                f"{size_text(self.broadcast_bytes)} of factors from the first rank"
            )
        return "\n".join(lines)


CHECKPOINTED = ", checkpointed"
# In older versions of torch, backward of attention with fewer heads of keys has wrong shapes on the meta device. Older
# versions of transformers use an autocast that does not exist for that device.
_LEAST = {"torch": (2, 9), "transformers": (5, 0)}


def plan(
    model: nn.Module,
    lora_config: LoraConfig,
    *,
    rows: int,
    length: int,
    micro_batches: int,
    ranks: int = 1,
    checkpointing: bool = False,
    init: InitConfig | None = None,
    ceilings: Ceilings | None = None,
) -> Plan:
    """Predict what `fast_init` needs for a language model.

    Args:
        model (`nn.Module`): a model of transformers on the meta device. The adapter is added to it.
        lora_config (`peft.LoraConfig`): for `model`.
        rows, length (`int`): a micro-batch has `rows` sequences of `length` tokens, without padding.
        micro_batches (`int`): number of micro-batches of a rank.
        ranks (`int`): number of data-parallel processes that make one adapter together.
        checkpointing (`bool`): flops and times include the forward that gradient checkpointing repeats.
        init (`InitConfig`, *optional*): as in `fast_init`.
        ceilings (`Ceilings`, *optional*): of the device. Without them no times are predicted.

    Raises:
        ValueError: there is no target layer, the rank is too large for one, the computation of the model depends on
            values, or torch or transformers is too old.
    """
    check_versions()
    init = init or InitConfig()
    weights = [*model.parameters(), *model.buffers()]
    weight_bytes, parameters = _bytes(weights), sum(p.numel() for p in model.parameters())
    with META:
        peft_model = adapters.inject(model, lora_config, "default")
    slots, _ = adapters.find_slots(peft_model, "default")
    adapter_bytes = _bytes(p for p in peft_model.parameters() if p.requires_grad)
    ids = torch.zeros(rows, length, dtype=torch.long, device=META)
    trial = _Trial(peft_model, {"input_ids": ids, "labels": ids}, init, micro_batches, ceilings)
    seen = {way: trial.gradients(bool(way)) for way in ("", CHECKPOINTED)}
    finishing = trial.finishing(slots)
    layers = _layers(slots, trial.estimators(slots), seen[""])
    base = weight_bytes + adapter_bytes
    peaks = {}
    for way, found in seen.items():
        peaks["initialisation" + way] = base + max(trial.peak(found, bool(way)), finishing.extra)
        peaks["LoRA training step" + way] = base + _MOMENTS * adapter_bytes + _peak(trial.training(bool(way)))
    work = seen[CHECKPOINTED if checkpointing else ""]
    return Plan(
        parameters=parameters,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        rank=lora_config.r,
        rows=rows,
        length=length,
        micro_batches=micro_batches,
        checkpointing=checkpointing,
        layers=layers,
        weight_bytes=weight_bytes,
        adapter_bytes=adapter_bytes,
        model_flops=work["flops"],
        update_flops=sum(group.flops for group in layers),
        ceilings=ceilings,
        seconds=_seconds(work, micro_batches, finishing) if ceilings is not None else {},
        peaks=peaks,
        ranks=ranks,
        merged_bytes=sum(group.merged_bytes for group in layers) if ranks > 1 else 0,
        broadcast_bytes=sum(_factor_bytes(slot, init) for slot in slots) if ranks > 1 else 0,
    )


def _seconds(work: Mapping[Any, float], micro_batches: int, finishing: Cost) -> dict[str, float]:
    """Time of an initialisation by part; `work` is what `_Trial.gradients` found for one micro-batch."""
    return {
        "forward and backward": micro_batches * work["seconds"],
        "sketches": work["first", "seconds"] + (micro_batches - 1) * work["later", "seconds"],
        "factors": finishing.seconds,
    }


class _Trial:
    """Dry runs of one model with its adapter on one batch."""

    def __init__(
        self,
        peft_model: Any,
        batch: Mapping[str, Tensor],
        init: InitConfig,
        micro_batches: int,
        ceilings: Ceilings | None,
    ) -> None:
        self._peft_model, self._batch, self._init = peft_model, batch, init
        self._micro_batches, self._ceilings = micro_batches, ceilings
        self._updates: dict[Hashable, tuple[Cost, Cost]] = {}

    def estimators(self, slots: Sequence[AdapterSlot]) -> dict[str, Estimator]:
        """New estimators of the layers by name, on the meta device."""
        specs = [LayerSpec(s.name, *s.shape, starts.triplets(self._init, s.rank, s.shape), 0, META) for s in slots]
        many = self._micro_batches > BFLOAT16_LIMIT
        made = make_estimators(specs, self._init, self._micro_batches, many=many)
        return {spec.name: estimator for spec, estimator in zip(specs, made, strict=True)}

    def estimator(self, slot: AdapterSlot) -> Estimator:
        """A new estimator of the layer, on the meta device."""
        return self.estimators([slot])[slot.name]

    def gradients(self, checkpointing: bool) -> Found:
        """Forward, backward and updates of one micro-batch: the keys of `_extrapolated`, and those of the updates.

        "flops" and "seconds" do not include the updates. Theirs are ("first", "seconds") for the first micro-batch,
        ("later", "seconds") for any other, and the flops ("later", shape) of all layers of one shape. "waiting" are the
        bytes of all pairs (x, dy), and ("working", shape) those that an update of all layers of one shape takes.
        """
        return self._extrapolated(self._gradients, checkpointing)

    def peak(self, found: Found, checkpointing: bool) -> float:
        """Peak memory of forward, backward and updates. `found` is what `gradients` found, where all pairs wait."""
        working = [size for key, size in found.items() if isinstance(key, tuple) and key[0] == "working"]
        if found["waiting"] + max(working, default=0) <= WAITING_BYTES:
            return _peak(found)
        alone = self._extrapolated(partial(self._gradients, waiting=False), checkpointing)
        return min(_peak(found), _peak(alone) + WAITING_BYTES)

    def training(self, checkpointing: bool) -> Found:
        """Forward and backward of a LoRA training step."""
        return self._extrapolated(self._training, checkpointing)

    def finishing(self, slots: list[AdapterSlot]) -> Cost:
        """Cost of computing the factors from the estimators' state; `extra` includes the state."""
        estimators = self.estimators(slots)
        run = DryRun(self._ceilings)
        with run, run.aside() as cost:
            run.include(tensor for estimator in estimators.values() for tensor in estimator.state)
            factors: dict[str, Any] = {}
            for chunk, _ in finish_in_chunks(estimators, dict.fromkeys(estimators, 1.0)):
                factors |= chunk
        return cost

    def _gradients(self, run: DryRun, waiting: bool = True) -> Found:
        slots = {slot.name: slot for slot in adapters.find_slots(self._peft_model, "default")[0]}
        found: Found = defaultdict(float)
        held: dict[int, Tensor] = {}  # x by storage, which layers share
        copies: list[int] = []  # bytes of dy

        def on_pair(name: str, x: Tensor, dy: Tensor) -> None:
            first, later = self._update(run, slots[name], x, dy)
            run.count_temporary(max(first.extra, later.extra))
            found["first", "seconds"] += first.seconds
            found["later", "seconds"] += later.seconds
            found["later", slots[name].shape] += later.flops
            estimator = estimators[name]
            if isinstance(estimator, Streaming):
                key = ("working", slots[name].shape)
                found[key] += WORKING_STATES * estimator.state_bytes
                if waiting:
                    found["waiting"] += pair_bytes(None if x.untyped_storage()._cdata in held else x, dy)
                    held[x.untyped_storage()._cdata] = x  # which counts as long as it exists
                    copies.append(pair_bytes(None, dy))
                    run.live += copies[-1]
                    run.count_temporary(int(found[key]))

        base = self._peft_model.base_model.model
        estimators = self.estimators(list(slots.values()))
        states = [estimator.state_bytes for estimator in estimators.values()]
        taps = Taps({name: slot.base_layer for name, slot in slots.items()}, on_pair)
        with adapters.adapters_disabled(self._peft_model), isolated(base), taps, run:
            run.live += sum(states)
            taps.backward(base(**self._batch).loss)
            run.live -= sum(copies)
            held.clear()
        return found

    def _update(self, run: DryRun, slot: AdapterSlot, x: Tensor, dy: Tensor) -> tuple[Cost, Cost]:
        """Costs of an estimator's first update and of a later one. Layers with equal estimators share the result."""
        key = self.estimator(slot).finish_key, x.shape, dy.shape, x.dtype
        if key not in self._updates:
            with run.aside():
                estimator = self.estimator(slot)
                with run.aside() as first:
                    estimator.update(x, dy)
                with run.aside() as later:
                    estimator.update(x, dy)
            self._updates[key] = first, later
        return self._updates[key]

    def _training(self, run: DryRun) -> Found:
        self._peft_model.train()
        with run:
            self._peft_model(**self._batch).loss.backward()
        self._peft_model.zero_grad()
        return defaultdict(float)

    def _extrapolated(self, computation: Callable[[DryRun], Found], checkpointing: bool) -> Found:
        """Results of `computation` for the model with all blocks, from dry runs with `_BLOCKS` blocks and one more.

        Keys are those that `computation` returns, "flops", "seconds", and ("peak", phase) in bytes.
        """
        stacks = _stacks(self._peft_model)
        short = dict.fromkeys(stacks, _BLOCKS)
        base = self._run(computation, short, checkpointing)
        total = base.copy()
        for name, blocks in stacks.items():
            longer = self._run(computation, {**short, name: _BLOCKS + 1}, checkpointing)
            for key, value in longer.items():
                total[key] += (len(blocks) - _BLOCKS) * (value - base[key])
        return total

    def _run(self, computation: Callable[[DryRun], Found], depths: Mapping[str, int], checkpointing: bool) -> Found:
        """One dry run, with the first `depths[name]` blocks of each list."""
        run = DryRun(self._ceilings)
        run.leave_out([*self._peft_model.parameters(), *self._peft_model.buffers()])
        with ExitStack() as undo:
            if checkpointing:
                undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", FutureWarning)  # transformers 6 renames the method
                model = self._peft_model.base_model.model
                model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": run.checkpoint_contexts})
                undo.callback(model.gradient_checkpointing_disable)
            for name, depth in depths.items():
                undo.enter_context(_shortened(self._peft_model, name, depth, run))
            try:
                found = computation(run)
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(
                    f"{type(self._peft_model.base_model.model).__name__} cannot be planned: its work depends on the "
                    f"values of its input ({one_line(error)})"
                ) from error
        found["flops"], found["seconds"] = run.flops, run.seconds
        found.update({("peak", phase): peak for phase, peak in run.peaks.items()})
        return found


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of more than `_BLOCKS` equal blocks, by name. The first block may differ: T5's has the position bias."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= _BLOCKS or name.startswith(tuple(found)):
            continue
        if len({_signature(block) for block in list(module)[1:]}) == 1:
            found[name] = module
    return found


def _signature(block: nn.Module) -> Hashable:
    """Equal for blocks with the same modules and parameters."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())


@contextmanager
def _shortened(model: nn.Module, name: str, depth: int, run: DryRun) -> Iterator[None]:
    """Context in which the list `name` has only its first `depth` blocks.

    A phase of `run` starts when backward reaches the first block. The peak of a backward pass through equal blocks is
    at the first or at the last block, and with more blocks it may move from one to the other. With two phases both are
    counted separately.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    blocks: Any = getattr(parent, key)

    def mark(_module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda _: run.phase(name))

    setattr(parent, key, nn.ModuleList(list(blocks)[:depth]))
    handle = blocks[0].register_forward_hook(mark)
    try:
        yield
    finally:
        handle.remove()
        setattr(parent, key, blocks)


def _layers(slots: list[AdapterSlot], estimators: Mapping[str, Estimator], seen: Mapping[Any, float]) -> list[Layers]:
    """Group the slots by shape and rank; `seen` is what `_Trial.gradients` found."""
    groups: defaultdict[tuple[tuple[int, int], int], list[AdapterSlot]] = defaultdict(list)
    for slot in slots:
        groups[slot.shape, slot.rank].append(slot)
    result = []
    for (shape, _), group in groups.items():
        of_group = [estimators[slot.name] for slot in group]
        one = of_group[0]
        of_shape = sum(slot.shape == shape for slot in slots)
        result.append(
            Layers(
                shape=shape,
                count=len(group),
                kind="streaming" if isinstance(one, Streaming) else "dense",
                columns=one.columns if isinstance(one, Streaming) else 0,
                state_bytes=sum(e.state_bytes for e in of_group),
                merged_bytes=sum(e.merged_bytes for e in of_group),
                flops=seen["later", shape] * len(group) / of_shape,
            )
        )
    return result


def _peak(seen: Mapping[Any, float]) -> float:
    """The largest peak of all phases."""
    return max(value for key, value in seen.items() if isinstance(key, tuple) and key[0] == "peak")


def _factor_bytes(slot: AdapterSlot, init: InitConfig) -> int:
    """Bytes of one layer's U, S, Vh in float32 and its energy in float64."""
    return 4 * starts.triplets(init, slot.rank, slot.shape) * (sum(slot.shape) + 1) + 8


def check_versions() -> None:
    """Raise `ValueError` if torch or transformers is too old for a dry run."""
    for library, least in _LEAST.items():
        found = version(library)
        if release_of(found) < least:
            raise ValueError(
                f"A plan needs {library} {'.'.join(map(str, least))} or newer, and this is {found}: upgrade it, or "
                "plan elsewhere (no weights are needed). Initialising works with older ones."
            )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops(count: float) -> str:
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e11 else f"{count / 1e9:.3g} GFLOP"
