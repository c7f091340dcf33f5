"""The estimators of one process, and the updates that they get."""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loraga.capture.outcomes import Label, Outcomes
from loraga.capture.taps import Taps
from loraga.capture.weight_gradients import WeightGradient
from loraga.config import InitConfig
from loraga.estimators import Dense, Estimator, LayerSpec, Outcome, Pending, StagingRing, Streaming, make_estimators
from loraga.integrations.bitsandbytes import is_bitsandbytes
from loraga.linalg import seed_of
from loraga.linalg.precision import own_precision
from loraga.ops import reference

# float16 gradients: the loss is scaled to about _FLOAT16_TARGET before backward. After an overflow the scale is
# multiplied by _FLOAT16_BACKOFF and backward runs again, at most _FLOAT16_TRIES times in all.
_FLOAT16_TARGET, _FLOAT16_BACKOFF, _FLOAT16_TRIES = 2.0**15, 2.0**-4, 6


class Collector:
    """The estimators of this rank. As a context manager it waits on leaving for all updates of buffers in host memory.

    Args:
        wanted (mapping of `str` to `int`): number of singular triplets by layer.
        config (`InitConfig`): estimator and buffers.
        micro_batches (`int` or `None`): of this rank, None if not known.
        many (`bool`): some rank may get more micro-batches than a bfloat16 buffer can sum (`BFLOAT16_LIMIT`).
        seed (`int`): of the sketches.
        device (`torch.device`): of the state of layers whose own device is not known.

    Attributes:
        estimators (`dict[str, Estimator]`): by layer.
        outcomes (`Outcomes`): which gradients were finite.
        loss_scale (`float` or `None`): factor that the sums include; None if no layer computed in float16.
        staging_bytes (`int`): device memory of all staging rings.
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
        self.outcomes = Outcomes()
        self.loss_scale: float | None = None
        self._config, self._micro_batches, self._many, self._seed = config, micro_batches, many, seed
        self._devices: dict[str, torch.device] = {}
        self._calls: Counter[str] = Counter()
        self._summed: set[Label] = set()
        self._weight = 1.0
        self._pending: defaultdict[torch.device, Pending] = defaultdict(Pending)
        self._backward_task = -1
        self._lock = threading.Lock()  # a backward pass has a thread for each device
        self._rings: dict[torch.device, StagingRing] = {}
        self._formed: Mapping[str, WeightGradient] = {}
        self.staging_bytes = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._pending.clear()
        for ring in self._rings.values():  # also after an error: no copy may be running when its memory is freed
            ring.close()
        reference.forget()

    def _next_call(self, name: str) -> Label | None:
        """A label for this call of a layer in this micro-batch; None if an earlier try has summed its gradient."""
        label = (name, self._calls[name])
        self._calls[name] += 1
        return None if label in self._summed else label

    def on_pair(self, name: str, x: Tensor, dy: Tensor) -> None:
        """Add dyᵀ x of x (T, n), dy (T, m) to the estimator of layer `name`; `Taps` calls this in backward.

        Sketches on a GPU are updated in groups: the pair may wait until the end of this backward call.
        """
        label = self._next_call(name)
        if label is None:
            return
        estimator = self.estimators.get(name)
        if estimator is None or self._made_on_other_device(name, dy.device):
            spec = self._spec(name, dy.shape[1], x.shape[1], dy.device)
            (estimator,) = self._made([spec])
        with own_precision(dy.device):
            if isinstance(estimator, Streaming) and _waits(dy.device):
                self._flush_at_the_end()
                with self._lock:
                    self._note(self._pending[dy.device].add(label, estimator, x, dy, self._weight))
            else:
                self.outcomes.add([label], estimator.update(x, dy, self._weight)[None])

    def _note(self, outcomes: list[Outcome]) -> None:
        for labels, finite in outcomes:
            self.outcomes.add(labels, finite)

    def _flush_at_the_end(self) -> None:
        """Let autograd call `flush` when the backward call ends that runs at the moment.

        After it the caller may overwrite its batch, which can be the input of a layer.
        """
        task = torch._C._current_graph_task_id()
        if task != self._backward_task and task >= 0:
            self._backward_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)

    def flush(self) -> None:
        """Update the estimators with all pairs that wait."""
        with self._lock, torch.no_grad():
            for device, pending in self._pending.items():
                with own_precision(device):
                    self._note(pending.flush())

    def _made_on_other_device(self, name: str, device: torch.device) -> bool:
        """Whether an unused estimator is not on `device`, where its layer computes (FSDP2 with CPU offload)."""
        unused = self.outcomes.updates[name] == 0 and self._calls[name] == 1
        return unused and self.estimators[name].spec.device != device

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """Add a gradient that autograd formed for layer `name`; `WeightGradientHooks` calls this."""
        weight = self._formed[name]
        for part, matrix in zip(weight.parts(name), weight.matrices(gradient), strict=True):
            label = self._next_call(part)
            if label is not None:
                estimator = self.estimators[part]
                assert isinstance(estimator, Dense)  # `prepare` makes no other for these
                self.outcomes.add([label], estimator.add(matrix, self._weight)[None])

    def prepare(self, targets: Mapping[str, nn.Module], formed: Mapping[str, WeightGradient]) -> None:
        """Make the estimators of layers whose shape and device are known before the first batch.

        If their state were allocated during a backward pass, it would lie between activations, and the memory of these
        could not be reused in one piece after they are freed (measured on a 105 M Llama: 7 % of the peak).
        """
        specs = []
        for name, module in targets.items():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.is_meta:
                continue
            self._devices[name] = weight.device
            if type(module) is nn.Linear and weight.dim() == 2:
                specs.append(self._spec(name, weight.shape[0], weight.shape[1], weight.device))
            elif isinstance(module, nn.Linear) and is_bitsandbytes(module):  # its weight may be packed
                specs.append(self._spec(name, module.out_features, module.in_features, weight.device))
        self._made(specs)
        self._formed = formed
        for name, stored in formed.items():
            device = stored.value.device
            self._made([self._spec(part, *stored.shape, device) for part in stored.parts(name)], formed=True)

    def make(self, name: str, m: int, n: int) -> None:
        """Make the estimator of a layer that has no gradient yet, on the device of its weight if that is known."""
        self._made([self._spec(name, m, n, self._devices.get(name, self.device))])

    def _spec(self, name: str, m: int, n: int, device: torch.device) -> LayerSpec:
        """Raises ValueError if the rank is too large."""
        rank = self.wanted[name]
        if rank > min(m, n):
            raise ValueError(
                f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) has {min(m, n)} singular directions, "
                f"and rank={rank} were asked for; lower the rank or leave the layer out."
            )
        return LayerSpec(name, m, n, rank, seed_of(self._seed, name), device)

    def _made(self, specs: list[LayerSpec], *, formed: bool = False) -> list[Estimator]:
        """New estimators; `formed` is True if autograd forms the gradients."""
        made = make_estimators(
            specs,
            self._config,
            self._micro_batches,
            many=self._many,
            ring_of=self._ring,
            formed=formed,
        )
        self.estimators.update(zip((spec.name for spec in specs), made, strict=True))
        return made

    def _ring(self, device: torch.device) -> StagingRing | None:
        """The staging ring of `device` if dense buffers are in host memory, else None."""
        if self._config.buffer_device != "cpu" or device.type != "cuda":
            return None
        if device not in self._rings:
            self._rings[device] = StagingRing(device, self._config.staging_bytes)
            self.staging_bytes += self._rings[device].device_bytes
        return self._rings[device]

    def absorb(self, loss_of: Callable[[], Tensor], taps: Taps, anywhere: Callable[[bool], bool]) -> None:
        """Process one micro-batch: forward and backward, in which the taps update the estimators.

        `anywhere` tells whether a condition is true on any of the ranks that compute the micro-batch together: all of
        them repeat a float16 backward if one has to.

        Raises:
            ValueError: the function that computes the loss ran backward itself.
        """
        self._summed = set()
        loss = loss_of()
        if self.outcomes.any:
            raise ValueError("loss_fn ran backward itself; let it return the loss, and loraga runs backward.")
        if taps.saw_float16:
            self._backward_float16(loss, loss_of, taps, anywhere)
        else:
            self._backward(loss, taps)
        self._close()

    def next_micro_batch(self) -> None:
        """Count the gradients since the last call as one micro-batch, if there were any.

        Pairs that still wait are those of a backward call that raised, and the caller went on. They are left out.
        """
        for pending in self._pending.values():
            pending.clear()
        if self._calls:
            self._close()

    def _close(self) -> None:
        self.outcomes.close()
        self._calls.clear()

    def _backward(self, loss: Tensor, taps: Taps) -> None:
        self._calls.clear()
        taps.backward(loss)
        for ring in self._rings.values():  # the caller may overwrite the batch's memory from here on
            ring.join()

    def _backward_float16(
        self, loss: Tensor, loss_of: Callable[[], Tensor], taps: Taps, anywhere: Callable[[bool], bool]
    ) -> None:
        """Run backward of a scaled loss, so that small float16 gradients do not underflow.

        Where gradients overflow, forward and backward run again with a smaller scale. A gradient that an estimator has
        summed in an earlier try is left out of the next. Scales are powers of two, so dividing by them is exact.
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
            outcomes = self.outcomes.read()
            self._summed.update(label for label, finite in outcomes.items() if finite)
            if not anywhere(usable and len(self._summed) < len(outcomes)):
                break
            scale *= _FLOAT16_BACKOFF


def _waits(device: torch.device) -> bool:
    """Whether updates on `device` are bound by launches, so that they wait for each other."""
    return device.type == "cuda"
