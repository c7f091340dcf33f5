"""Makes the report of an estimation, and its warnings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol

from loraga._messages import listed
from loraga.capture.run import Estimation
from loraga.config import InitConfig
from loraga.ops.triton import selection
from loraga.report.report import INITIALISED, ORDINARY, TIED, InitReport, LayerReport, effective_rank


class Target(Protocol):
    """What a report needs to know of a layer: its name, (m, n) and r, and the reason to give for a zero gradient."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def if_zero(self) -> str: ...


def report_of(
    targets: Iterable[Target], unsupported: Mapping[str, str], estimation: Estimation, init: InitConfig, seed: int
) -> InitReport:
    """The report on every target, and on the layers that loraga cannot start, by name with the reason."""
    layers = [_layer_report(target, estimation) for target in targets]
    layers += [LayerReport(name, (0, 0), 0, ORDINARY, reason) for name, reason in unsupported.items()]
    return InitReport(
        layers=layers,
        config=init.to_dict(),
        seconds=estimation.seconds,
        state_bytes=estimation.state_bytes,
        micro_batches=estimation.micro_batches,
        skipped_batches=estimation.skipped_batches,
        seed=seed,
        ranks=estimation.ranks,
        reduced_bytes=estimation.reduced_bytes,
        kernels=selection.report(),
    )


def why_unseen(name: str, estimation: Estimation) -> str:
    """The reason why nothing is known of a layer's gradient; an empty string if something is."""
    if name not in estimation.estimates:
        # reentrant checkpointing runs a block without gradients first, and again with them only if its input needs one
        return "called, but no gradient reached it" if name in estimation.called else "never called with gradients on"
    return "every micro-batch had NaN or Inf" if estimation.skipped[name] == estimation.updates[name] else ""


def _layer_report(target: Target, estimation: Estimation) -> LayerReport:
    reason = why_unseen(target.name, estimation)
    found = estimation.estimates.get(target.name)
    if found is None:
        return LayerReport(target.name, target.shape, target.rank, ORDINARY, reason)
    spectrum = found.factors.S.tolist()
    updates, skipped = estimation.updates[target.name], estimation.skipped[target.name]
    if not reason and not (math.isfinite(sum(spectrum)) and math.isfinite(found.energy)):
        reason, spectrum = "its summed gradient is not finite", []
    if not reason and spectrum[0] == 0:
        reason = target.if_zero
    captured = sum((s / spectrum[0]) ** 2 for s in spectrum) / (found.energy / spectrum[0] ** 2) if not reason else None
    return LayerReport(
        name=target.name,
        shape=target.shape,
        rank=target.rank,
        status=ORDINARY if reason else INITIALISED,
        reason=reason,
        spectrum=spectrum,
        directions=0 if reason else len(spectrum),
        captured_energy=captured,
        effective_rank=effective_rank(spectrum),
        updates=updates - skipped,
        skipped=skipped,
    )


def warn_about(report: InitReport, stacklevel: int) -> None:
    """Warn of layers that the gradient did not start, and of micro-batches that were left out."""
    ordinary = {layer.name: layer.reason for layer in report.ordinary if layer.reason != TIED}
    if ordinary:
        warn_of_ordinary(ordinary, stacklevel + 1)
    if report.skipped_batches:
        warnings.warn(skipped(report) + "; loraga_report says at which layers.", stacklevel=stacklevel)


def warn_of_ordinary(reasons: Mapping[str, str], stacklevel: int) -> None:
    """Warn of layers that keep an ordinary start, each with its reason."""
    named = listed([f"{name} ({reason})" for name, reason in reasons.items()])
    warnings.warn(f"These layers keep an ordinary LoRA start: {named}.", stacklevel=stacklevel)


def skipped(seen: Estimation | InitReport) -> str:
    """The sentence that says how many micro-batches were left out."""
    return f"{seen.skipped_batches} of {seen.micro_batches} micro-batches gave NaN or Inf and were left out"
