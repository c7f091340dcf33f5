"""The choice of the estimator for a layer."""

from __future__ import annotations

import torch

from loraga.config import InitConfig
from loraga.estimators.base import Estimator, LayerSpec
from loraga.estimators.dense import Dense
from loraga.estimators.host_buffers import StagingRing
from loraga.estimators.streaming import Streaming

# A bfloat16 buffer rounds once per micro-batch. After more micro-batches than this, new gradients are too small to
# change its numbers (docs/numerics.md).
BFLOAT16_LIMIT = 256


def make_estimator(
    spec: LayerSpec,
    config: InitConfig,
    micro_batches: int | None,
    many: bool = False,
    ring: StagingRing | None = None,
    formed: bool = False,
) -> Estimator:
    """A new estimator for one layer, of the class that `config` asks for.

    Where `config` asks for streaming and a sketch would not be smaller than the gradient, it is a dense one in float32.

    Args:
        spec (`LayerSpec`): the layer.
        config (`InitConfig`): `estimator` and `buffer_dtype` are read.
        micro_batches (`int` or `None`): of this rank, None if not known.
        many (`bool`): there may be more than `BFLOAT16_LIMIT` micro-batches, so "auto" buffers are float32.
        ring (`StagingRing`, *optional*): the buffers of `config.estimator="dense"` and of formed gradients are in host
            memory and use this ring.
        formed (`bool`): autograd forms the gradient, so only a dense estimator can sum it.
    """
    if config.estimator == "streaming" and not formed:
        return Streaming(spec, micro_batches) if Streaming.pays(spec) else Dense(spec)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(config.buffer_dtype)
    if dtype is None:
        dtype = torch.float32 if many or config.estimator == "streaming" else torch.bfloat16
    return Dense(spec, dtype, ring)
