"""Recipes against their formulas, on gradients that are not square, with an exact float64 SVD."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import SHAPES, exact, gradient

from loraga.config import DIRECTIONS, InitConfig
from loraga.factors import Factors
from loraga.start import recipes

PAIRS = 4


# which triplets A0, B0 and the rest of A take of the first nine
SLICES = {
    "ArB2r": ([0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7, 8]),
    "A2rBr": ([4, 5, 6, 7], [0, 1, 2, 3], [0, 1, 2, 3, 8]),
    "ArBr": ([1, 3, 5, 7], [0, 2, 4, 6], [0, 2, 4, 6, 8]),
}


@pytest.mark.parametrize("direction", SLICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_takes_slices_of_the_singular_vectors(shape, direction):
    factors = exact(gradient(shape), 2 * PAIRS + 1)
    A0, B0, others = recipes.lora_ga(factors, PAIRS, direction, "layer", 0)
    for_a, for_b, left_over = SLICES[direction]
    assert torch.equal(A0, factors.Vh[for_a])
    assert torch.equal(B0, factors.U[:, for_b])
    assert torch.equal(others, factors.Vh[left_over])


@pytest.mark.parametrize("shape", SHAPES)
def test_random_takes_disjoint_halves_of_the_first_2p(shape):
    factors = exact(gradient(shape))
    seen = set()
    for seed in range(20):
        A0, B0, others = recipes.lora_ga(factors, PAIRS, "random", "layer", seed)
        in_a, in_b, left = (
            indices.abs().argmax(dim=1).tolist()
            for indices in (A0 @ factors.Vh.T, B0.T @ factors.U, others @ factors.Vh.T)
        )
        assert sorted(in_a + in_b) == list(range(2 * PAIRS))
        assert left == [index for index in range(factors.rank) if index not in in_a]
        seen.add(tuple(in_a))
    assert len(seen) > 10


def test_random_depends_on_seed_and_name_and_leaves_the_global_generator_alone():
    factors = exact(gradient((48, 20)))
    before = torch.get_rng_state()
    first, again = (recipes.lora_ga(factors, PAIRS, "random", "a", 0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    others = [recipes.lora_ga(factors, PAIRS, "random", f"layer{i}", 0)[0] for i in range(5)]
    assert len({tuple(A0.flatten().tolist()) for A0 in others}) == 5


def test_random_is_the_same_in_another_process():
    code = (
        "import torch; from loraga.factors import Factors; from loraga.start.recipes import lora_ga;"
        "A, B, _ = lora_ga(Factors(torch.eye(9)[:, :8], torch.ones(8), torch.eye(8)), 4, 'random', 'q_proj', 3);"
        "print(A.argmax(1).tolist(), B.argmax(0).tolist())"
    )
    root = Path(__file__).resolve().parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_default_device_of_the_callers_plays_no_part(direction):
    factors = exact(gradient((48, 20)))
    expected = recipes.lora_ga(factors, PAIRS, direction, "layer", 0)
    with torch.device("meta"):
        got = recipes.lora_ga(factors, PAIRS, direction, "layer", 0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------- sizes

SIGMA = torch.tensor([9.0, 4.0, 1.0])
S = 2.5


@pytest.mark.parametrize("growth", [2.0, math.sqrt(2)])
@pytest.mark.parametrize(
    "config, mirrored, single",
    [
        (InitConfig(), 3 / 4 / 2, 3 / 4),  # 81^(1/4) / sqrt(16)
        (InitConfig(stable_gamma=64.0), 3 / 8 / 2, 3 / 8),
        (InitConfig(scale="unit"), 1, 1),
        (InitConfig(scale="gd"), 1 / (math.sqrt(2) * S), 1 / S),
        (InitConfig(scale="weight-svd"), (3 + 2 + 1) / 3 / math.sqrt(S), (3 + 2 + 1) / 3 / math.sqrt(S)),
    ],
    ids=lambda value: value.scale if isinstance(value, InitConfig) else None,
)
def test_sizes(config, mirrored, single, growth):
    found = recipes.sizes(config, (81, 7), 3, scaling=S, growth=growth, name="layer", sigma=SIGMA)
    factor = growth if config.scale == "stable" else 1.0
    assert [float(size) for size in found] == pytest.approx([mirrored * factor, single * factor], rel=1e-6)


def test_sizes_refuse_what_they_cannot_do():
    for given in (None, torch.ones(5)):
        with pytest.raises(ValueError, match=r"'layer'.*needs the 3 largest singular values"):
            recipes.sizes(InitConfig(scale="weight-svd"), (81, 7), 3, scaling=S, growth=2.0, name="layer", sigma=given)
    for scale in ("gd", "weight-svd"):
        for scaling in (0.0, -2.0, float("nan")):
            with pytest.raises(ValueError, match=r"'layer'.*divides by PEFT's scaling"):
                recipes.sizes(
                    InitConfig(scale=scale), (81, 7), 3, scaling=scaling, growth=2.0, name="layer", sigma=SIGMA
                )


# ------------------------------------------------------------------------------------------------------------- LoRA-One


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_one_is_the_best_rank_r_step_downhill(shape):
    G = gradient(shape)
    A, B = recipes.lora_one(exact(G, 4), 128.0, "layer")
    U, sigma, Vh = torch.linalg.svd(G)
    step = -(U[:, :4] * sigma[:4]) @ Vh[:4] / (128.0 * sigma[0])
    torch.testing.assert_close((B @ A).double(), step, rtol=1e-5, atol=1e-7)
    assert ((B @ A).double() * G).sum() < 0
    # Both sides carry the same share: |column i of B| = |row i of A|.
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-5, atol=0)


def test_lora_one_lowers_the_loss_of_a_least_squares_layer():
    X, W, target = gradient((64, 20), 1), gradient((48, 20), 2), gradient((64, 48), 3)

    def loss(weight):
        return (X @ weight.T - target).square().mean()

    G = 2 * (X @ W.T - target).T @ X / target.numel()
    A, B = recipes.lora_one(exact(G, 4), 128.0, "layer")
    assert loss(W + (B @ A).double()) < loss(W)


def test_lora_one_refuses_a_gradient_of_zero():
    factors = exact(gradient((48, 20)))
    with pytest.raises(ValueError, match=r"'layer'.*largest singular value of the gradient is 0\.0"):
        recipes.lora_one(Factors(factors.U, torch.zeros_like(factors.S), factors.Vh), 128.0, "layer")
