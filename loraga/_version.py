"""The version, in the one place that packaging, the native core and users read it from."""

from __future__ import annotations

__version__ = "0.2.0"


def release_of(version: str) -> tuple[int, ...]:
    """(major, minor) of a library's version such as "2.8.0+cu128"."""
    return tuple(int(part) for part in version.split(".")[:2])
