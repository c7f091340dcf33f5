"""Estimators: they take a stream of (x, dy) and return the factors of the mean gradient."""

from loraga.estimators.base import Estimate, Estimator, LayerSpec
from loraga.estimators.choose import BFLOAT16_LIMIT, make_estimators
from loraga.estimators.dense import Dense
from loraga.estimators.finish import finish, finish_in_chunks
from loraga.estimators.host_buffers import StagingRing
from loraga.estimators.merge import merge
from loraga.estimators.pending import WAITING_BYTES, WORKING_STATES, Outcome, Pending, pair_bytes
from loraga.estimators.streaming import Streaming, power_steps, sketch_width

__all__ = [
    "BFLOAT16_LIMIT",
    "WAITING_BYTES",
    "WORKING_STATES",
    "Dense",
    "Estimate",
    "Estimator",
    "LayerSpec",
    "Outcome",
    "Pending",
    "StagingRing",
    "Streaming",
    "finish",
    "finish_in_chunks",
    "make_estimators",
    "merge",
    "pair_bytes",
    "power_steps",
    "sketch_width",
]
