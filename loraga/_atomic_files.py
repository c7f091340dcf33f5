"""Files that appear whole or not at all, whatever stops the writer: an error, a full disk, a kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end, or removed on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A temporary folder whose files are moved into `folder` at the end, or removed on failure.

    The file `last` is the one without which the others are not read; whoever stops in between leaves a folder without
    it. Other files in `folder` stay.
    """
    target = Path(folder)
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        names = sorted((path.name for path in temporary.iterdir()), key=lambda name: (name == last, name))
        if last in names and len(names) > 1:
            (target / last).unlink(missing_ok=True)
        for name in names:
            os.replace(temporary / name, target / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if new and not any(target.iterdir()):
            target.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or is removed on failure.

    Raises:
        OSError: the temporary folder cannot be made.
    """
    target = Path(folder).resolve()
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{part}") for part in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
