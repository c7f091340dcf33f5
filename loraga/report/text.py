"""A report as text: one row per layer, or one row per shape where there are many layers, and the totals."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from loraga._messages import size_text

if TYPE_CHECKING:
    from loraga.report.report import InitReport, LayerReport

NAME_WIDTH = 38
MAX_ROWS = 40  # a report of more layers has one row per shape
LOWEST = 5  # how many layers are listed by name where a list could be long

_LAYER_HEADER = ("layer", "out x in", "r", "directions", "captured", "eff. rank", "sigma_1", "batches", "")
_SHAPE_HEADER = ("layers", "out x in", "r", "directions", "captured: lowest", "median", "highest", "eff. rank", "")


def table(report: InitReport) -> str:
    """What `print(report)` shows: a table, the layers with an ordinary start and their reasons, and the totals."""
    layers = report.layers
    rows = _layer_table(layers) if len(layers) <= MAX_ROWS else [*_shape_table(layers), *_lowest_lines(layers)]
    return "\n".join([*rows, "", *_ordinary_lines(report.ordinary), *_totals(report), *kernel_lines(report.kernels)])


def kernel_lines(kernels: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What ran the ops, one line for each device and reason: "cuda:0: triton for basis, commit_"."""
    lines = []
    for device, choices in kernels.items():
        ops_by_choice: dict[str, list[str]] = defaultdict(list)
        for op, choice in choices.items():
            ops_by_choice[choice].append(op)
        for choice, ops in ops_by_choice.items():
            runs, _, reason = choice.partition(": ")
            lines.append(f"{device}: {runs} for {', '.join(ops)}" + (f" ({reason})" if reason else ""))
    return lines


def module_type(name: str) -> str:
    """A layer's name without the block it is in: `model.layers.3.mlp.up_proj` becomes `mlp.up_proj`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts) or name


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` characters: inner parts become their first letters.

    Block numbers stay, because they tell layers apart.
    """
    parts = name.split(".")
    for i in [*range(1, len(parts) - 2), 0] if len(parts) > 3 else []:
        if len(".".join(parts)) > width and not parts[i].isdigit():
            parts[i] = parts[i][:1]
    short = ".".join(parts)
    if len(short) <= width:
        return short
    tail = (width - 2) * 2 // 3
    return f"{short[: width - 2 - tail]}..{short[-tail:]}"


def _layer_table(layers: Iterable[LayerReport]) -> list[str]:
    return _aligned([_LAYER_HEADER, *map(_layer_row, layers)])


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    return (
        shorten(layer.name, NAME_WIDTH),
        *_size(layer.shape, layer.rank),
        str(layer.directions or "-"),
        _percent(layer.captured_energy),
        _decimal(layer.effective_rank),
        f"{layer.spectrum[0]:.1e}" if layer.spectrum else "-",
        f"{layer.updates}/{layer.updates + layer.skipped}" if layer.skipped else str(layer.updates),
        "" if layer.initialised else layer.status,
    )


def _shape_table(layers: Iterable[LayerReport]) -> list[str]:
    """One row for all layers of a shape and a rank."""
    groups: dict[tuple[tuple[int, int], int], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        groups[layer.shape, layer.rank].append(layer)
    return _aligned([_SHAPE_HEADER, *(_shape_row(shape, rank, group) for (shape, rank), group in groups.items())])


def _shape_row(shape: tuple[int, int], rank: int, layers: Sequence[LayerReport]) -> tuple[str, ...]:
    types = list(dict.fromkeys(module_type(layer.name) for layer in layers))
    shares = _captured(layers)
    effective_ranks = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    lowest, middle, highest = (f(shares) if shares else None for f in (min, median, max))
    ordinary = sum(not layer.initialised for layer in layers)
    return (
        textwrap.shorten(f"{len(layers)}: {', '.join(types)}", NAME_WIDTH, placeholder=" .."),
        *_size(shape, rank),
        str(max(layer.directions for layer in layers) or "-"),
        _percent(lowest),
        _percent(middle),
        _percent(highest),
        _decimal(median(effective_ranks) if effective_ranks else None),
        f"{ordinary} ordinary" if ordinary else "",
    )


def _lowest_lines(layers: Iterable[LayerReport]) -> list[str]:
    """The layers whose start captured least; a row of the table of shapes shows only how much that was."""
    known = [(layer.captured_energy, layer.name) for layer in layers if layer.captured_energy is not None]
    if not known:
        return []
    known.sort(key=lambda pair: pair[0])
    lines = [f"  {_percent(share):>6}  {name}" for share, name in known[:LOWEST]]
    return ["", f"Lowest captured energy ({len(lines)} of {len(known)} layers):", *lines]


def _ordinary_lines(layers: Iterable[LayerReport]) -> list[str]:
    """Layers with an ordinary start, by reason."""
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        names_by_reason[layer.reason].append(layer.name)
    lines = []
    for reason, names in names_by_reason.items():
        lines.append(f"Ordinary LoRA ({reason}): {len(names)} layer{'s' if len(names) > 1 else ''}")
        lines += [f"  {name}" for name in names[:LOWEST]]
        if len(names) > LOWEST:
            lines.append(f"  and {len(names) - LOWEST} more")
    return lines


def _totals(report: InitReport) -> list[str]:
    shares = _captured(report.layers)
    total = f"{len(report.layers)} layers: {len(report.initialised)} initialised, {len(report.ordinary)} ordinary LoRA"
    if shares:
        total += f"; captured energy mean {_percent(fmean(shares))}, lowest {_percent(min(shares))}"
    left_out = f" ({report.skipped_batches} with NaN or Inf left out)" if report.skipped_batches else ""
    shared = f", {report.ranks} ranks with {size_text(report.reduced_bytes)} reduced" if report.ranks > 1 else ""
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
    options = (report.config.get(key) for key in ("method", "start", "direction", "scale", "estimator"))
    return [
        total,
        f"{report.micro_batches} micro-batches{left_out}, state {size_text(report.state_bytes)}{shared}, "
        f"seed {report.seed}, {', '.join(str(option) for option in options if option is not None)}",
        f"{phases}, total {sum(report.seconds.values()):.2f} s" if phases else "no timings",
    ]


def _captured(layers: Iterable[LayerReport]) -> list[float]:
    return [layer.captured_energy for layer in layers if layer.captured_energy is not None]


def _size(shape: tuple[int, int], rank: int) -> tuple[str, str]:
    return (f"{shape[0]} x {shape[1]}", str(rank)) if rank else ("-", "-")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns of equal width: the first to the left, numbers to the right, the last as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
