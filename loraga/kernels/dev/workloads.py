"""The launches of real initialisations: layers of named models, as the estimators update and finish them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraga.estimators import Dense, Estimator, LayerSpec, Streaming, finish_in_chunks
from loraga.kernels.dev.launches import Launch
from loraga.kernels.dev.steps import counted

META = torch.device("meta")


@dataclass(frozen=True)
class Layer:
    """A layer of a model: the shape (m, n) of its gradient."""

    name: str
    m: int
    n: int


LLAMA_7B = (Layer("7B attention", 4096, 4096), Layer("7B gate", 11008, 4096), Layer("7B down", 4096, 11008))
LLAMA_8B = (Layer("8B keys", 1024, 4096), Layer("8B gate", 14336, 4096), Layer("8B down", 4096, 14336))
MINILM = (Layer("MiniLM attention", 384, 384), Layer("MiniLM up", 1536, 384))
# an odd number of inputs, so that rows begin at any address
RAGGED = Layer("ragged", 1000, 381)
# Triton makes an integer of 1 a constant, of which not everything can be asked that a number can
SINGLE = Layer("single", 1, 1)


@dataclass(frozen=True)
class Case:
    """Updates of layers of one shape and the end of their stream.

    Attributes:
        layer (`Layer`): their shape.
        tokens (`int`): T of each micro-batch.
        dtype (`torch.dtype`): of x and dy.
        rank (`int`): triplets to estimate.
        buffer (`torch.dtype`, *optional*): of dense buffers. None: the streaming estimator.
        count (`int`): layers.
        transposed (`bool`): x and dy lie in memory by columns.
    """

    layer: Layer
    tokens: int
    dtype: torch.dtype
    rank: int
    buffer: torch.dtype | None = None
    count: int = 1
    transposed: bool = False

    @property
    def label(self) -> str:
        kind = "streaming" if self.buffer is None else f"dense {_short(self.buffer)}"
        several = f"{self.count} x " if self.count > 1 else ""
        order = ", by columns" if self.transposed else ""
        return f"{several}{self.layer.name}, {self.tokens} tokens, r {self.rank}, {_short(self.dtype)}, {kind}{order}"

    def estimators(self) -> list[Estimator]:
        """New ones, on the meta device."""
        specs = [LayerSpec(f"{i}", self.layer.m, self.layer.n, self.rank, i, META) for i in range(self.count)]
        if self.buffer is None:
            return list(Streaming.together(specs, micro_batches=4))
        return [Dense(spec, self.buffer) for spec in specs]

    def update(self, estimators: Sequence[Estimator]) -> None:
        """Add a micro-batch to all layers, as they are absorbed on a GPU."""
        xs, dys = zip(*(self.operands() for _ in estimators), strict=True)
        if self.buffer is None:
            Streaming.absorb(estimators, xs, dys)  # type: ignore[arg-type]
        else:
            for estimator, x, dy in zip(estimators, xs, dys, strict=True):
                estimator.update(x, dy)

    def run(self) -> None:
        """Random matrices, the first update and a later one, and the end."""
        estimators = self.estimators()
        self.update(estimators)
        self.update(estimators)
        names = [estimator.spec.name for estimator in estimators]
        for _ in finish_in_chunks(dict(zip(names, estimators, strict=True)), dict.fromkeys(names, 1.0)):
            pass

    def operands(self) -> tuple[Tensor, Tensor]:
        """x (T, n) and dy (T, m) of a micro-batch, on the meta device."""
        sizes = (self.layer.n, self.layer.m)
        if self.transposed:
            x, dy = (torch.empty(size, self.tokens, dtype=self.dtype, device=META).t() for size in sizes)
        else:
            x, dy = (torch.empty(self.tokens, size, dtype=self.dtype, device=META) for size in sizes)
        return x, dy


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def cases() -> Iterator[Case]:
    """What is compiled ahead of time."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for layer in LLAMA_7B + LLAMA_8B:
        yield Case(layer, 1024, bf16, 16, count=8)
        yield Case(layer, 1024, bf16, 16, bf16)
    for layer in (LLAMA_7B[0], LLAMA_8B[0]):
        yield Case(layer, 8192, bf16, 128)
        yield Case(layer, 8192, bf16, 128, bf16)
        yield Case(layer, 1024, fp32, 16, count=4)
        yield Case(layer, 1024, fp32, 128, fp32)
    yield Case(MINILM[0], 8192, bf16, 8, bf16)
    for layer in (*MINILM, RAGGED):
        for dtype in (bf16, fp32):
            yield Case(layer, 67, dtype, 8, dtype, count=3)
            yield Case(layer, 67, dtype, 8, dtype, transposed=True)
    yield Case(SINGLE, 1, fp32, 1, bf16)
    yield Case(RAGGED, 67, bf16, 8)
    yield Case(RAGGED, 67, bf16, 8, count=3)


@dataclass(frozen=True)
class Build:
    """One binary that a card would compile.

    Attributes:
        launch (`Launch`): the first one that needs it.
        label (`str`): the case of this launch.
        uses (`int`): launches of it in all cases.
    """

    launch: Launch
    label: str
    uses: int


def builds(arch: int, chosen: Sequence[Case] | None = None, every: bool = True) -> list[Build]:
    """The binaries that `chosen` cases (all of them) need on a card of compute capability `arch`, in a fixed order.

    Without `every`, only the first of those that differ in nothing but which integers are 1 or divisible by 16.
    """
    found: dict[str, Build] = {}
    for case in cases() if chosen is None else chosen:
        with counted(arch) as steps:
            case.run()
        for launch in steps.launches:
            key = launch.key if every else launch.family
            known = found.get(key)
            first, label, uses = (launch, case.label, 0) if known is None else (known.launch, known.label, known.uses)
            found[key] = Build(first, label, uses + 1)
    return list(found.values())
