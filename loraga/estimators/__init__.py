"""Estimators: a stream of (x, dy) in, factors of the mean gradient out."""

from loraga.estimators.base import Estimate, Estimator, LayerSpec
from loraga.estimators.dense import Dense
from loraga.estimators.finish import finish, finish_in_chunks
from loraga.estimators.host_buffers import StagingRing
from loraga.estimators.streaming import Streaming, power_steps, sketch_width

__all__ = [
    "Dense",
    "Estimate",
    "Estimator",
    "LayerSpec",
    "StagingRing",
    "Streaming",
    "finish",
    "finish_in_chunks",
    "power_steps",
    "sketch_width",
]
