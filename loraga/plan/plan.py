"""What an initialisation will need, from shapes alone: state, flops, time at given ceilings, memory, traffic.

The computation itself is run on the meta device, where tensors have no numbers, and counted op by op (`dry_run`):
forward and backward of transformers' own code, the taps, the estimators' updates and their finish, and beside it the
training step of PEFT's LoRA. So there is no formula here for any architecture, and none that would have to follow a
change. Of a long run of equal blocks three and four are run, and the rest is extrapolated, which is exact: whatever is
counted grows by the same amount with each further block, as long as peaks are told apart by where they occur.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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
    Estimator,
    LayerSpec,
    Streaming,
    finish_in_chunks,
    make_estimator,
)
from loraga.integrations import peft as adapters
from loraga.integrations.peft import AdapterSlot
from loraga.plan.dry_run import Ceilings, Cost, DryRun
from loraga.start import starts

if TYPE_CHECKING:
    from loraga.integrations.peft import LoraConfig

# numbers by what they count
Found = defaultdict[Any, float]
META = torch.device("meta")
# blocks of a run that are looked at; with one more the growth per block is known
_BLOCKS = 3
_MOMENTS = 2  # of AdamW, for each trained number


@dataclass(frozen=True)
class Layers:
    """Target layers of one shape (out_features, in_features); the numbers are those of all `count` together.

    `columns` of the sketch (0: the gradient itself is summed), `flops` of taking in a micro-batch, `merged_bytes` that
    a rank puts into all-reduces.
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
    """What was asked, and what is predicted for it. Bytes are those of one rank.

    `model_flops` are those of forward and backward of one micro-batch, with the frozen base, `update_flops` ours.
    `seconds` for all micro-batches by part, empty without ceilings. `peaks` of the initialisation, and of a step of
    LoRA training with AdamW on one micro-batch, both with and without gradient checkpointing; weights included.
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
        return sum(layers.state_bytes for layers in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
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
            whole = sum(self.seconds.values())
            lines.append(
                f"time, a prediction at {self.ceilings.flops / 1e12:g} TFLOP/s and {self.ceilings.bytes / 1e9:g} GB/s, "
                f"which nothing exceeds: {whole:.3g} s ("
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
# Before these, backward of attention with fewer heads of keys has wrong shapes on the meta device, and models enter an
# autocast that does not exist there.
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
        model (`nn.Module`): of transformers, on the meta device. It gets the adapter.
        lora_config (`peft.LoraConfig`): for `model`.
        rows, length (`int`): of a micro-batch: `rows` sequences of `length` tokens, nothing padded.
        micro_batches (`int`): of a rank.
        ranks (`int`): data-parallel processes that make one adapter together.
        checkpointing (`bool`): count the work that gradient checkpointing repeats.
        init (`InitConfig`, *optional*): as in `fast_init`.
        ceilings (`Ceilings`, *optional*): of the device, for times.

    Raises:
        ValueError: no target layer, a rank too large for one of them, a model whose work depends on values, or a torch
            or transformers that is too old.
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
    estimators = {slot.name: trial.estimator(slot) for slot in slots}
    layers = _layers(slots, estimators, seen[""])
    base = weight_bytes + adapter_bytes
    peaks = {}
    for way in seen:
        peaks["initialisation" + way] = base + max(_peak(seen[way]), finishing.extra)
        moments = _MOMENTS * adapter_bytes
        peaks["LoRA training step" + way] = base + moments + _peak(trial.training(bool(way)))
    work = seen[CHECKPOINTED if checkpointing else ""]
    seconds = {}
    if ceilings is not None:
        seconds = {
            "forward and backward": micro_batches * work["seconds"],
            "sketches": work["first", "seconds"] + (micro_batches - 1) * work["later", "seconds"],
            "factors": finishing.seconds,
        }
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
        seconds=seconds,
        peaks=peaks,
        ranks=ranks,
        merged_bytes=sum(group.merged_bytes for group in layers) if ranks > 1 else 0,
        broadcast_bytes=sum(_factor_bytes(slot, init) for slot in slots) if ranks > 1 else 0,
    )


class _Trial:
    """Dry runs of one model with its adapter, on one batch."""

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

    def estimator(self, slot: AdapterSlot) -> Estimator:
        """The layer's estimator, on the meta device."""
        spec = LayerSpec(slot.name, *slot.shape, starts.triplets(self._init, slot.rank, slot.shape), 0, META)
        return make_estimator(spec, self._init, self._micro_batches, many=self._micro_batches > BFLOAT16_LIMIT)

    def gradients(self, checkpointing: bool) -> Found:
        """Forward, backward and updates of a micro-batch: what `_extrapolated` says, updates apart.

        `("first" or "later", "seconds")` are those of updates, `("later", shape)` their flops.
        """
        return self._extrapolated(self._gradients, checkpointing)

    def training(self, checkpointing: bool) -> Found:
        """Forward and backward of a LoRA training step."""
        return self._extrapolated(self._training, checkpointing)

    def finishing(self, slots: list[AdapterSlot]) -> Cost:
        """From state to factors, the state included."""
        estimators = {slot.name: self.estimator(slot) for slot in slots}
        run = DryRun(self._ceilings)
        with run, run.aside() as cost:
            run.take_in(tensor for estimator in estimators.values() for tensor in estimator.state)
            factors: dict[str, Any] = {}
            for chunk, _ in finish_in_chunks(estimators, dict.fromkeys(estimators, 1.0)):
                factors |= chunk
        return cost

    def _gradients(self, run: DryRun) -> Found:
        slots = {slot.name: slot for slot in adapters.find_slots(self._peft_model, "default")[0]}
        found: Found = defaultdict(float)

        def on_pair(name: str, x: Tensor, dy: Tensor) -> None:
            first, later = self._update(run, slots[name], x, dy)
            run.touch(max(first.extra, later.extra))
            found["first", "seconds"] += first.seconds
            found["later", "seconds"] += later.seconds
            found["later", slots[name].shape] += later.flops

        base = self._peft_model.base_model.model
        states = [self.estimator(slot).state_bytes for slot in slots.values()]
        taps = Taps({name: slot.base_layer for name, slot in slots.items()}, on_pair)
        with adapters.adapters_disabled(self._peft_model), isolated(base), taps, run:
            run.live += sum(states)
            taps.backward(base(**self._batch).loss)
        return found

    def _update(self, run: DryRun, slot: AdapterSlot, x: Tensor, dy: Tensor) -> tuple[Cost, Cost]:
        """Of a first and of a later micro-batch."""
        key = self.estimator(slot).kind, x.shape, dy.shape, x.dtype
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
        """`computation` on the whole model: its own numbers, "flops", "seconds" and ("peak", phase) in bytes."""
        stacks = _stacks(self._peft_model)
        short = dict.fromkeys(stacks, _BLOCKS)
        base = self._run(computation, short, checkpointing)
        whole = base.copy()
        for name, blocks in stacks.items():
            longer = self._run(computation, {**short, name: _BLOCKS + 1}, checkpointing)
            for key, value in longer.items():
                whole[key] += (len(blocks) - _BLOCKS) * (value - base[key])
        return whole

    def _run(self, computation: Callable[[DryRun], Found], depths: Mapping[str, int], checkpointing: bool) -> Found:
        run = DryRun(self._ceilings)
        run.leave_out([*self._peft_model.parameters(), *self._peft_model.buffers()])
        with ExitStack() as undo:
            if checkpointing:
                undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", FutureWarning)  # transformers 6 has another name for it
                model = self._peft_model.base_model.model
                model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": run.again})
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
    """Lists of more than a few equal blocks, by name. The first may differ: T5's keeps the position bias."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= _BLOCKS or name.startswith(tuple(found)):
            continue
        if len({_signature(block) for block in list(module)[1:]}) == 1:
            found[name] = module
    return found


def _signature(block: nn.Module) -> Hashable:
    kinds = tuple((name, type(module)) for name, module in block.named_modules())
    return kinds, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())


@contextmanager
def _shortened(model: nn.Module, name: str, depth: int, run: DryRun) -> Iterator[None]:
    """The list `name` with its first `depth` blocks; a phase of `run` begins where backward comes to the first block.

    The highest peak of a backward pass through equal blocks is at one of its ends, and with more blocks it may change
    from one to the other, so the ends are told apart.
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
    return max(value for key, value in seen.items() if isinstance(key, tuple) and key[0] == "peak")


def _factor_bytes(slot: AdapterSlot, init: InitConfig) -> int:
    """U, S, Vh in float32 and the energy in float64 of one layer."""
    return 4 * starts.triplets(init, slot.rank, slot.shape) * (sum(slot.shape) + 1) + 8


def check_versions() -> None:
    """Raises `ValueError` where torch or transformers is too old for a dry run."""
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
