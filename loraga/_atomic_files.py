"""Files that appear complete or not at all, also if an error, a full disk or a kill stops the writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It is renamed to `path` at the end, or removed on an error."""
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
    """Yield a temporary folder. Its files are moved into `folder` at the end, or removed on an error.

    `last` is the name of the file without which readers ignore the others. An old one is removed first and the new one
    is moved last, so a writer that is stopped in between leaves a folder without it. Other files in `folder` stay.
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
    """Yield a temporary folder beside `folder`. It replaces `folder` at the end, or is removed on an error.

    If the replacement fails, the old folder is moved back.

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
