"""A byte-level Llama and the text that every Python carries with it: prose, and source code without its prose."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path

import _llama
import torch
from torch import Tensor, nn

VOCABULARY = 256
HELD_OUT_SHARE = 8  # one source file in so many is held out


def stdlib_files() -> list[Path]:
    """The sources at the top of the standard library, in order of their names."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def as_tensor(text: bytes) -> Tensor:
    """(bytes,) int64."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def draw(text: Tensor, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """`rows` windows of `length` bytes of a text (bytes,), from places drawn with `seed`."""
    starts = torch.randint(0, len(text) - length - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    ids = torch.stack([text[j : j + length] for j in starts])
    return {"input_ids": ids, "labels": ids}


def build(width: int, inner: int, layers: int, heads: int, kv_heads: int, *, seed: int) -> nn.Module:
    """A Llama over bytes with random weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(_llama.config(width, inner, layers, heads, kv_heads, VOCABULARY))


def pretrain(model: nn.Module, batch: Callable[[int], dict[str, Tensor]], steps: int, rate: float = 1e-3) -> float:
    """AdamW at a constant rate on `batch(0)`, `batch(1)`, ...; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _docstrings(source: bytes) -> list[tuple[ast.Expr, str]]:
    """Every docstring of a source: the node, which knows its lines, and the text."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                found.append((node.body[0], text))
    return found


@functools.cache
def prose() -> Tensor:
    """Docstrings of the standard library, the topics of `help()`, and the licence where it is installed: (bytes,)."""
    parts = [text for file in stdlib_files() for _, text in _docstrings(file.read_bytes())]
    parts += [text for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items())]
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.is_file():  # some system packages keep it elsewhere
        parts.append(licence.read_text("utf-8"))
    return as_tensor("\n\n".join(parts).encode())


def _without_docstrings(source: bytes) -> bytes:
    lines = source.splitlines(keepends=True)
    for node, _ in _docstrings(source):
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[number - 1] = b""
    return b"".join(lines)


@functools.cache
def source_code() -> tuple[Tensor, Tensor]:
    """Source code of the standard library without its docstrings (they are in `prose`): to train on, and held out.

    Whole files are held out, chosen by a hash of their names.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for file in stdlib_files():
        held_out = int(hashlib.sha256(file.name.encode()).hexdigest()[-8:], 16) % HELD_OUT_SHARE == 0
        sides[held_out].append(_without_docstrings(file.read_bytes()))
    return as_tensor(b"".join(sides[0])), as_tensor(b"".join(sides[1]))
