"""The file in which `loraga calibrate` stores its choices: one per kind of device, in the user's cache directory.

What a measurement depends on stands in the file. A file of another driver or of other versions is stale: it is named in
one warning and ignored, as is a file that cannot be read.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraga._atomic_files import atomic_file
from loraga.ops.device_facts import DeviceFacts

RUNS = ("triton", "torch")
_REMEDY = "run `loraga calibrate` again, or delete the file"


def path_of(facts: DeviceFacts) -> Path:
    """The file of this kind of device.

    Raises:
        RuntimeError: the user has no home directory, and XDG_CACHE_HOME is not set.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification asks to ignore relative paths
    folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", facts.name.lower()).strip("-")
    return folder / "loraga" / f"kernels-{name}-sm{facts.capability[0]}{facts.capability[1]}.json"


def store(facts: DeviceFacts, choices: Mapping[str, str], measured: Mapping[str, Any]) -> Path:
    """Write the choices ("triton" or "torch" by op), and the figures behind them; returns the file.

    Raises:
        OSError, RuntimeError: the file cannot be written, or there is no place for it.
    """
    path = path_of(facts)
    content = {"for": facts.key(), "choices": dict(choices), "measured": dict(measured)}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _read.cache_clear()
    return path


def stored(facts: DeviceFacts, ops: Iterable[str]) -> dict[str, str]:
    """ "triton" or "torch" for each of `ops` by the file of this kind of device; empty where no file is in use.

    A stale or broken file is ignored. A warning names it, once in a process.
    """
    return dict(_read(facts, tuple(ops))[0])


def file_in_use(facts: DeviceFacts, ops: Iterable[str]) -> Path | None:
    """The file that `stored` reads from, or `None`."""
    return _read(facts, tuple(ops))[1]


@functools.cache  # also for the warning, which comes once
def _read(facts: DeviceFacts, ops: tuple[str, ...]) -> tuple[dict[str, str], Path | None]:
    try:
        path = path_of(facts)
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, RuntimeError):
        return {}, None
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, f"cannot be read ({error})")
    try:
        content = json.loads(text)
        key, choices = content["for"], content["choices"]
        changed = [f"{name} {key[name]}, here {value}" for name, value in facts.key().items() if key[name] != value]
        if changed:
            return _ignored(path, f"was measured with {'; '.join(changed)}")
        if choices.keys() != set(ops) or not set(choices.values()) <= set(RUNS):
            raise ValueError(f"choices {choices}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _ignored(path, f"is not a file of `loraga calibrate` ({type(error).__name__}: {error})")
    return choices, path


def _ignored(path: Path, why: str) -> tuple[dict[str, str], None]:
    warnings.warn(f"{path} {why} and is ignored; {_REMEDY}.", stacklevel=2)
    return {}, None
