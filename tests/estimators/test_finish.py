"""The end of the stream: estimators finished together, in chunks, are as good as each alone."""

from __future__ import annotations

import importlib

import pytest
import torch
from micro_batches import M, N, end, exact, feed, spec, stream
from tiny import captured

from loraga.estimators import Dense, Streaming, finish


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
    return {name: feed(estimator, pairs[name]) for name, estimator in estimators.items()}, pairs


@pytest.mark.parametrize("chunk", [1, 400_000, 2**28])
def test_finished_together_as_alone(chunk, monkeypatch):
    """In the order they came, for any size of chunk, each as if it were the only layer up to rounding."""
    monkeypatch.setattr(importlib.import_module("loraga.estimators.finish"), "FINISHED_BYTES", chunk)
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
    estimators["s1"].state[1][3, 4] = float("inf")
    for name, result in finish(estimators, dict.fromkeys(estimators, 1.0)).items():
        if name in ("d1", "s1"):
            assert not result.factors.S.isfinite().all()
        else:
            assert torch.equal(result.factors.Vh, expected[name].factors.Vh) and result.energy == expected[name].energy


def test_no_estimators_no_estimates():
    assert finish({}, {}) == {}
