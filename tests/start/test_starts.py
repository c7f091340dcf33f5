"""Starts on one layer, without PEFT: their rows, their first step, and 20 steps beside the paper's own version."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import SHAPES, exact, gradient

from loraga.config import DIRECTIONS, SCALES, InitConfig
from loraga.start import starts

R, SCALING = 6, 4.0
METHODS = [InitConfig(), InitConfig(start="zero-b"), InitConfig(method="lora-one")]


def begin(G, config, rank=R, **kwargs):
    options = {"scaling": SCALING, "growth": 2.0, "name": "layer", "seed": 0}
    return starts.start(exact(G), rank, config, **{**options, **kwargs})


def rows_of(A, B):
    """How many rows are pairs that cancel, how many have a zero column of B, and the rest."""
    zero = [not B[:, i].any() for i in range(len(A))]
    alone = [i for i in range(len(A)) if not zero[i]]
    pairs = sum(torch.equal(A[i], A[j]) and torch.equal(B[:, i], -B[:, j]) for i in alone for j in alone if j > i)
    return pairs, sum(zero), len(alone) - 2 * pairs


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mirror_is_the_recipe_twice(shape, direction):
    A, B = begin(gradient(shape), InitConfig(direction=direction))
    p, size = R // 2, shape[0] ** 0.25 / 4
    assert A.shape == (R, shape[1]) and B.shape == (shape[0], R)
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(A[:p], A[p:]) and torch.equal(B[:, :p], -B[:, p:])
    eye = torch.eye(p)
    torch.testing.assert_close(A[:p] @ A[:p].T, eye * size**2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B[:, :p].T @ B[:, :p], eye * size**2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_of_mirror_is_the_best_of_rank_r(shape, direction):
    """With p pairs, B0 and A0 together hold the first 2p = r directions: no matrix of rank r comes closer to G."""
    G = gradient(shape)
    A, B = (t.double() for t in begin(G, InitConfig(direction=direction, scale="gd")))
    step = SCALING**2 * (B @ (B.T @ G) + (G @ A.T) @ A)
    torch.testing.assert_close((G - step).norm(), torch.linalg.svdvals(G)[R:].norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale, size", [("stable", 2 * 48**0.25 / 4), ("unit", 1.0), ("gd", 1 / SCALING)])
def test_zero_b_takes_the_leading_right_directions(scale, size):
    G = gradient((48, 20))
    A, B = begin(G, InitConfig(start="zero-b", scale=scale))
    torch.testing.assert_close(A, size * exact(G).Vh[:R], rtol=1e-6, atol=1e-7)
    assert B.shape == (48, R) and not B.any()


@pytest.mark.parametrize("direction, unused", [("ArB2r", 2), ("A2rBr", 0), ("ArBr", 0)])
def test_an_odd_rank_gets_one_more_right_direction(direction, unused):
    G = gradient((48, 20))
    A, B = begin(G, InitConfig(direction=direction), rank=5)
    assert rows_of(A, B) == (2, 1, 0)
    # as long as a row of zero-b: both halves of a pair together move the weight as far as this row alone
    torch.testing.assert_close(A[4], 2 * 48**0.25 / 4 * exact(G).Vh[unused], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "shape, rank, config, wanted, rows",
    [
        ((48, 20), 1, InitConfig(), 1, (0, 1, 0)),
        ((48, 20), 2, InitConfig(), 2, (1, 0, 0)),
        ((48, 20), 3, InitConfig(), 2, (1, 1, 0)),
        ((48, 20), 8, InitConfig(), 8, (4, 0, 0)),
        ((48, 20), 8, InitConfig(start="zero-b"), 8, (0, 8, 0)),
        ((48, 20), 8, InitConfig(method="lora-one"), 8, (0, 0, 8)),
        # a classifier with five outputs: as many pairs as there are, then single rows, and one row left to PEFT
        ((5, 64), 8, InitConfig(), 5, (2, 3, 0)),
        ((64, 5), 8, InitConfig(), 5, (2, 3, 0)),
        ((5, 64), 8, InitConfig(start="zero-b"), 5, (0, 5, 0)),
        ((5, 64), 8, InitConfig(method="lora-one"), 5, (0, 0, 5)),
        ((5, 64), 5, InitConfig(), 4, (2, 1, 0)),
        ((7, 64), 8, InitConfig(), 7, (3, 2, 0)),
        ((1, 64), 8, InitConfig(), 1, (0, 1, 0)),
        ((1, 1), 16, InitConfig(), 1, (0, 1, 0)),
    ],
)
def test_rows_of_layers_with_few_directions(shape, rank, config, wanted, rows):
    assert starts.triplets(config, rank, shape) == wanted
    factors = exact(gradient(shape), wanted)
    A, B = starts.start(factors, rank, config, scaling=SCALING, growth=2.0, name="layer", seed=0)
    assert A.shape == (sum(rows) + rows[0], shape[1]) and B.shape == (shape[0], len(A))
    assert len(A) <= rank and rows_of(A, B) == rows
    if config.method == "lora-ga":
        assert (B @ A).abs().max() < 1e-7
    kept = torch.linalg.matrix_rank(torch.cat([A, A.new_zeros(1, shape[1])]))
    assert kept == min(wanted, rows[0] + rows[1] + rows[2])  # no row says what another says already


@pytest.mark.parametrize("scale", SCALES)
def test_weight_svd_of_a_small_layer_needs_no_more_values_than_there_are(scale):
    A, B = begin(gradient((5, 64)), InitConfig(scale=scale), rank=8, weight_sigma=torch.ones(5))
    assert A.isfinite().all() and rows_of(A, B) == (2, 3, 0)


# -------------------------------------------------------------------------------------------------- what may not matter


@pytest.mark.parametrize("loss_scale", [1e-20, 1e15])
@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method}-{config.start}")
def test_the_scale_of_the_gradient_does_not_matter(config, loss_scale):
    G = gradient((19, 53))
    for scaled, plain in zip(begin(G * loss_scale, config), begin(G, config), strict=True):
        torch.testing.assert_close(scaled.norm(), plain.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled.abs(), plain.abs(), rtol=1e-4, atol=1e-5)


def test_rank_deficient_gradients_give_finite_orthogonal_starts():
    G = gradient((48, 2)) @ gradient((2, 20), seed=1)
    A, B = begin(G, InitConfig(scale="unit"))
    eye = torch.eye(R // 2)
    torch.testing.assert_close(A[:3] @ A[:3].T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(B[:, :3].T @ B[:, :3], eye, rtol=0, atol=1e-5)
    A, B = begin(G, InitConfig(method="lora-one"))
    assert A.isfinite().all() and B.isfinite().all()
    assert torch.linalg.matrix_rank(B @ A, rtol=1e-5) == 2


@pytest.mark.parametrize("config", METHODS, ids=lambda config: f"{config.method}-{config.start}")
def test_starts_own_their_memory(config):
    """A slice that shares storage with the factors would keep all of them alive and change with them."""
    factors = exact(gradient((48, 20)))
    for tensor in starts.start(factors, R, config, scaling=SCALING, growth=2.0, name="layer", seed=0):
        tensor.zero_()
    assert float(factors.Vh.norm()) > 1 and float(factors.U.norm()) > 1


def test_start_refuses_what_it_cannot_do():
    factors = exact(gradient((48, 20)))
    with pytest.raises(ValueError, match=r"'layer'.*r=6 needs 6 singular triplets, the factors hold 5"):
        starts.start(factors.truncated(5), R, InitConfig(), scaling=SCALING, growth=2.0, name="layer", seed=0)
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        starts.triplets(InitConfig(), 0, (48, 20))


# --------------------------------------------------------------------------------------- beside the paper's own version

ALPHA, M, N = 24.0, 17, 29


class Layer:
    """A least-squares layer with an adapter, in float64, trained on batches of its own."""

    def __init__(self, W, A, B, scaling):
        self.W, self.scaling = W, scaling
        self.A, self.B = (t.clone().requires_grad_() for t in (A, B))

    def weight(self):
        return self.W + self.scaling * self.B @ self.A

    def train(self, optimizer, steps=20):
        generator = torch.Generator().manual_seed(3)
        X = torch.randn(steps, 64, N, generator=generator, dtype=torch.float64)
        Y = torch.randn(steps, 64, M, generator=generator, dtype=torch.float64)
        for x, y in zip(X, Y, strict=True):
            optimizer.zero_grad()
            (x @ self.weight().T - y).square().mean().backward()
            optimizer.step()
        return self.weight().detach()


def scaling_of(rank, rslora):
    return ALPHA / (math.sqrt(rank) if rslora else rank)


def both(start, rslora):
    """Our start at rank r and, written out, LoRA-GA's at r/2 with the same alpha, which changes the base."""
    W, G = gradient((M, N), 7), gradient((M, N), 8)
    p, factors = R // 2, exact(G)
    config = InitConfig(start=start)
    s_r, s_p = scaling_of(R, rslora), scaling_of(p, rslora)
    A, B = starts.start(factors, R, config, scaling=s_r, growth=s_p / s_r, name="layer", seed=0)
    c = M**0.25 / math.sqrt(config.stable_gamma)
    A0, B0 = c * factors.Vh[:p].double(), c * factors.U[:, p : 2 * p].double()
    return Layer(W, A.double(), B.double(), s_r), Layer(W - s_p * B0 @ A0, A0, B0, s_p), W


