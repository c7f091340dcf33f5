"""What every estimator must do. A new one inherits these tests and says how it is made and how exact it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from micro_batches import (
    RANK,
    M,
    N,
    Pairs,
    R,
    cold_start,
    end,
    exact,
    feed,
    flat,
    lost_energy,
    merged,
    run,
    spec,
    spread,
    stream,
)
from tiny import captured, objective_excess

from loraga.estimators import Estimate, Estimator, LayerSpec, sketch_width


@dataclass(frozen=True)
class Tolerances:
    """How far an estimate may be from the truth, the exact SVD of the exactly summed gradient in float64.

    Attributes:
        excess (`float`): of the objective of LoRA-GA, over the best possible.
        values (`float`): of each singular value, relative.
        energy (`float`): relative.
        low_rank (`float`): relative error of a gradient with fewer directions than triplets.
    """

    excess: float
    values: float
    energy: float
    low_rank: float


LARGE = (1600, 1700)  # a sketch is 5 % of that


@functools.cache
def flat_pairs(count: int) -> Pairs:
    return flat(count, *LARGE, directions=400)


@functools.cache
def lost_from_a_cold_start(count: int) -> float:
    """Share of the energy that a sketch of 5 % loses, in float64 but with random directions for each micro-batch."""
    columns = sketch_width(RANK)
    assert columns <= 0.05 * min(LARGE)
    lost = lost_energy(
        flat_pairs(count), cold_start(flat_pairs(count), RANK, columns, power_steps=1 if count == 1 else 0)
    )
    assert lost > 0.005  # enough to tell a good estimator from a bad one
    return lost


class EstimatorConformance:
    """Tests of an estimator: derive a `Test...` class and implement `make` and `tolerances`."""

    def make(self, spec: LayerSpec, micro_batches: int | None) -> Estimator:
        """The estimator of a layer; `micro_batches` updates will come, where that is known."""
        raise NotImplementedError

    def tolerances(self) -> Tolerances:
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------- exactness
    @pytest.mark.parametrize("count", [1, 2, 3, 16])
    @pytest.mark.parametrize("shape", [(300, 220), (220, 300), (256, 256)])
    def test_against_the_exact_svd(self, count, shape):
        pairs, allowed = stream(count, m=shape[0], n=shape[1]), self.tolerances()
        estimate, g = run(self.make(spec(*shape), count), pairs), exact(pairs)
        assert objective_excess(g, estimate.factors, R) < allowed.excess
        assert captured(g, estimate.factors) > 1 - 2 * allowed.excess
        assert torch.allclose(estimate.factors.S.double(), torch.linalg.svdvals(g)[:RANK], rtol=allowed.values)
        assert estimate.energy == pytest.approx(float(g.square().sum()), rel=allowed.energy)

    @pytest.mark.parametrize("count", [None, 1, 4])
    def test_factors_are_orthonormal_with_fixed_signs(self, count):
        f = run(self.make(spec(), count), stream(4)).factors
        eye = torch.eye(RANK)
        assert (f.U.T @ f.U - eye).abs().max() < 2e-6 and (f.Vh @ f.Vh.T - eye).abs().max() < 2e-6
        assert (f.U.gather(0, f.U.abs().argmax(0, keepdim=True)) > 0).all() and (f.S.diff() <= 0).all()

    @pytest.mark.parametrize("directions", [1, 3])
    def test_fewer_directions_than_triplets(self, directions):
        """All of the gradient is in the factors."""
        pairs = stream(4, directions=directions, noise=0.0)
        estimate, g = run(self.make(spec(), 4), pairs), exact(pairs)
        f = estimate.factors
        allowed = self.tolerances().low_rank
        assert ((f.U * f.S).double() @ f.Vh.double() - g).norm() <= allowed * g.norm()
        assert estimate.energy == pytest.approx(float(g.square().sum()), rel=3 * allowed)

    @pytest.mark.parametrize("directions", [1, 3])
    def test_energy_is_never_below_that_of_the_factors(self, directions):
        """Also where they hold all of it, and rounding could go either way."""
        for seed in range(16):
            estimate = run(self.make(spec(), 4), stream(4, tokens=8, seed=seed, directions=directions, noise=0.0))
            assert estimate.energy >= float(estimate.factors.S.double().square().sum())

    def test_the_same_stream_gives_the_same_bits(self):
        a, b = (run(self.make(spec(), 4), stream(4)) for _ in range(2))
        assert torch.equal(a.factors.U, b.factors.U) and torch.equal(a.factors.S, b.factors.S)
        assert torch.equal(a.factors.Vh, b.factors.Vh) and a.energy == b.energy

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_activations(self, dtype):
        pairs = [(x.to(dtype), dy.to(dtype)) for x, dy in stream(4)]
        factors = run(self.make(spec(), 4), pairs).factors
        assert objective_excess(exact(pairs), factors, R) < self.tolerances().excess

    # -------------------------------------------------------------------------------------------------- hard spectra
    @pytest.mark.parametrize(("count", "share"), [(1, 0.25), (2, 0.35), (4, 0.5)])
    def test_a_flat_spectrum(self, count, share):
        """At most `share` of what a sketch loses that starts from random directions and takes as many power steps.

        A single micro-batch needs a start from the gradient itself and a power step; several need the directions that
        the earlier ones left.
        """
        factors = run(self.make(spec(*LARGE), count), flat_pairs(count)).factors
        assert lost_energy(flat_pairs(count), factors) <= share * lost_from_a_cold_start(count)

    @pytest.mark.parametrize("count", [1, 4])
    def test_energy_outside_the_sketch(self, count):
        """It is more than a third of all energy, whatever the sketch holds."""
        pairs = spread(count)
        squares = torch.linalg.svdvals(exact(pairs)).square()
        assert squares[sketch_width(RANK) :].sum() > squares.sum() / 3
        assert run(self.make(spec(), count), pairs).energy == pytest.approx(float(squares.sum()), rel=0.1)

    def test_energy_that_arrives_late(self):
        late = [(x, dy * (1e-6 if i < 6 else 1.0)) for i, (x, dy) in enumerate(stream(8))]
        assert objective_excess(exact(late), run(self.make(spec(), 8), late).factors, R) < 2 * self.tolerances().excess

    def test_a_direction_that_only_the_last_batch_has(self):
        x, dy = torch.zeros(96, N), torch.zeros(96, M)
        x[:, 7], dy[:, 11] = 5.0, 5.0
        pairs = [*stream(6), (x, dy)]
        factors = run(self.make(spec(), 7), pairs).factors
        assert objective_excess(exact(pairs), factors, R) < 2 * self.tolerances().excess

    # -------------------------------------------------------------------------------------------------- scales, zeros
    @pytest.mark.parametrize("exponent", [-100, -66, 50, 100])  # powers of two, so that no rounding differs
    def test_scales_over_60_decades(self, exponent):
        scale = 2.0**exponent
        base, scaled = (run(self.make(spec(), 4), stream(4, scale=s)) for s in (1.0, scale))
        assert torch.allclose(base.factors.U, scaled.factors.U, atol=1e-3)
        assert torch.allclose(base.factors.Vh, scaled.factors.Vh, atol=1e-3)
        assert torch.allclose(base.factors.S, scaled.factors.S / scale, rtol=1e-4)
        assert scaled.energy == pytest.approx(base.energy * scale**2, rel=1e-4)

    def test_a_scale_given_per_update_enters_the_sum(self):
        pairs = stream(3)
        estimator = self.make(spec(), 3)
        for i, (x, dy) in enumerate(pairs):
            estimator.update(x, dy * 2.0**i, scale=2.0**-i)
        f, plain = end(estimator, 3).factors, run(self.make(spec(), 3), pairs).factors
        assert torch.allclose(f.S, plain.S, rtol=1e-4)
        assert objective_excess(exact(pairs), f, R) < self.tolerances().excess

    def test_zero_micro_batches_and_few_tokens(self):
        first, *others = stream(4, tokens=3)
        zeros = (torch.zeros(3, N), torch.zeros(3, M))
        mixed = [zeros, first, zeros, *others, zeros]
        assert captured(exact(mixed), run(self.make(spec(), len(mixed)), mixed).factors) > 0.999

    @pytest.mark.parametrize("count", [0, 2])
    def test_nothing_but_zeros(self, count):
        estimator = feed(self.make(spec(), count), [(torch.zeros(5, N), torch.zeros(5, M))] * count)
        estimate = end(estimator, 2)
        assert (estimate.factors.S == 0).all() and estimate.energy == 0
        for basis in (estimate.factors.U, estimate.factors.Vh.T):
            assert (basis.T @ basis - torch.eye(RANK)).abs().max() < 2e-6

    # ---------------------------------------------------------------------------------------------------- NaN and Inf
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("position", [0, 2, 4])
    @pytest.mark.parametrize("where", ["x", "dy"])
    def test_a_poisoned_micro_batch_is_left_out_and_counted(self, bad, position, where):
        good = stream(4)
        x, dy = (t.clone() for t in stream(1, seed=9)[0])
        (x if where == "x" else dy)[5, 6] = bad
        estimator = self.make(spec(), 5)
        flags = [bool(estimator.update(*pair)) for pair in [*good[:position], (x, dy), *good[position:]]]
        estimate, g = end(estimator, 4), exact(good)
        assert flags == [i != position for i in range(5)]
        assert objective_excess(g, estimate.factors, R) < self.tolerances().excess
        assert estimate.energy == pytest.approx(float(g.square().sum()), rel=self.tolerances().energy)

    # ---------------------------------------------------------------------------------------------------------- ranks
    def merged_estimates(self, pairs: Pairs, layer: LayerSpec) -> list[Estimate]:
        """Of three ranks, one of which saw nothing, for the mean of four micro-batches."""
        ranks = [feed(self.make(layer, len(share)), share) for share in (pairs[:1], pairs[1:], [])]
        merged(ranks, 0.25)
        return [end(estimator, 1) for estimator in ranks]

    def test_merged_ranks_have_the_factors_of_their_scaled_sum(self):
        """All of them the same bits."""
        pairs, allowed = stream(4), self.tolerances()
        first, *others = self.merged_estimates(pairs, spec())
        for other in others:
            assert torch.equal(first.factors.U, other.factors.U) and torch.equal(first.factors.Vh, other.factors.Vh)
            assert torch.equal(first.factors.S, other.factors.S) and first.energy == other.energy
        g = exact(pairs)
        assert objective_excess(g, first.factors, R) < allowed.excess
        assert torch.allclose(first.factors.S.double(), torch.linalg.svdvals(g)[:RANK], rtol=allowed.values)
        assert first.energy == pytest.approx(float(g.square().sum()), rel=allowed.energy)

    def test_merged_ranks_know_the_energy_outside_the_sketch(self):
        pairs = spread(4)
        for estimate in self.merged_estimates(pairs, spec()):
            assert estimate.energy == pytest.approx(float(exact(pairs).square().sum()), rel=0.1)

    def test_merged_ranks_of_a_flat_spectrum(self):
        first, *_ = self.merged_estimates(flat_pairs(4), spec(*LARGE))
        assert lost_energy(flat_pairs(4), first.factors) <= 0.4 * lost_from_a_cold_start(4)

    def test_bytes_between_ranks_are_those_that_merging_yields(self):
        estimator = feed(self.make(spec(), 4), stream(2))
        sizes = [t.numel() * t.element_size() for t in type(estimator).merging([estimator], 1.0)]
        assert sum(sizes) == estimator.merged_bytes
        assert max(sizes) == estimator.exchange_bytes

    # --------------------------------------------------------------------------------------------------------- memory
    def test_state_is_counted_and_freed(self):
        estimator = feed(self.make(spec(), 2), stream(2))
        assert sum(t.numel() * t.element_size() for t in estimator.state) == estimator.state_bytes
        factors = end(estimator, 2).factors
        assert not any(isinstance(value, torch.Tensor) for value in vars(estimator).values())
        for t in (factors.U, factors.S, factors.Vh):
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
