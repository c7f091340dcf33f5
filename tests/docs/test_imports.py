"""Imports point one way, and each foreign library has one home: docs/architecture.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "loraga"
# from the bottom up; what shares a line may import each other
LAYERS = (
    ("_version", "_messages", "_rollback", "_atomic_files", "config", "factors"),
    ("integrations.bitsandbytes", "integrations.accelerate"),  # of the library's layers they know nothing
    ("ops", "kernels"),
    ("linalg",),
    ("distributed",),
    ("estimators",),
    ("start",),
    ("capture",),
    ("report",),
    ("integrations",),
    ("plan",),
    ("kernels.dev",),  # for developers: it runs estimators of all kinds
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
HOMES = {
    "peft": "integrations/peft/",
    "transformers": "integrations/hf_models.py",
    "accelerate": "nowhere",
    "bitsandbytes": "nowhere",
    "safetensors": "integrations/peft/",
    "matplotlib": "report/plot.py",
    "triton": "kernels/",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> int:
    """Of a name below `loraga`: that of the longest entry it starts with."""
    found = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"loraga.{module} has no layer"
    return max(found)[1]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "loraga":
            yield from (f"loraga.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in imports_of(path):
        if name.startswith("loraga."):
            assert layer_of(name.removeprefix("loraga.")) <= own, f"{path.name} imports {name}, which is above it"


@pytest.mark.parametrize("library", HOMES)
def test_a_foreign_library_has_one_home(library):
    for path in FILES:
        place = str(path.relative_to(PACKAGE))
        if any(name.split(".")[0] == library for name in imports_of(path)) and place != "cli/environment.py":
            assert place.startswith(HOMES[library]), f"{place} imports {library}"
