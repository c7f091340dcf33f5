"""Single operations on the layers of named models: ours, what torch offers, and the peer's way, with the error of each.

    python -m pytest benchmarks/operations.py --benchmark-json benchmarks/results/operations-cpu.json
    python benchmarks/operations.py --table benchmarks/results/operations-cpu.json

On a GPU all models take part and results wait for the device; on a CPU the small ones do, and the rest is deselected.
r is the number of singular triplets: those of an adapter of rank r here, of rank r/2 in PEFT and the official code.
`error` is relative to float64: largest entry (accumulation), |QᵀQ - I| (orthonormalize), singular values over the
largest (small SVD), energy that the factors fail to capture of what the best ones of that rank hold (all others).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import _machine

from loraga.estimators import LayerSpec, Streaming, finish, sketch_width
from loraga.linalg import truncated_svd
from loraga.ops import declared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOKENS = 8192 if DEVICE == "cuda" else 1024
BATCHES = 4
# model: (out_features, in_features) of its largest layers
LAYERS = {
    "MiniLM": [(384, 384), (1536, 384)],
    "T5-base": [(768, 768), (3072, 768)],
    "Llama-2-7B": [(4096, 4096), (11008, 4096)],
    "Llama-3-8B": [(1024, 4096), (14336, 4096)],
    "Llama-2-70B": [(8192, 8192), (28672, 8192)],
}
ON_CPU = ("MiniLM", "T5-base")
RANKS = (16, 64, 256)


def spec(m: int, n: int, rank: int) -> LayerSpec:
    return LayerSpec("layer", m, n, rank, 1, torch.device(DEVICE))


def rows() -> list[Any]:
    return [
        pytest.param(model, m, n, rank, id=f"{model}-{m}x{n}-r{rank}")
        for model, layers in LAYERS.items()
        if DEVICE == "cuda" or model in ON_CPU
        for m, n in layers
        for rank in RANKS
        if rank <= min(m, n)
    ]


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., Any]:
    """Time `run` (set up anew each round by `setup`), keep the shape and `error(result)` in the row."""

    def measure(run: Callable[..., Any], error: Callable[[Any], float], setup: Callable[[], Any], **info: Any) -> None:
        def wait(*args: Any) -> Any:
            result = run(*args)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return setup(), {}

        result = benchmark.pedantic(wait, setup=fresh, rounds=3, warmup_rounds=1)
        benchmark.extra_info.update(info, error=error(result), machine=_machine.describe())

    return measure


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def stream(m: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches (x, dy) whose gradients share a falling spectrum, as those of real layers do."""
    inner = min(m, n) // 2
    fall = (1.0 + torch.arange(inner, device=DEVICE)) ** -0.6
    right, left = normal(inner, n, seed=1), normal(inner, m, seed=2)
    pairs = []
    for i in range(BATCHES):
        code = normal(TOKENS, inner, seed=3 + i) * fall
        x = (code @ right + 0.1 * normal(TOKENS, n, seed=50 + i)).to(DTYPE)
        pairs.append((x, (code @ left + 0.1 * normal(TOKENS, m, seed=90 + i)).to(DTYPE)))
    return pairs


