"""Recipes against their formulas, on non-square gradients with an exact float64 SVD."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraga.config import DIRECTIONS, SCALES, InitConfig
from loraga.factors import Factors
from loraga.recipes import check_rank, start

SHAPES = [(48, 20), (19, 53)]
RANK = 4
SCALING = 16 / math.sqrt(RANK)


def gradient(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact(G, rank=None):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return Factors(U, S, Vh).to(torch.float32).truncated(rank or S.shape[0])


def weight_sigma(shape):
    return torch.linalg.svdvals(gradient(shape, seed=9))[:RANK].float()


def begin(factors, config, name="layer", seed=0, **kwargs):
    kwargs = {"scaling": SCALING, "weight_sigma": weight_sigma(factors.shape)} | kwargs
    return start(factors, RANK, config, name=name, seed=seed, **kwargs)


def expected_size(shape, scale):
    return {
        "stable": shape[0] ** 0.25 / 4.0,
        "unit": 1.0,
        "gd": 1.0 / SCALING,
        "weight-svd": float((weight_sigma(shape).double() / SCALING).sqrt().mean()),
    }[scale]


def expected_slices(direction):
    r = RANK
    return {
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    }[direction]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_is_orthonormal_slices_times_one_number(shape, direction, scale):
    G = gradient(shape)
    A, B = begin(exact(G), InitConfig(direction=direction, scale=scale))
    assert A.shape == (RANK, shape[1]) and B.shape == (shape[0], RANK)
    assert A.dtype == B.dtype == torch.float32
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    size = expected_size(shape, scale)
    take_a, take_b = expected_slices(direction)
    # U and Vh come from the same call as in exact(), so the signs are the same.
    torch.testing.assert_close(A.double(), size * Vh[take_a], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(B.double(), size * U[:, take_b], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_first_step_is_the_best_of_rank_2r(shape, direction):
    """|G - (B B'G + G A'A) / c^2| is the energy beyond 2r: no matrix of rank 2r does better."""
    G = gradient(shape)
    A, B = (t.double() for t in begin(exact(G), InitConfig(direction=direction)))
    c2 = math.sqrt(shape[0]) / 16.0
    residual = G - (B @ (B.T @ G) + (G @ A.T) @ A) / c2
    tail = torch.linalg.svdvals(G)[2 * RANK :]
    torch.testing.assert_close(residual.norm(), tail.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_takes_disjoint_halves_of_the_first_2r(shape):
    factors = exact(gradient(shape))
    config = InitConfig(direction="random", scale="unit")
    seen = set()
    for seed in range(20):
        A, B = begin(factors, config, seed=seed)
        in_a = (A @ factors.Vh.T).abs().argmax(dim=1).tolist()
        in_b = (B.T @ factors.U).abs().argmax(dim=1).tolist()
        assert sorted(in_a + in_b) == list(range(2 * RANK))
        seen.add(tuple(in_a))
    assert len(seen) > 10


def test_random_depends_on_seed_and_name_and_leaves_the_global_generator_alone():
    factors = exact(gradient((48, 20)))
    config = InitConfig(direction="random")
    before = torch.get_rng_state()
    first = begin(factors, config, name="a", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    again = begin(factors, config, name="a", seed=0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [begin(factors, config, name=f"layer{i}", seed=0)[0] for i in range(5)]
    assert len({tuple(A.flatten().tolist()) for A in others}) == 5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_default_device_of_the_callers_plays_no_part(direction):
    factors, config = exact(gradient((48, 20))), InitConfig(direction=direction)
    expected = begin(factors, config)
    with torch.device("meta"):
        got = start(factors, RANK, config, scaling=SCALING, name="layer", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_random_is_the_same_in_another_process():
    code = (
        "import torch; from loraga.config import InitConfig; from loraga.factors import Factors;"
        "from loraga.recipes import start;"
        "A, B = start(Factors(torch.eye(9)[:, :8], torch.ones(8), torch.eye(8)), 4,"
        " InitConfig(direction='random', scale='unit'), scaling=1.0, name='q_proj', seed=3);"
        "print(A.argmax(1).tolist(), B.argmax(0).tolist())"
    )
    root = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("loss_scale", [1e-20, 1e15])
@pytest.mark.parametrize("config", [InitConfig(), InitConfig(scale="weight-svd"), InitConfig(method="lora-one")])
def test_the_scale_of_the_gradient_does_not_matter(config, loss_scale):
    G = gradient((19, 53))
    A, B = begin(exact(G), config)
    A_scaled, B_scaled = begin(exact(G * loss_scale), config)
    torch.testing.assert_close(B_scaled @ A_scaled, B @ A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B_scaled.norm(dim=0), B.norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_one_is_the_best_rank_r_step_downhill(shape):
    G = gradient(shape)
    A, B = begin(exact(G), InitConfig(method="lora-one", lora_one_gamma=128.0))
    assert A.shape == (RANK, shape[1]) and B.shape == (shape[0], RANK)
    U, S, Vh = torch.linalg.svd(G)
    step = -(U[:, :RANK] * S[:RANK]) @ Vh[:RANK] / (128.0 * S[0])
    torch.testing.assert_close((B @ A).double(), step, rtol=1e-5, atol=1e-7)
    assert ((B @ A).double() * G).sum() < 0
    # Both sides carry the same share: |column i of B| = |row i of A|.
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-5, atol=0)


def test_lora_one_lowers_the_loss_of_a_least_squares_layer():
    X, W, target = gradient((64, 20), 1), gradient((48, 20), 2), gradient((64, 48), 3)

    def loss(weight):
        return (X @ weight.T - target).square().mean()

    G = 2 * (X @ W.T - target).T @ X / target.numel()
    A, B = begin(exact(G), InitConfig(method="lora-one"))
    assert loss(W + (B @ A).double()) < loss(W)


def test_rank_deficient_gradient_still_gives_orthonormal_starts():
    G = gradient((48, 2)) @ gradient((2, 20), seed=1)
    A, B = begin(exact(G), InitConfig(scale="unit"))
    eye = torch.eye(RANK)
    torch.testing.assert_close(A @ A.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(B.T @ B, eye, rtol=0, atol=1e-5)
    A, B = begin(exact(G), InitConfig(method="lora-one"))
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert torch.linalg.matrix_rank(B @ A, rtol=1e-5) == 2


def test_starts_own_their_memory():
    """A slice that shares storage with the factors would keep all of them alive and change with them."""
    factors = exact(gradient((48, 20)))
    for config in (InitConfig(scale="unit"), InitConfig(method="lora-one")):
        A, B = begin(factors, config)
        A.zero_()
        B.zero_()
        assert float(factors.Vh.norm()) > 1 and float(factors.U.norm()) > 1


@pytest.mark.parametrize("shape, rank, largest", [((10, 64), 6, 5), ((64, 10), 8, 5), ((11, 11), 6, 5)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rank_too_large_names_the_layer_and_the_largest_rank(shape, rank, largest, direction):
    config = InitConfig(direction=direction)
    with pytest.raises(ValueError) as error:
        check_rank("blocks.3.fc", shape, rank, config)
    message = str(error.value)
    assert "blocks.3.fc" in message and f"r={rank}" in message and str(shape) in message
    assert f"largest usable r here is {largest}:" in message
    check_rank("blocks.3.fc", shape, largest, config)


def test_rank_limits_of_lora_one_and_of_tiny_layers():
    lora_one = InitConfig(method="lora-one")
    check_rank("fc", (10, 64), 10, lora_one)
    with pytest.raises(ValueError, match="largest usable r here is 10:"):
        check_rank("fc", (10, 64), 11, lora_one)
    with pytest.raises(ValueError, match="no r is small enough: leave the layer out"):
        check_rank("score", (1, 64), 1, InitConfig())
    with pytest.raises(ValueError, match="'fc': rank r=0 must be at least 1"):
        check_rank("fc", (10, 64), 0, lora_one)


def test_start_refuses_what_it_cannot_do():
    factors = exact(gradient((48, 20)))
    with pytest.raises(ValueError, match=r"'layer'.*r=4 needs 8 singular triplets, the factors hold 7"):
        begin(factors.truncated(7), InitConfig())
    with pytest.raises(ValueError, match=r"'layer'.*too small for r=4"):
        begin(exact(gradient((6, 20))), InitConfig())
    for given in (None, torch.ones(RANK + 1)):
        with pytest.raises(ValueError, match=r"'layer'.*needs the 4 largest singular values"):
            begin(factors, InitConfig(scale="weight-svd"), weight_sigma=given)
    for scale in ("gd", "weight-svd"):
        for scaling in (0.0, -2.0, float("nan")):
            with pytest.raises(ValueError, match=r"'layer'.*divides by PEFT's scaling"):
                begin(factors, InitConfig(scale=scale), scaling=scaling)
    zero = Factors(factors.U, torch.zeros_like(factors.S), factors.Vh)
    with pytest.raises(ValueError, match=r"'layer'.*largest singular value of the gradient is 0\.0"):
        begin(zero, InitConfig(method="lora-one"))
