"""The dense estimator: what every estimator does, in each kind of buffer, and which kind is taken when."""

from __future__ import annotations

import pytest
import torch
from estimator_conformance import EstimatorConformance, Tolerances
from memory import Queues
from micro_batches import CPU, R, exact, run, spec, stream
from tiny import objective_excess

from loraga.estimators import Dense, LayerSpec, StagingRing


class TestDenseInFloat32(EstimatorConformance):
    def make(self, spec: LayerSpec, micro_batches: int | None) -> Dense:
        return Dense(spec)

    def tolerances(self) -> Tolerances:
        return Tolerances(excess=0.001, values=1e-3, energy=1e-4, low_rank=1e-5)


class TestDenseInBfloat16(EstimatorConformance):
    def make(self, spec: LayerSpec, micro_batches: int | None) -> Dense:
        return Dense(spec, torch.bfloat16)

    def tolerances(self) -> Tolerances:
        return Tolerances(excess=0.005, values=0.01, energy=0.01, low_rank=0.01)


class TestDenseInHostMemory(TestDenseInFloat32):
    def make(self, spec: LayerSpec, micro_batches: int | None) -> Dense:
        return Dense(spec, torch.float32, StagingRing(CPU, 2**19, Queues()))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 0.001), (torch.bfloat16, 0.01)])
def test_64_micro_batches(dtype, allowed):
    pairs = stream(64, tokens=32)
    assert objective_excess(exact(pairs), run(Dense(spec(), dtype), pairs).factors, R) < allowed
