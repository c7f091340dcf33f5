"""The ops' contracts: schema, fakes, checks, and the torch reference against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraga.ops import declared, reference

SHAPES = [(64, 32, 48), (33, 17, 50), (7, 90, 20), (1, 5, 3)]  # T, n, m
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(tokens: int, n: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)


def tall(kind: str, m: int, k: int) -> torch.Tensor:
    if kind == "zero":
        return torch.zeros(m, k)
    if kind == "rank one":
        return torch.randn(m, 1) @ torch.randn(1, k)
    if kind == "equal columns":
        return torch.randn(m, 1).expand(m, k).contiguous()
    if kind == "zero columns":
        return torch.randn(m, k) * (torch.arange(k) % 2)
    if kind == "scaled columns":
        return torch.randn(m, k) * torch.logspace(-30, 30, k)
    if kind == "tiny":
        return torch.randn(m, k) * 1e-36
    if kind == "huge":
        return torch.randn(m, k) * 1e36
    if kind == "identity":
        return torch.eye(m, k)
    if kind == "sparse":
        return torch.randn(m, k) * (torch.arange(m) < 13)[torch.randperm(m), None]
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q
    return (u * torch.logspace(0, -float(kind), k, dtype=torch.float64) @ v.T).float()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("test_matrix_", lambda: (torch.empty(5, 3), 7)),
        ("commit_", lambda: tuple(torch.randn(2, *s) for s in ((6, 2), (2, 4), (6, 1), (6, 2), (2, 4), (6, 3)))),
        ("accumulate_", lambda: (torch.zeros(6, 4), torch.randn(9, 4), torch.randn(9, 6), 0.5)),
        ("basis", lambda: (torch.randn(2, 9, 4),)),
        ("basis", lambda: (torch.randn(2, 9, 4), 1)),
        ("orthonormalize", lambda: (torch.randn(2, 9, 4),)),
        ("subspace", lambda: (torch.randn(2, 9, 7), 4, 1, [1, 2])),
        ("subspace", lambda: (torch.randn(2, 7, 9).bfloat16().mT, 4, 1, [1, 2])),
        ("small_svd", lambda: (torch.randn(2, 4, 4),)),
        ("cholesky_inverse", lambda: (torch.eye(4).repeat(2, 1, 1), 1e-3)),
        ("cholesky_inverse", lambda: (torch.eye(4, dtype=torch.float64).repeat(2, 1, 1), 1e-3)),
        ("gradient_add_", lambda: (torch.zeros(6, 4), torch.randn(6, 2, 2), 0.5, None)),
        ("gradient_add_", lambda: (torch.zeros(6, 4), torch.randn(6, 2, 2), 0.5, torch.tensor(False))),
    ],
)
def test_registration(op, args):
    """Schema, mutation, fake and real outputs agree (torch.library.opcheck)."""
    overload = getattr(torch.ops.loraga, op).default
    torch.library.opcheck(overload, args(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: declared.test_matrix_(torch.empty(3), 0), "matrix"),
        (lambda: declared.commit_(*(torch.zeros(1, 3, 2) for _ in range(6))), "do not fit"),
        (lambda: declared.commit_(*(torch.zeros(1, 3, 2).half() for _ in range(6))), "float32"),
        (lambda: declared.commit_(*(torch.zeros(3, 2) for _ in range(6))), "batch of matrices"),
        (lambda: declared.commit_(*(torch.zeros(1, 2, 3).mT for _ in range(6))), "contiguous"),
        (lambda: declared.accumulate_(torch.zeros(4, 5), torch.randn(2, 4), torch.randn(3, 5)), "share T"),
        (lambda: declared.accumulate_(torch.zeros(5, 4), torch.randn(3, 4), torch.randn(3, 5).half()), "share one"),
        (lambda: declared.accumulate_(torch.zeros(4, 5), torch.randn(3, 4), torch.randn(3, 5)), r"\(5, 4\)"),
        (lambda: declared.orthonormalize(torch.randn(3, 4)), "m >= k"),
        (lambda: declared.orthonormalize(torch.randn(4, 3).double()), "float32"),
        (lambda: declared.basis(torch.randn(3, 4)), "m >= k"),
        (lambda: declared.basis(torch.randn(4, 3).half()), "float32"),
        (lambda: declared.basis(torch.randn(4, 3), 3), "1 or 2, got 3"),
        (lambda: declared.subspace(torch.randn(3, 4), 2, 1, [0]), r"\(b, m, n\)"),
        (lambda: declared.subspace(torch.randn(1, 5, 4), 5, 1, [0]), "min"),
        (lambda: declared.subspace(torch.randn(2, 5, 4), 2, 1, [0]), "2 seeds"),
        (lambda: declared.small_svd(torch.randn(3, 4)), "k, k"),
        (lambda: declared.cholesky_inverse(torch.eye(3).half()), "float32 or float64"),
        (
            lambda: declared.cholesky_inverse(torch.eye(3).double(), -1.0),
            "shift must be finite and not negative, got -1",
        ),
        (
            lambda: declared.gradient_add_(torch.zeros(2).half(), torch.zeros(2)),
            "float32 or bfloat16, got torch.float16",
        ),
        (lambda: declared.gradient_add_(torch.zeros(4, 2).T, torch.zeros(2, 4)), "total must be contiguous"),
        (lambda: declared.gradient_add_(torch.zeros(4), torch.zeros(2, 3)), r"the 4 entries of total, got .* \(2, 3\)"),
        (lambda: declared.gradient_add_(torch.zeros(4), torch.zeros(4), 1.0, torch.ones(1)), "0-dim bool"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_philox_known_answers():
    """Known-answer vectors of Philox4x32-10 published with Random123 (zero and all-ones counter and key)."""
    words = reference.philox(torch.zeros(1, dtype=torch.int64), 0)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_test_matrix_is_uniform_independent_and_by_position():
    a = declared.test_matrix_(torch.empty(300, 200), 5)
    assert a.min() >= -1 and a.max() < 1
    assert abs(float(a.mean())) < 0.01 and abs(float(a.var()) * 3 - 1) < 0.01
    assert torch.linalg.matrix_norm(a, 2) < 1.15 * (300**0.5 + 200**0.5) / 3**0.5  # no hidden structure
    # the same stream laid out otherwise; another seed is another stream
    assert torch.equal(declared.test_matrix_(torch.empty(200, 300), 5).view(-1), a.view(-1))
    b = declared.test_matrix_(torch.empty(300, 200), 6)
    assert abs(float((a * b).mean())) < 0.01


def test_test_matrix_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    declared.test_matrix_(torch.empty(10, 10), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("poison", [None, 1, 2])
@pytest.mark.parametrize("b", [1, 3])
def test_commit_is_all_or_nothing_in_each_layer(b, poison, bad):
    """The poisoned entry of the last layer is in new_z (1), or in the column of `left` that belongs to a probe (2)."""
    (m, n, k, p) = (7, 9, 3, 2)
    old = [torch.randn(b, m, k), torch.randn(b, k, n), torch.randn(b, m, p)]
    new = [torch.randn(b, m, k), torch.randn(b, k, n), torch.randn(b, k + p, m).mT]
    if poison is not None:
        new[poison][-1, -1, -1] = bad
    state = [t.clone() for t in old]
    finite = declared.commit_(*state, *new)
    assert finite.tolist() == [True] * (b - 1) + [poison is None]
    for layer, replaced in enumerate(finite.tolist()):
        fresh = [new[0][layer], new[1][layer], old[2][layer] + new[2][layer, :, k:]]
        for got, kept, wanted in zip(state, old, fresh, strict=True):
            assert torch.equal(got[layer], wanted if replaced else kept[layer])


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n", "m"), SHAPES)
def test_accumulate_against_float64(tokens, n, m, dtype, buffer):
    x, dy = pair(tokens, n, m, dtype)
    g = torch.randn(m, n).to(buffer)
    truth = g.double() + 0.25 * (dy.double().T @ x.double())
    assert bool(declared.accumulate_(g, x, dy, 0.25))
    unit = 2.0**-8 if buffer == torch.bfloat16 else 2.0**-20
    assert (g.double() - truth).abs().max() <= unit * truth.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_accumulate_leaves_a_poisoned_batch_out(bad, where):
    x, dy = pair(8, 5, 6, torch.float32)
    (x if where == "x" else dy)[3, 2] = bad
    g = torch.randn(6, 5)
    before = g.clone()
    assert not bool(declared.accumulate_(g, x, dy))
    assert torch.equal(g, before)


KINDS = (
    "zero",
    "rank one",
    "equal columns",
    "zero columns",
    "scaled columns",
    "tiny",
    "huge",
    "identity",
    "sparse",
    "3",
    "7",
    "14",
)


@pytest.mark.parametrize("shape", [(200, 80), (80, 80), (100, 80), (33, 7), (5, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_orthonormalize_any_input(shape, kind):
    y = tall(kind, *shape)
    q = declared.orthonormalize(y).double()
    assert (q.T @ q - torch.eye(shape[1])).norm(2) < 1e-6
    unit = y.double() / y.double().norm(dim=0).clamp_min(1e-300)
    assert (unit - q @ (q.T @ unit)).norm() < 2e-5  # the range is kept


def with_jitter(y: torch.Tensor) -> torch.Tensor:
    """What orthonormalize factorizes in place of the square block `y`, in float64."""
    noise = reference.directions(*y.shape[-2:], y.device).double()
    return y.double() + noise * (reference.JITTER * y.double().norm(dim=-2, keepdim=True))


def cancelled(k: int, seed: int) -> torch.Tensor:
    """A square block that is singular to 15 digits once the jitter is added to it.

    Its determinant is linear in each entry, and an entry that is nearly zero can be set more finely than others.
    """
    y = torch.randn(k, k, generator=torch.Generator().manual_seed(seed))
    y[0, 1] = 0.0
    for column in (0, 0, 1):
        y[0, column] -= float(1 / torch.linalg.inv(with_jitter(y))[column, 0])
    return y


@pytest.mark.parametrize("k", [20, 40, 80])
def test_orthonormalize_a_square_block_whose_jitter_cancels_a_direction(k):
    """Two passes of CholeskyQR would leave up to 1e-4."""
    y = torch.stack([cancelled(k, seed) for seed in range(6)])
    singular = torch.linalg.svdvals(with_jitter(y))
    assert (singular[:, -1] < 1e-15 * singular[:, 0]).all()
    q = declared.orthonormalize(y).double()
    assert (q.mT @ q - torch.eye(k)).norm(2, dim=(-2, -1)).max() < 1e-6


@pytest.mark.parametrize("rows", [1, 13, 79, 200])
@pytest.mark.parametrize("orthonormal", [declared.orthonormalize, declared.basis])
def test_tall_blocks_with_few_rows(orthonormal, rows):
    """The embedding of a large vocabulary of which a batch has few tokens: its Gram matrix cannot see the jitter."""
    y = torch.zeros(49152, 80)
    y[torch.randperm(len(y))[:rows]] = torch.randn(rows, 80)
    q = orthonormal(y).double()
    singular = torch.linalg.svdvals(q.T @ q).sqrt()
    assert singular[0] < 1 + 1e-4
    if orthonormal is declared.orthonormalize:
        assert singular[-1] > 1 - 1e-6
    else:  # directions that the block does not have are shorter, and there
        assert (singular[: min(rows, 80)] > 0.99).all() and singular[-1] > 0.01
    assert (y.double() - q @ torch.linalg.lstsq(q, y.double()).solution).norm() < 1e-4 * y.norm()


@pytest.mark.parametrize("shape", [(200, 80), (80, 80), (33, 7), (3, 1), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_basis_any_input(layout, kind, shape):
    """Directions above 1e-4 of the largest have length one to 1 %, none is longer, and the range is kept."""
    y = tall(kind, *shape)
    y = y if layout == "rows" else y.T.contiguous().T
    q = declared.basis(y).double()
    unit = y.double() / y.double().norm(dim=0).clamp_min(1e-300)
    u, s, _ = torch.linalg.svd(unit, full_matrices=False)
    strong = u[:, s > 1e-4 * s[0]] if s[0] > 0 else u[:, :0]
    assert torch.linalg.svdvals(q)[0] < 1 + 1e-4
    if strong.shape[1]:
        assert torch.linalg.svdvals(q.T @ strong)[-1] > 0.99
    assert q.isfinite().all() and q.is_contiguous()


@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_basis_of_a_good_block_is_orthonormal(condition):
    u, v = (torch.linalg.qr(torch.randn(size, 80, dtype=torch.float64)).Q for size in (700, 80))
    y = (u * torch.logspace(0, -1, 80, base=condition, dtype=torch.float64) @ v.T).float()
    q = declared.basis(y).double()
    assert (q.T @ q - torch.eye(80)).norm(2) < (1e-4 if condition == 1e1 else 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_basis_of_one_pass(kind):
    """Strong directions have length one, none is longer, and what the block has is in the range of Q."""
    y = tall(kind, 200, 80)
    q = declared.basis(y, passes=1).double()
    unit = y.double() / y.double().norm(dim=0).clamp_min(1e-300)
    u, s, _ = torch.linalg.svd(unit, full_matrices=False)
    values = torch.linalg.svdvals(q)
    assert values[0] < 1 + 1e-4 and values[-1] > 1e-5
    if s[0] > 0:
        assert torch.linalg.svdvals(q.T @ u[:, s > 3e-2 * s[0]])[-1] > 0.99
    assert (unit - q @ torch.linalg.lstsq(q, unit).solution).norm() < 1e-4 * max(1.0, float(unit.norm()))


def test_basis_of_a_batch_is_that_of_each_block():
    y = torch.randn(3, 90, 20)
    y[1] = 0
    for one, of_batch in zip(y, declared.basis(y), strict=True):
        assert torch.equal(declared.basis(one), of_batch)


def test_cached_directions_are_those_of_the_shape_and_can_be_freed():
    q = declared.basis(torch.zeros(50, 3))
    assert torch.allclose(q, reference.directions(50, 3, q.device), atol=1e-6)
    assert reference._cached_directions.cache_info().currsize > 0
    reference.forget()
    assert reference._cached_directions.cache_info().currsize == 0


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 70),
    share=st.floats(0.0, 1.0),
    decay=st.floats(0.0, 10.0),
    scale=st.integers(-30, 30),
    batch=st.integers(0, 3),
    seed=st.integers(0, 2**30),
)
def test_orthonormalize_property(m, share, decay, scale, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * m))
    y = torch.randn(batch, m, k, generator=generator) * torch.logspace(0, -decay, k) * 10.0**scale
    q = declared.orthonormalize(y).double()
    assert q.shape == y.shape
    if batch:
        assert (q.mT @ q - torch.eye(k)).norm(2, dim=(-2, -1)).max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "slice"])
@pytest.mark.parametrize(("b", "m", "n", "k"), [(0, 8, 8, 3), (1, 64, 64, 64), (3, 50, 37, 12), (3, 37, 50, 37)])
def test_subspace(b, m, n, k, layout, dtype):
    """Q orthonormal, Z its coordinates; a space that holds all of a matrix of rank k, from any strides."""
    exact = torch.randn(b, m, k, dtype=torch.float64) @ torch.randn(b, k, n, dtype=torch.float64)
    g = {
        "rows": lambda: exact.to(dtype),
        "columns": lambda: exact.mT.contiguous().to(dtype).mT,
        "slice": lambda: torch.full((b, m, 2 * n), torch.nan, dtype=dtype).index_copy_(
            2, torch.arange(0, 2 * n, 2), exact.to(dtype)
        )[:, :, ::2],
    }[layout]()
    before = g.clone()
    q, z = declared.subspace(g, k, 2, list(range(b)))
    assert q.shape == (b, m, k) and z.shape == (b, k, n) and torch.equal(g, before)
    if b:
        g, q, z = g.double(), q.double(), z.double()
        size = g.norm(dim=(-2, -1), keepdim=True)
        assert (q.mT @ q - torch.eye(k)).abs().max() < 1e-6
        assert ((z - q.mT @ g) / size).abs().max() < (1e-6 if dtype == torch.float32 else 1e-5)
        left = (g - q @ z).norm(dim=(-2, -1))
        assert (left < 1.1 * torch.linalg.svdvals(g)[:, k:].norm(dim=-1) + 1e-5 * size.flatten()).all()


def test_subspace_copies_no_batch():
    """One matrix is widened at a time, and only of half precision; float32 is used as it lies."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                made.append(out.numel())
            return out

    for dtype, most in ((torch.float32, 60 * 50), (torch.bfloat16, 60 * 50 + 1)):
        made.clear()
        g = torch.randn(4, 60, 50).to(dtype)
        with Watch():
            reference.subspace(g, 3, 1, [0, 1, 2, 3])
        assert 0 < max(made) < most


