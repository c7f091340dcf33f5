"""Which standard-library module does a docstring come from? A text task that every Python carries with it.

The sources are only parsed (`ast`), never imported. A text belongs to the test set if a hash of its words says so:
no random numbers, so the same Python version always gives the same data.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The sixteen classes: modules with many docstrings in every Python from 3.10 to 3.13, also where a system package
# splits parts off (tkinter, idlelib, turtle, distutils are not on every machine).
MODULES = (
    "asyncio", "decimal", "email", "http", "importlib", "inspect", "ipaddress", "logging",
    "mailbox", "multiprocessing", "pathlib", "pydoc", "tarfile", "unittest", "urllib", "xml",
)  # fmt: skip
MAX_PER_CLASS = 120  # the largest modules have four times as many texts as the smallest
MAX_CHARACTERS = 120  # about 30 word pieces; cut before the duplicates are looked for, so no test text has a twin
MIN_WORDS = 5
TEST_SHARE = 4  # one text in so many is held out

_OWN_NAMES = re.compile(r"\b(" + "|".join(MODULES) + r")\b", re.IGNORECASE)


@dataclass(frozen=True)
class Docstrings:
    """Texts with the index of their module in `MODULES`, split into training and test."""

    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _files(root: Path, module: str) -> list[Path]:
    """All sources of one module: `m.py`, `_pym.py` (the plain Python twin of a C module) and the package `m/`."""
    single = [file for file in (root / f"{module}.py", root / f"_py{module}.py") if file.is_file()]
    package = root / module
    return single + sorted(file for file in package.rglob("*.py") if "test" not in file.relative_to(package).parts)


def clean(text: str) -> str:
    """One line, without the names of the sixteen modules, cut at a word boundary.

    The names are taken out of every text, not only out of their own module's: otherwise searching for the name
    would answer part of the task, and a missing name would answer another part.
    """
    text = " ".join(_OWN_NAMES.sub(" ", text).split())
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0]


def word_key(text: str) -> str:
    """What makes two texts the same: their words in lower case, whatever the digits and signs between them."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def load(stdlib: Path | None = None) -> Docstrings:
    """Read the task from this machine's standard library.

    Args:
        stdlib (`Path`, *optional*): folder with the library's sources; default: that of the running Python.

    Raises:
        FileNotFoundError: a module has no sources there (some minimal Pythons ship compiled files only).
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    text_of: dict[str, str] = {}
    modules_of: dict[str, set[int]] = defaultdict(set)
    for label, module in enumerate(MODULES):
        files = _files(root, module)
        if not files:
            raise FileNotFoundError(f"no sources of the module {module!r} in {root}; use a full Python installation.")
        for file in files:
            for raw in _docstrings(file):
                text = clean(raw)
                key = word_key(text)
                if len(key.split()) >= MIN_WORDS:
                    text_of.setdefault(key, text)
                    modules_of[key].add(label)

    keys_of: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for key, labels in modules_of.items():
        if len(labels) == 1:  # a text that two modules share has no right answer
            keys_of[next(iter(labels))].append((hashlib.sha256(key.encode()).hexdigest(), key))

    train: list[tuple[str, str, int]] = []
    test: list[tuple[str, str, int]] = []
    for label, hashed in keys_of.items():
        for digest, key in sorted(hashed)[:MAX_PER_CLASS]:
            # The last digits decide: the first ones already decided who is among the MAX_PER_CLASS.
            side = test if int(digest[-8:], 16) % TEST_SHARE == 0 else train
            side.append((digest, text_of[key], label))
    # In order of the hash, that is mixed: no class comes in one piece.
    return Docstrings(
        train=tuple((text, label) for _, text, label in sorted(train)),
        test=tuple((text, label) for _, text, label in sorted(test)),
    )
