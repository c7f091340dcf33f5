"""The streaming estimator: what every estimator does, and the size of its state."""

from __future__ import annotations

import pytest
import torch
from estimator_conformance import EstimatorConformance, Tolerances
from micro_batches import CPU, RANK, spec, stream

from loraga.estimators import LayerSpec, Streaming, finish, power_steps, sketch_width, streaming


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


def layers(count: int) -> list[LayerSpec]:
    return [LayerSpec(f"layer {i}", 300, 220, RANK, 100 + i, CPU) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_group_has_the_bits_of_single_layers(micro_batches, dtype):
    """Layers of one shape whose micro-batches have different numbers of tokens, one of them poisoned."""
    specs = layers(4)
    alone, together = [Streaming(s, micro_batches) for s in specs], Streaming.together(specs, micro_batches)
    for t in range(micro_batches):
        pairs = [stream(1, tokens=40 + 30 * i, seed=10 * t + i)[0] for i in range(4)]
        xs, dys = ([tensor.to(dtype) for tensor in side] for side in zip(*pairs, strict=True))
        if t == 1:
            dys[2] = dys[2] * torch.nan
        flags = [bool(one.update(x, dy, 0.5)) for one, x, dy in zip(alone, xs, dys, strict=True)]
        middle = Streaming.absorb(together[1:3], xs[1:3], dys[1:3], 0.5).tolist()
        ends = [bool(together[i].update(xs[i], dys[i], 0.5)) for i in (0, 3)]
        assert [ends[0], *middle, ends[1]] == flags == [t != 1 or i != 2 for i in range(4)]
    for one, other in zip(alone, together, strict=True):
        for own, shared in zip(one.state, other.state, strict=True):
            assert torch.equal(own, shared)
    divisors = {s.name: 1.0 for s in specs}
    single = {s.name: finish({s.name: one}, divisors)[s.name] for s, one in zip(specs, alone, strict=True)}
    whole = finish({s.name: one for s, one in zip(specs, together, strict=True)}, divisors)
    for name, estimate in single.items():
        assert torch.allclose(estimate.factors.S, whole[name].factors.S, rtol=1e-6)


def test_a_group_is_finished_without_a_copy_of_its_state():
    group = Streaming.together(layers(3), 2)
    sketches = group[0]._sketches
    assert all(t.data_ptr() == u.data_ptr() for t, u in zip(streaming._shared(group), sketches[0:3], strict=True))
    others = streaming._shared([group[0], group[2]])  # no neighbours
    assert torch.equal(others[2], sketches.probes[[0, 2]])