@pytest.mark.parametrize("k", [1, 2, 17, 40])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_small_svd(k, scale):
    core = torch.randn(3, k, k) * scale
    core[1] = 0
    core[2, :, k // 2 :] = 0
    u, s, vh = declared.small_svd(core)
    assert (u * s[..., None, :] @ vh - core).abs().max() <= 2e-6 * core.abs().max()
    truth = torch.linalg.svdvals(core.double())
    assert (s.double() - truth).abs().max() <= 1e-6 * truth.max()
    eye = torch.eye(k)
    assert (u.mT @ u - eye).abs().max() < 1e-5 and (vh @ vh.mT - eye).abs().max() < 1e-5


def test_small_svd_of_nan_neither_raises_nor_looks_sound():
    core = torch.randn(2, 4, 4)
    core[0, 1, 1] = float("nan")
    _, s, _ = declared.small_svd(core)
    assert s[0].isnan().all() and s[1].isfinite().all()


@pytest.mark.parametrize("k", [1, 7, 80, 300])
def test_cholesky_inverse_in_float32(k):
    y = torch.randn(3, 2 * k + 3, k)
    gram = y.mT @ y
    inverse = declared.cholesky_inverse(gram, 1e-7)
    exact = torch.linalg.inv(torch.linalg.cholesky(gram.double() + 1e-7 * k * (2 * k + 3) * torch.eye(k)))
    assert inverse.dtype == torch.float32 and torch.equal(inverse, inverse.tril())
    assert (inverse - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("condition", [1e2, 1e10])
@pytest.mark.parametrize("k", [1, 7, 80])
def test_cholesky_inverse(k, condition):
    q = torch.linalg.qr(torch.randn(3, k, k, dtype=torch.float64)).Q
    gram = (q * torch.logspace(0, -1, k, base=condition, dtype=torch.float64)) @ q.mT
    inverse = declared.cholesky_inverse(gram, 1e-12)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(k, dtype=torch.float64)
    assert torch.equal(inverse, inverse.tril())
    assert (inverse @ (gram + 1e-12 * trace * eye) @ inverse.mT - eye).abs().max() < 1e-13 * k * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_inverse_of_what_has_none_is_nan(dtype):
    bad = torch.eye(4, dtype=dtype).repeat(5, 1, 1)
    bad[1, 2, 2], bad[2, 0, 0], bad[3, 3, 0], bad[4, 0, 0] = -1.0, 0.0, torch.nan, torch.inf
    inverse = declared.cholesky_inverse(bad)
    assert torch.equal(inverse[0], bad[0]) and inverse[1:].isnan().all()


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 700, 5, 17), (100_000, 3), (5,), (), (0, 4)])
def test_gradient_add(shape, dtype, buffer):
    gradient = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    total = torch.randn(gradient.numel()).to(buffer)
    exact = total.double() + 0.25 * gradient.double().reshape(-1)
    assert bool(declared.gradient_add_(total, gradient, 0.25))
    assert torch.equal(total, exact.float().to(buffer))
    if gradient.numel():
        before = total.clone()
        (gradient if gradient.dim() else gradient[None])[..., -1:] = torch.inf
        assert not bool(declared.gradient_add_(total, gradient)) and torch.equal(total, before)
        assert not bool(declared.gradient_add_(total, torch.ones_like(gradient), 1.0, torch.tensor(False)))
        assert torch.equal(total, before)
