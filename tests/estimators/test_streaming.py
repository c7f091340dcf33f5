"""The streaming estimator: what every estimator does, and the size of its state."""

from __future__ import annotations

import torch
from estimator_conformance import EstimatorConformance, Tolerances
from micro_batches import spec

from loraga.estimators import LayerSpec, Streaming, power_steps, sketch_width


class TestStreaming(EstimatorConformance):
    def make(self, spec: LayerSpec, micro_batches: int | None) -> Streaming:
        return Streaming(spec, micro_batches)

    def tolerances(self) -> Tolerances:
        return Tolerances(excess=0.01, values=0.03, energy=0.05, low_rank=1e-3)


def test_sketch_width_and_where_it_pays():
    assert sketch_width(16) == 80 and sketch_width(4) == 80 and sketch_width(256) == 1024
    assert Streaming.pays(spec(4096, 4096, 16)) and Streaming.pays(spec(768, 2048, 16))
    assert not Streaming.pays(spec(256, 256, 16)) and not Streaming.pays(spec(16, 100000, 16))


def test_only_a_single_micro_batch_gets_a_power_step():
    assert [power_steps(count) for count in (1, 2, 100, None)] == [1, 0, 0, 0]


def test_state_is_thin():
    e = Streaming(spec(4096, 2048, 16), 4)
    assert e.state_bytes <= 1.2 * 80 * (4096 + 2048) * 4 < 0.1 * 4096 * 2048 * 4
    assert all(t.dtype == torch.float32 for t in e.state)