@functools.cache
def squares(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Squared singular values of `total(stream(m, n))`, rounded to `dtype`, in falling order, float64.

    As eigenvalues of the smaller Gram matrix, once for all tests of a shape: a GPU takes seconds for them, and minutes
    for the singular values themselves.
    """
    g = total(stream(m, n)).to(dtype).double()
    g = g if m <= n else g.mT
    return torch.linalg.eigvalsh(g @ g.mT).flip(0)


def lost(g: Tensor, u: Tensor, vh: Tensor, q: int) -> float:
    """Share of the energy of the best q triplets of g, a rounded `total(stream(m, n))`, that U and V do not capture."""
    core = u[:, :q].double().mT @ g.double() @ vh[:q].double().mT
    return float(1 - core.square().sum() / squares(*g.shape, g.dtype)[:q].sum())


def peer_svd(g: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U and Vh by `svd_lowrank` as PEFT and the official code call it: q = 2r, 4 iterations."""
    u, _, v = torch.svd_lowrank(g.float(), q=min(2 * rank, *g.shape), niter=4)
    return u, v.mT


def total(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return sum((dy.float().mT @ x.float() for x, dy in pairs[1:]), pairs[0][1].float().mT @ pairs[0][0].float())


@pytest.mark.parametrize("way", ["loraga", "torch"])
@pytest.mark.parametrize(("model", "m", "n", "rank"), [row for row in rows() if row.id.endswith("-r16")])
def test_accumulation(timed, model, m, n, rank, way):
    (x, dy), *_ = stream(m, n)

    def ours(g: Tensor) -> Tensor:
        declared.accumulate_(g, x, dy, 0.5)
        return g

    def torch_way(g: Tensor) -> Tensor:
        return g.add_((dy.mT @ x).mul_(0.5)) if torch.isfinite(x).all() and torch.isfinite(dy).all() else g

    truth = 0.5 * dy[:, :64].double().mT @ x.double()
    timed(
        ours if way == "loraga" else torch_way,
        lambda g: float((g[:64].double() - truth).abs().max() / truth.abs().max()),
        lambda: (torch.zeros(m, n, dtype=torch.bfloat16, device=DEVICE),),
        op="accumulation",
        way=way,
        model=model,
        m=m,
        n=n,
        tokens=TOKENS,
    )


@pytest.mark.parametrize("way", ["loraga", "gradient"])
@pytest.mark.parametrize(("model", "m", "n", "rank"), [row for row in rows() if Streaming.pays(spec(*row.values[1:]))])
def test_streaming_update(timed, model, m, n, rank, way):
    """One micro-batch onto a sketch beside one onto the gradient itself (a float32 buffer), which is exact."""
    pairs = stream(m, n)
    exact = total(pairs)

    def before() -> tuple[Any, ...]:
        if way == "gradient":
            return (total(pairs[:-1]),)
        estimator = Streaming(spec(m, n, rank), BATCHES)
        for x, dy in pairs[:-1]:
            estimator.update(x, dy)
        return (estimator,)

    def step(state: Any) -> Any:
        x, dy = pairs[-1]
        if way == "gradient":
            return state.add_((dy.mT @ x).float())
        state.update(x, dy)
        return state

    def error(state: Any) -> float:
        if way == "gradient":
            factors = truncated_svd(state, rank)
        else:
            factors = finish({"layer": state}, {"layer": 1.0})["layer"].factors
        return lost(exact, factors.U, factors.Vh, rank)

    timed(step, error, before, op="streaming update", way=way, model=model, m=m, n=n, rank=rank, tokens=TOKENS)


@pytest.mark.parametrize("way", ["loraga", "torch.linalg.qr"])
@pytest.mark.parametrize(("model", "m", "n", "rank"), rows())
def test_orthonormalize(timed, model, m, n, rank, way):
    k = min(sketch_width(rank), m)
    y = normal(m, k) @ normal(k, k, seed=1)
    run = declared.orthonormalize if way == "loraga" else (lambda y: torch.linalg.qr(y).Q)
    eye = torch.eye(k, dtype=torch.float64, device=DEVICE)
    timed(
        run,
        lambda q: float(torch.linalg.matrix_norm(q.double().mT @ q.double() - eye, 2)),
        lambda: (y,),
        op="orthonormalize",
        way=way,
        model=model,
        m=m,
        k=k,
        rank=rank,
    )


@pytest.mark.parametrize("way", ["loraga", "torch.svd_lowrank", "torch.linalg.svd"])
@pytest.mark.parametrize(("model", "m", "n", "rank"), rows())
def test_truncated_svd(timed, model, m, n, rank, way):
    if way == "torch.linalg.svd" and m * n > 2**22:
        pytest.skip("the full SVD of a layer of this size takes minutes")
    g = total(stream(m, n)).to(torch.bfloat16)

    def run(g: Tensor) -> tuple[Tensor, Tensor]:
        if way == "loraga":
            factors = truncated_svd(g, rank)
            return factors.U, factors.Vh
        if way == "torch.svd_lowrank":
            return peer_svd(g, rank)
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
        return u, vh

    timed(
        run,
        lambda result: lost(g, *result, rank),
        lambda: (g,),
        op="truncated SVD",
        way=way,
        model=model,
        m=m,
        n=n,
        rank=rank,
    )


@pytest.mark.parametrize("way", ["loraga", "torch.linalg.svd"])
@pytest.mark.parametrize("rank", RANKS[:2])
def test_small_svd(timed, rank, way):
    """The cores of 32 layers."""
    k = sketch_width(rank)
    cores = normal(32, k, k)
    truth = torch.linalg.svdvals(cores.double())
    run = declared.small_svd if way == "loraga" else torch.linalg.svd
    timed(
        run,
        lambda result: float((result[1].double() - truth).abs().max() / truth.max()),
        lambda: (cores,),
        op="small SVD",
        way=way,
        k=k,
        rank=rank,
        batch=32,
    )


@pytest.mark.parametrize("way", ["loraga", "peer"])
@pytest.mark.parametrize(("model", "m", "n", "rank"), rows())
def test_whole_layer(timed, model, m, n, rank, way):
    """All micro-batches of a layer to its factors; the peer sums gradients and takes `svd_lowrank` of the mean."""
    pairs = stream(m, n)
    exact = total(pairs)
    layer = spec(m, n, rank)

    def run() -> tuple[Tensor, Tensor]:
        if way == "loraga" and Streaming.pays(layer):
            estimator = Streaming(layer, BATCHES)
            for x, dy in pairs:
                estimator.update(x, dy)
            factors = finish({"layer": estimator}, {"layer": float(BATCHES)})["layer"].factors
            return factors.U, factors.Vh
        if way == "loraga":
            g = torch.zeros(m, n, device=DEVICE)
            for x, dy in pairs:
                declared.accumulate_(g, x, dy)
            factors = truncated_svd(g, rank)
            return factors.U, factors.Vh
        g = pairs[0][1].mT @ pairs[0][0]
        for x, dy in pairs[1:]:
            g += dy.mT @ x
        return peer_svd(g, rank)

    timed(
        run,
        lambda result: lost(exact, *result, rank),
        lambda: (),
        op="whole layer",
        way=way,
        model=model,
        m=m,
        n=n,
        rank=rank,
        tokens=TOKENS * BATCHES,
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per operation and shape, a column per way."""
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    for bench in result["benchmarks"]:
        info = bench["extra_info"]
        shape = " x ".join(str(info[key]) for key in ("m", "n", "k") if key in info)
        rank = f", r {info['rank']}" if "rank" in info else ""
        key = (info["op"], f"{info.get('model', 'any')} {shape}{rank}")
        grouped.setdefault(key, {})[info["way"]] = f"{1e3 * bench['stats']['median']:.2f} ms ({info['error']:.0e})"
    lines = ["| operation | layer | loraga (error) | torch or peer (error) |", "|---|---|---|---|"]
    for (op, layer), ways in grouped.items():
        others = "; ".join(f"{way} {text}" for way, text in ways.items() if way != "loraga")
        lines.append(f"| {op} | {layer} | {ways.get('loraga', '')} | {others} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    print(table(json.loads(parser.parse_args().table.read_text())))
