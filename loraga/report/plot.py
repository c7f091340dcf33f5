"""Draws a report: the spectrum of each layer's gradient, and the share of its energy that the start captured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from loraga.report.text import module_type, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from loraga.report.report import LayerReport

MAX_BARS = 24  # a report of more layers has one strip of dots per module type in place of one bar per layer
MAX_TYPES = 30
LABEL_WIDTH = 34
FLOOR = 1e-7  # float32: singular values below this share of the first are rounding


def draw(layers: Sequence[LayerReport], title: str) -> Any:
    """Draw the two panels of a report into one `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has a spectrum.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing a report needs matplotlib: pip install 'loraga[plot]'.") from error
    seen = [layer for layer in layers if layer.spectrum and layer.spectrum[0] > 0]
    if not seen:
        raise ValueError("No layer of this report has a spectrum, so there is nothing to draw.")

    few = len(layers) <= MAX_BARS
    depth = {layer.name: i for i, layer in enumerate(layers)} if few else _depths(layers)
    # The light end of the map is hard to see on white.
    norm = Normalize(0, max(1, max(depth.values())) / 0.9)
    colour = {name: colormaps["viridis"](norm(d)) for name, d in depth.items()}
    rows = len(layers) if few else min(MAX_TYPES, len({module_type(layer.name) for layer in layers}))
    height = max(4.2, 1.6 + 0.3 * rows) if few else max(5.2, 2.2 + 0.42 * rows)
    figure = Figure(figsize=(12, height), layout="constrained")
    spectra, energy = figure.subplots(1, 2)

    _spectra(spectra, seen, colour, few)
    if few:
        _bars(energy, layers, colour)
    else:
        _strip(energy, layers, colour, depth)
        both = [spectra, energy]
        bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=both, location="bottom", shrink=0.4, aspect=45)
        bar.ax.set_xlim(0, max(depth.values()))
        bar.set_label("block, first to last")
        bar.outline.set_visible(False)
    energy.set_xlim(0, 100)
    energy.set_xlabel("captured energy of the gradient, %")
    energy.set_title("Share of $|G|^2$ in the directions used")
    for axes in (spectra, energy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    return figure


def _depths(layers: Sequence[LayerReport]) -> dict[str, int]:
    """The number of the block that each layer is in; blocks are counted in the order of the model."""
    blocks: dict[str, int] = {}
    depths = {}
    for layer in layers:
        parts = layer.name.split(".")
        first_number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        depths[layer.name] = blocks.setdefault(".".join(parts[: first_number + 1]), len(blocks))
    return depths


def _spectra(axes: Axes, layers: Sequence[LayerReport], colour: dict[str, Any], few: bool) -> None:
    columns: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        shares = [s / layer.spectrum[0] for s in layer.spectrum]
        shares = [s for s in shares if s >= FLOOR]
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            color=colour[layer.name],
            linewidth=1.6 if few else 0.7,
            alpha=0.9 if few else 0.45,
            marker="o" if few and len(shares) <= 32 else "",
            markersize=3,
        )
        for i, share in enumerate(shares, 1):
            columns[i].append(share)
    if not few:
        middle = [median(columns[i]) for i in sorted(columns)]
        axes.plot(range(1, len(middle) + 1), middle, color="black", linewidth=1.8, label="median of the layers")
        axes.legend(frameon=False, loc="upper right")
    axes.set_yscale("log")
    axes.set_xlim(0.5, max(columns) + 0.5)
    axes.locator_params(axis="x", integer=True)
    axes.grid(True, which="major", color="0.9")
    axes.set_xlabel("i")
    axes.set_ylabel(r"$\sigma_i\,/\,\sigma_1$")
    axes.set_title("Singular values of the mean gradient")


def _bars(axes: Axes, layers: Sequence[LayerReport], colour: dict[str, Any]) -> None:
    for y, layer in enumerate(layers):
        if layer.captured_energy is None:
            axes.text(1, y, f"ordinary LoRA: {layer.reason}", va="center", fontsize=8, color="0.4")
            continue
        share = 100 * layer.captured_energy
        axes.barh(y, share, height=0.7, color=colour[layer.name])
        axes.text(share + 0.8, y, f"{share:.0f}", va="center", fontsize=8)
    _label_rows(axes, [layer.name for layer in layers])
    axes.grid(True, axis="x", color="0.9")


def _strip(axes: Axes, layers: Sequence[LayerReport], colour: dict[str, Any], depth: dict[str, int]) -> None:
    common = [name for name, _ in Counter(module_type(layer.name) for layer in layers).most_common()]
    types = list(dict.fromkeys(module_type(layer.name) for layer in layers))
    if len(types) > MAX_TYPES:
        kept = set(common[: MAX_TYPES - 1])
        types = [name for name in types if name in kept] + ["others"]
    row = {name: y for y, name in enumerate(types)}
    shares: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        if layer.captured_energy is None:
            continue
        y = row.get(module_type(layer.name), len(types) - 1)
        share = 100 * layer.captured_energy
        shares[y].append(share)
        # Within a row the first block is on top, the last one at the bottom.
        offset = 0.6 * (depth[layer.name] / max(1, max(depth.values())) - 0.5)
        axes.plot(share, y + offset, "o", markersize=4.5, color=colour[layer.name], alpha=0.8, mew=0, clip_on=False)
    for y, values in shares.items():
        axes.plot([median(values)] * 2, [y - 0.38, y + 0.38], color="black", linewidth=2)
    ordinary = Counter(row.get(module_type(layer.name), len(types) - 1) for layer in layers if not layer.initialised)
    labels = [f"{name} ({ordinary[y]} ordinary)" if ordinary[y] else name for y, name in enumerate(types)]
    _label_rows(axes, labels)
    axes.grid(True, color="0.9")


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shorten(name, LABEL_WIDTH) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
