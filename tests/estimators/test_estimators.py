"""Both estimators over streams of (x, dy), against the exact SVD of the exactly accumulated gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
from zoo import captured, objective_excess

from loraga.estimators import Dense, LayerSpec, Streaming, finish, sketch_width

RANK = 4  # triplets: 2r
R = RANK // 2
M, N = 300, 220


def spec(m: int = M, n: int = N, rank: int = RANK, seed: int = 3) -> LayerSpec:
    return LayerSpec("layer", m, n, rank, seed, torch.device("cpu"))


def stream(count: int, tokens: int = 96, m: int = M, n: int = N, seed: int = 0, decay: float = 0.8, scale: float = 1.0):
    """Micro-batches whose gradients share a decaying signal and differ by noise."""
    g = torch.Generator().manual_seed(seed)
    common_x, common_dy = torch.randn(40, n, generator=g), torch.randn(40, m, generator=g)
    weight = torch.arange(1, 41, dtype=torch.float32) ** -decay
    result = []
    for _ in range(count):
        mix = torch.randn(tokens, 40, generator=g) * weight
        x = mix @ common_x + 0.3 * torch.randn(tokens, n, generator=g)
        dy = mix @ common_dy + 0.3 * torch.randn(tokens, m, generator=g)
        result.append((x, dy * scale))
    return result


def exact(pairs) -> torch.Tensor:
    return sum(dy.double().T @ x.double() for x, dy in pairs) / len(pairs)


def end(estimator, divisor):
    return finish({"layer": estimator}, {"layer": divisor})["layer"]


def run(estimator, pairs):
    for x, dy in pairs:
        estimator.update(x, dy)
    return end(estimator, len(pairs))


def test_sketch_width_and_where_it_pays():
    assert sketch_width(16) == 80 and sketch_width(4) == 80 and sketch_width(256) == 1024
    assert Streaming.pays(spec(4096, 4096, 16)) and Streaming.pays(spec(768, 2048, 16))
    assert not Streaming.pays(spec(256, 256, 16)) and not Streaming.pays(spec(16, 100000, 16))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("shape", [(300, 220), (220, 300), (256, 256)])
def test_streaming_against_exact(count, shape):
    m, n = shape
    pairs = stream(count, m=m, n=n)
    estimate = run(Streaming(spec(m, n), count), pairs)
    g = exact(pairs)
    assert objective_excess(g, estimate.factors, R) < 0.01
    assert captured(g, estimate.factors) > 0.98
    assert torch.allclose(estimate.factors.S.double(), torch.linalg.svdvals(g)[:RANK], rtol=0.03)
    assert estimate.energy == pytest.approx(float(g.square().sum()), rel=0.05)


@pytest.mark.parametrize("count", [None, 1, 4])
def test_streaming_factors_are_orthonormal_with_fixed_signs(count):
    f = run(Streaming(spec(), count), stream(4)).factors
    eye = torch.eye(RANK)
    assert (f.U.T @ f.U - eye).abs().max() < 2e-6 and (f.Vh @ f.Vh.T - eye).abs().max() < 2e-6
    assert (f.U.gather(0, f.U.abs().argmax(0, keepdim=True)) > 0).all() and (f.S.diff() <= 0).all()


def test_streaming_state_is_thin():
    e = Streaming(spec(4096, 2048, 16), 4)
    assert e.state_bytes <= 1.2 * 80 * (4096 + 2048) * 4 < 0.1 * 4096 * 2048 * 4


@pytest.mark.parametrize("kind", ["dense32", "dense16", "streaming"])
def test_bitwise_reproducible(kind):
    make = {
        "dense32": lambda: Dense(spec()),
        "dense16": lambda: Dense(spec(), torch.bfloat16),
        "streaming": lambda: Streaming(spec(), 4),
    }[kind]
    a, b = run(make(), stream(4)), run(make(), stream(4))
    assert torch.equal(a.factors.U, b.factors.U) and torch.equal(a.factors.Vh, b.factors.Vh)
    assert a.energy == b.energy


@pytest.mark.parametrize("count", [1, 5, 64])
def test_dense_float32(count):
    pairs = stream(count, tokens=32)
    estimate = run(Dense(spec()), pairs)
    g = exact(pairs)
    assert objective_excess(g, estimate.factors, R) < 0.001
    assert estimate.energy == pytest.approx(float(g.square().sum()), rel=1e-4)


def test_dense_bfloat16_over_64_micro_batches():
    pairs = stream(64, tokens=32)
    estimate = run(Dense(spec(), torch.bfloat16), pairs)
    assert objective_excess(exact(pairs), estimate.factors, R) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype):
    pairs = [(x.to(dtype), dy.to(dtype)) for x, dy in stream(4)]
    g = exact(pairs)
    assert objective_excess(g, run(Streaming(spec(), 4), pairs).factors, R) < 0.01
    assert objective_excess(g, run(Dense(spec()), pairs).factors, R) < 0.002


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**50, 2.0**83])  # so that no rounding differs
def test_scale_of_the_gradient_does_not_matter(scale):
    base = run(Streaming(spec(), 4), stream(4)).factors
    scaled = run(Streaming(spec(), 4), stream(4, scale=scale)).factors
    assert torch.allclose(base.U, scaled.U, atol=1e-3) and torch.allclose(base.Vh, scaled.Vh, atol=1e-3)
    assert torch.allclose(base.S, scaled.S / scale, rtol=1e-4)


def test_energy_that_arrives_late_is_seen():
    pairs = stream(8)
    late = [(x, dy * (1e-6 if i < 6 else 1.0)) for i, (x, dy) in enumerate(pairs)]
    assert objective_excess(exact(late), run(Streaming(spec(), 8), late).factors, R) < 0.02


def test_a_direction_that_only_the_last_batch_has():
    pairs = stream(6)
    x, dy = torch.zeros(96, N), torch.zeros(96, M)
    x[:, 7], dy[:, 11] = 5.0, 5.0
    pairs.append((x, dy))
    g = exact(pairs)
    assert objective_excess(g, run(Streaming(spec(), 7), pairs).factors, R) < 0.02


def test_zero_micro_batches_and_few_tokens():
    pairs = stream(4, tokens=3)
    zeros = (torch.zeros(3, N), torch.zeros(3, M))
    mixed = [zeros, pairs[0], zeros, *pairs[1:], zeros]
    estimate = run(Streaming(spec(), len(mixed)), mixed)
    g = exact(mixed)
    assert captured(g, estimate.factors) > 0.999


def test_all_zero():
    zeros = [(torch.zeros(5, N), torch.zeros(5, M))] * 2
    for estimator in (Streaming(spec(), 2), Dense(spec())):
        estimate = run(estimator, zeros)
        assert (estimate.factors.S == 0).all() and estimate.energy == 0
        assert (estimate.factors.U.T @ estimate.factors.U - torch.eye(RANK)).abs().max() < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_poisoned_micro_batch_is_left_out_and_counted(bad, position, where):
    good = stream(4)
    x, dy = (t.clone() for t in stream(1, seed=9)[0])
    (x if where == "x" else dy)[5, 6] = bad
    pairs = [*good[:position], (x, dy), *good[position:]]
    for make in (lambda: Streaming(spec(), 5), lambda: Dense(spec())):
        estimator = make()
        flags = [bool(estimator.update(*pair)) for pair in pairs]
        estimate = end(estimator, 4)
        assert flags == [i != position for i in range(5)]
        assert objective_excess(exact(good), estimate.factors, R) < 0.01
        assert torch.isfinite(torch.tensor(estimate.energy))


def test_a_scale_given_per_update_enters_the_sum():
    pairs = stream(3)
    estimator = Streaming(spec(), 3)
    for i, (x, dy) in enumerate(pairs):
        estimator.update(x, dy * 2.0**i, scale=2.0**-i)
    f = end(estimator, 3).factors
    plain = run(Streaming(spec(), 3), pairs).factors
    assert torch.allclose(f.S, plain.S, rtol=1e-4) and objective_excess(exact(pairs), f, R) < 0.01


def zoo_of_estimators() -> tuple[dict, dict]:
    """Several kinds, interleaved, with their streams; one of them zero."""
    makers = {
        "s0": lambda: Streaming(spec(seed=1)),
        "d0": lambda: Dense(spec(seed=2)),
        "b0": lambda: Dense(spec(seed=3), torch.bfloat16),
        "s1": lambda: Streaming(spec(seed=4)),
        "t0": lambda: Streaming(spec(N, M, seed=5)),
        "d1": lambda: Dense(spec(seed=6)),
        "zero": lambda: Streaming(spec(seed=7)),
        "d2": lambda: Dense(spec(seed=8)),
    }
    pairs = {
        name: stream(2, m=N, n=M, seed=i) if name == "t0" else stream(2, seed=i, scale=float(name != "zero"))
        for i, name in enumerate(makers)
    }
    return {name: make() for name, make in makers.items()}, pairs


def fed() -> tuple[dict, dict]:
    estimators, pairs = zoo_of_estimators()
    for name, estimator in estimators.items():
        for x, dy in pairs[name]:
            estimator.update(x, dy)
    return estimators, pairs


@pytest.mark.parametrize("chunk", [1, 400_000, 2**28])
def test_finished_together_as_alone(chunk, monkeypatch):
    """In the order they came, for any size of chunk, each as if it were the only layer up to rounding."""
    monkeypatch.setattr(importlib.import_module("loraga.estimators.finish"), "_CHUNK_BYTES", chunk)
    estimators, pairs = fed()
    steps: list[int] = []
    divisors = {name: 2.0 + i for i, name in enumerate(estimators)}
    results = finish(estimators, divisors, steps.append)
    assert list(results) == list(estimators) and sum(steps) == len(estimators)
    assert max(steps) == {1: 1, 400_000: 2, 2**28: 3}[chunk]
    alone, _ = fed()
    for name, result in results.items():
        single = end(alone[name], divisors[name])
        f, g = result.factors, single.factors
        assert ((f.U * f.S) @ f.Vh - (g.U * g.S) @ g.Vh).norm() <= 1e-5 * g.S.norm()
        assert result.energy == pytest.approx(single.energy, rel=1e-5)
        truth = exact(pairs[name]) * 2 / divisors[name]
        assert captured(truth, f) > 0.98 or name == "zero"


def test_nan_in_one_layer_does_not_reach_another():
    whole, _ = fed()
    expected = finish(whole, dict.fromkeys(whole, 1.0))
    estimators, _ = fed()
    estimators["d1"]._g[3, 4] = float("nan")
    estimators["s1"]._z[3, 4] = float("inf")
    for name, result in finish(estimators, dict.fromkeys(estimators, 1.0)).items():
        if name in ("d1", "s1"):
            assert not result.factors.S.isfinite().all()
        else:
            assert torch.equal(result.factors.Vh, expected[name].factors.Vh) and result.energy == expected[name].energy


def test_state_is_freed_and_factors_hold_nothing_else():
    estimators, _ = fed()
    results = finish(estimators, dict.fromkeys(estimators, 1.0))
    for estimator in estimators.values():
        assert not any(isinstance(value, torch.Tensor) for value in vars(estimator).values())
    for result in results.values():
        for t in (result.factors.U, result.factors.S, result.factors.Vh):
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


def test_no_estimators_no_estimates():
    assert finish({}, {}) == {}


@pytest.mark.parametrize("kind", ["dense32", "dense16", "streaming"])
def test_bytes_between_ranks_are_those_that_merging_yields(kind):
    estimator = {
        "dense32": lambda: Dense(spec()),
        "dense16": lambda: Dense(spec(), torch.bfloat16),
        "streaming": lambda: Streaming(spec(), 4),
    }[kind]()
    for x, dy in stream(2):
        estimator.update(x, dy)
    sizes = [t.numel() * t.element_size() for t in type(estimator).merging([estimator], 1.0)]
    assert sum(sizes) == estimator.merged_bytes
    assert max(sizes) == estimator.exchange_bytes
