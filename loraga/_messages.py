"""Text of errors, sizes and lists of names, for loraga's messages and tables."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the name of its type if the message is empty.

    One line is enough: loraga's messages have no line breaks, and other libraries put the cause into the first line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def size_text(count: float | None) -> str:
    """A number of bytes, such as "915.0 MiB"; "-" for None."""
    if count is None:
        return "-"
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024 and unit != "GiB":
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}" if unit == "GiB" else f"{size:.1f} {unit}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first `most` names, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
