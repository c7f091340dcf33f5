"""The estimators of one process, and the record of what was finite."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loraga.capture.taps import Taps
from loraga.capture.weight_gradients import WeightGradient
from loraga.config import InitConfig
from loraga.estimators import Dense, Estimator, LayerSpec, StagingRing, make_estimator
from loraga.integrations.bitsandbytes import is_bitsandbytes
from loraga.linalg import seed_of

# float16 gradients: the loss is scaled to about this before backward, and by this much less after an overflow
_FLOAT16_TARGET, _FLOAT16_BACKOFF, _FLOAT16_TRIES = 2.0**15, 2.0**-4, 6


class Collector:
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
        self._formed: Mapping[str, WeightGradient] = {}
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

    def on_pair(self, name: str, x: Tensor, dy: Tensor) -> None:
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

    def on_gradient(self, name: str, gradient: Tensor) -> None:
        """A gradient that autograd formed, as `WeightGradientHooks` hands it over."""
        weight = self._formed[name]
        for part, matrix in zip(weight.parts(name), weight.matrices(gradient), strict=True):
            key = self._next_call(part)
            if key is not None:
                estimator = self.estimators[part]
                assert isinstance(estimator, Dense)  # `prepare` made it
                self._flags[key] = estimator.add(matrix, self._weight)

    def prepare(self, targets: Mapping[str, nn.Module], formed: Mapping[str, WeightGradient]) -> None:
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
        self._formed = formed
        for name, stored in formed.items():
            for part in stored.parts(name):
                self.estimators[part] = self._estimator(part, *stored.shape, stored.value.device, formed=True)

    def make(self, name: str, m: int, n: int) -> None:
        """The estimator of a layer none of whose gradients was seen yet, beside its weight."""
        self.estimators[name] = self._estimator(name, m, n, self._devices.get(name, self.device))

    def _estimator(self, name: str, m: int, n: int, device: torch.device, formed: bool = False) -> Estimator:
        rank = self.wanted[name]
        if rank > min(m, n):
            raise ValueError(
                f"Layer {name!r} with (out_features, in_features) = ({m}, {n}) has {min(m, n)} singular directions, "
                f"and rank={rank} were asked for; lower the rank or leave the layer out."
            )
        spec = LayerSpec(name, m, n, rank, seed_of(self._seed, name), device)
        return make_estimator(spec, self._config, self._micro_batches, self._many, self._ring(device), formed)

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