def change(layer, W, make, rate):
    return layer.train(make([layer.A, layer.B], rate)) - W


def adamw(parameters, rate):
    # eps must not matter: the gradients of the two versions differ by a factor
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, eps=1e-30)


def sgd(parameters, rate):
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make, factor, rate", [(adamw, 1.0, 2e-4), (sgd, 2.0, 2e-5)], ids=["adamw", "sgd"])
def test_mirror_takes_the_steps_of_the_papers_version(make, factor, rate, rslora):
    """Weights after 20 steps differ by a higher order of the rate: half of the rate, a quarter of the difference.

    Plain gradient descent moves the mirror half as far at the same rate (docs/starts.md), so it gets twice the rate.
    """
    differences, changes = [], []
    for halved in (rate, rate / 2):
        mirror, paper, W = both("mirror", rslora)
        ours, theirs = change(mirror, W, make, factor * halved), change(paper, W, make, halved)
        differences.append(float((ours - theirs).norm()))
        changes.append(float(theirs.norm()))
    assert differences[0] < 0.05 * changes[0]
    assert changes[1] > 0.45 * changes[0]
    assert differences[1] < 0.3 * differences[0]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_step_of_adam_has_the_papers_size(rslora):
    """mirror: the very same change of the weight. zero-b: the same on the part that B makes, with r directions."""
    rate = 1e-7
    steps = {}
    for start in ("mirror", "zero-b"):
        ours, paper, W = both(start, rslora)
        steps[start] = ours.train(adamw([ours.A, ours.B], rate), steps=1) - W
        steps["paper"] = paper.train(adamw([paper.A, paper.B], rate), steps=1) - W
    torch.testing.assert_close(
        steps["mirror"], steps["paper"], rtol=1e-4, atol=1e-4 * float(steps["paper"].abs().max())
    )
    ours, paper, W = both("zero-b", rslora)
    on_A0 = paper.A.detach() / paper.A.detach().norm(dim=1, keepdim=True)
    # what moves along A0's directions is what B learns; there every entry of B moves by the rate in both versions
    torch.testing.assert_close(
        (steps["zero-b"] @ on_A0.T).norm(),
        ours.scaling * ours.A[0].detach().norm() * rate * math.sqrt(M * (R // 2)),
        rtol=1e-3,
        atol=0,
    )
    sizes = [layer.scaling * float(layer.A[0].detach().norm()) for layer in (ours, paper)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


@pytest.mark.parametrize("start", ["mirror", "zero-b"])
def test_gd_takes_the_projected_step_of_full_fine_tuning(start):
    """scale="gd": one step of plain gradient descent moves W along its gradient, projected, at the same rate."""
    W, rate = gradient((M, N), 7), 1e-8
    X, Y = gradient((64, N), 1), gradient((64, M), 2)
    G = 2 * (X @ W.T - Y).T @ X / Y.numel()
    A, B = begin(G, InitConfig(start=start, scale="gd"))
    layer = Layer(W, A.double(), B.double(), SCALING)
    (X @ layer.weight().T - Y).square().mean().backward()
    with torch.no_grad():
        layer.A -= rate * layer.A.grad
        layer.B -= rate * layer.B.grad
        step = (layer.weight() - W) / -rate
    U, S, Vh = torch.linalg.svd(G)
    best = (U[:, :R] * S[:R]) @ Vh[:R]
    torch.testing.assert_close(step, best, rtol=0, atol=1e-5 * float(S[0]))
