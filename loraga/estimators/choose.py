"""The choice of the estimator for a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import torch

from loraga.config import InitConfig
from loraga.estimators.base import Estimator, LayerSpec
from loraga.estimators.dense import Dense
from loraga.estimators.finish import FINISHED_BYTES
from loraga.estimators.host_buffers import StagingRing
from loraga.estimators.streaming import Streaming

# A bfloat16 buffer rounds once per micro-batch. After more micro-batches than this, new gradients are too small to
# change its numbers (docs/numerics.md).
BFLOAT16_LIMIT = 256


def make_estimators(
    specs: Sequence[LayerSpec],
    config: InitConfig,
    micro_batches: int | None,
    *,
    many: bool = False,
    ring_of: Callable[[torch.device], StagingRing | None] = lambda device: None,
    formed: bool = False,
) -> list[Estimator]:
    """New estimators for `specs`, each of the class that `config` asks for.

    Where `config` asks for streaming and a sketch would not be cheaper than the gradient, it is a dense one in float32.
    Sketches of one shape, rank and device are neighbours in memory, in pieces of at most `FINISHED_BYTES`.

    Args:
        specs (sequence of `LayerSpec`): the layers.
        config (`InitConfig`): `estimator` and `buffer_dtype` are read.
        micro_batches (`int` or `None`): of this rank, None if not known.
        many (`bool`): there may be more than `BFLOAT16_LIMIT` micro-batches, so "auto" buffers are float32.
        ring_of (callable): the ring of staging blocks of a device if the buffers of `config.estimator="dense"` and of
            formed gradients are in host memory, else None.
        formed (`bool`): autograd forms the gradients, so only a dense estimator can sum them.
    """
    sketched = config.estimator == "streaming" and not formed
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.buffer_dtype)
    if dtype is None:
        dtype = torch.float32 if many or config.estimator == "streaming" else torch.bfloat16
    if not sketched:
        for device in {spec.device for spec in specs}:
            ring = ring_of(device)
            if ring is not None:
                ring.reserve(sum(s.m * s.n * dtype.itemsize for s in specs if s.device == device))
    made: dict[str, Estimator] = {}
    alike: defaultdict[Hashable, list[LayerSpec]] = defaultdict(list)
    for spec in specs:
        if not sketched:
            made[spec.name] = Dense(spec, dtype, ring_of(spec.device))
        elif not Streaming.pays(spec):
            made[spec.name] = Dense(spec)
        else:
            alike[spec.m, spec.n, spec.rank, spec.device].append(spec)
    for group in alike.values():
        count = max(1, FINISHED_BYTES // Streaming.bytes_of(group[0]))
        for start in range(0, len(group), count):
            part = group[start : start + count]
            made.update(zip((spec.name for spec in part), Streaming.together(part, micro_batches), strict=True))
    return [made[spec.name] for spec in specs]
