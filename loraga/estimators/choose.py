"""Which estimator follows the gradient of a layer."""

from __future__ import annotations

import torch

from loraga.config import InitConfig
from loraga.estimators.base import Estimator, LayerSpec
from loraga.estimators.dense import Dense
from loraga.estimators.host_buffers import StagingRing
from loraga.estimators.streaming import Streaming

# bfloat16 buffers round once per micro-batch; beyond this many their rounding stagnates (docs/numerics.md)
BFLOAT16_LIMIT = 256


def make_estimator(
    spec: LayerSpec,
    config: InitConfig,
    micro_batches: int | None,
    many: bool = False,
    ring: StagingRing | None = None,
    formed: bool = False,
) -> Estimator:
    """What follows the gradient of one layer, by what was asked for and what pays.

    `many`: too many micro-batches may come for a bfloat16 buffer. `formed`: autograd forms the gradient, which a dense
    buffer sums. `ring`: dense buffers that were asked for lie in host memory.
    """
    if config.estimator == "streaming" and not formed:
        return Streaming(spec, micro_batches) if Streaming.pays(spec) else Dense(spec)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.buffer_dtype)
    if dtype is None:
        dtype = torch.float32 if many or config.estimator == "streaming" else torch.bfloat16
    return Dense(spec, dtype, ring)
