"""What an initialisation did, layer by layer: a table, a JSON file, a plot."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from loraga._atomic_files import atomic_file
from loraga._messages import size_text
from loraga._version import __version__
from loraga.report.plot import draw, kind, shorten

INITIALISED = "initialised"
ORDINARY = "ordinary"
# why a layer has no start of its own; it has the embedding's (`ensure_weight_tying`)
TIED = "its adapter is the embedding's, transposed"
FORMAT = 2
LIBRARIES = ("torch", "triton", "peft", "transformers")

NAME_WIDTH = 38
MAX_ROWS = 40
LOWEST = 5


def effective_rank(spectrum: Sequence[float]) -> float | None:
    """How many directions a spectrum is spread over: exp of the entropy of the shares of energy.

    Roy and Vetterli, "The effective rank" (EUSIPCO 2007), with shares sigma_i^2 / sum sigma^2 (energy) where they
    take sigma_i / sum sigma. It is 1 for one direction and q for q equal ones.

    Args:
        spectrum (`Sequence[float]`): singular values, in any order and of any scale.

    Returns:
        `float`, *optional*: `None` if the spectrum is empty, zero or not finite.
    """
    largest = max(spectrum, default=0.0)
    if not (math.isfinite(largest) and largest > 0):
        return None
    # Relative to the largest first: squares of 1e-30 would underflow in the sum of a tiny gradient's spectrum.
    energies = [(s / largest) ** 2 for s in spectrum]
    total = sum(energies)
    return math.exp(-sum(e / total * math.log(e / total) for e in energies if e > 0))


def versions() -> dict[str, str | None]:
    """Installed versions of loraga and the libraries it works with, `None` where one is missing. Imports none."""
    found: dict[str, str | None] = {"loraga": __version__}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


@dataclass(frozen=True)
class LayerReport:
    """What happened to one target layer.

    Attributes:
        name (`str`): of the module.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features); (0, 0) for a layer that is not linear.
        rank (`int`): r of the adapter; 0 for a layer that is not linear.
        status (`str`): `"initialised"`, or `"ordinary"` where the layer keeps an ordinary LoRA start.
        reason (`str`): why it is ordinary; empty where it is initialised.
        spectrum (`list[float]`): leading singular values of the mean gradient, descending.
        directions (`int`): how many singular directions of the gradient the start holds: r (or r - 1 where pairs leave
            one over), fewer in a layer that has no more; its other rows are ordinary LoRA.
        captured_energy (`float`, *optional*): share of |G|_F^2 in the triplets the recipe used, 0 to 1.
        effective_rank (`float`, *optional*): see [`effective_rank`]; of the spectrum given, so at most its length.
        updates (`int`): micro-batches that entered the mean.
        skipped (`int`): micro-batches left out because the layer's gradient held NaN or Inf.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    status: str
    reason: str = ""
    spectrum: list[float] = field(default_factory=list)
    directions: int = 0
    captured_energy: float | None = None
    effective_rank: float | None = None
    updates: int = 0
    skipped: int = 0

    @property
    def initialised(self) -> bool:
        """Whether the gradient decided the start of this layer."""
        return self.status == INITIALISED


@dataclass
class InitReport:
    """What an initialisation did. `print` it for a table; [`~InitReport.plot`] draws it.

    Attributes:
        layers (`list[LayerReport]`): in the order of the model.
        config (`dict`): options of the initialisation.
        seconds (`dict[str, float]`): wall time by phase.
        state_bytes (`int`): memory the estimators held at their largest, on this rank.
        micro_batches (`int`): batches taken from the loaders of all ranks.
        skipped_batches (`int`): of these, the ones in which some layer met NaN or Inf.
        versions (`dict`): of the libraries.
        seed (`int`): of the random numbers used.
        ranks (`int`): processes that took part.
        reduced_bytes (`int`): what this rank gave to reductions and broadcasts among them.
    """

    layers: list[LayerReport]
    config: dict[str, Any]
    seconds: dict[str, float]
    state_bytes: int
    micro_batches: int
    skipped_batches: int = 0
    versions: dict[str, str | None] = field(default_factory=versions)
    seed: int = 0
    ranks: int = 1
    reduced_bytes: int = 0

    @property
    def initialised(self) -> list[LayerReport]:
        """Layers whose start the gradient decided."""
        return [layer for layer in self.layers if layer.initialised]

    @property
    def ordinary(self) -> list[LayerReport]:
        """Layers that keep an ordinary LoRA start, each with its reason."""
        return [layer for layer in self.layers if not layer.initialised]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON. The file appears whole or not at all; missing folders are made."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitReport:
        """Read a report that [`~InitReport.save`] wrote.

        Raises:
            ValueError: the file is not such a report; the message names it.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in values.pop("layers")]
            return cls(layers=layers, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)} is not a report of this version of loraga ({type(error).__name__}: {error}); give "
                "a file written by InitReport.save."
            ) from error

    def __repr__(self) -> str:
        return (
            f"InitReport({len(self.initialised)} layers initialised, {len(self.ordinary)} ordinary, "
            f"{self.micro_batches} micro-batches, {sum(self.seconds.values()):.1f} s)"
        )

    def __str__(self) -> str:
        rows = self._layer_table() if len(self.layers) <= MAX_ROWS else self._shape_table()
        return "\n".join([*rows, "", *self._ordinary_lines(), *self._totals()])

    def _layer_table(self) -> list[str]:
        rows: list[tuple[str, ...]] = [
            ("layer", "out x in", "r", "directions", "captured", "eff. rank", "sigma_1", "batches", "")
        ]
        for layer in self.layers:
            rows.append(
                (
                    shorten(layer.name, NAME_WIDTH),
                    *_size(layer.shape, layer.rank),
                    str(layer.directions or "-"),
                    _percent(layer.captured_energy),
                    _decimal(layer.effective_rank),
                    f"{layer.spectrum[0]:.1e}" if layer.spectrum else "-",
                    f"{layer.updates}/{layer.updates + layer.skipped}" if layer.skipped else str(layer.updates),
                    "" if layer.initialised else ORDINARY,
                )
            )
        return _aligned(rows)

    def _shape_table(self) -> list[str]:
        groups: dict[tuple[tuple[int, int], int], list[LayerReport]] = defaultdict(list)
        for layer in self.layers:
            groups[layer.shape, layer.rank].append(layer)
        rows: list[tuple[str, ...]] = [
            ("layers", "out x in", "r", "directions", "captured: lowest", "median", "highest", "eff. rank", "")
        ]
        for (shape, rank), layers in groups.items():
            kinds = list(dict.fromkeys(kind(layer.name) for layer in layers))
            shares = [layer.captured_energy for layer in layers if layer.captured_energy is not None]
            ranks = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
            lowest, middle, highest = (f(shares) if shares else None for f in (min, median, max))
            ordinary = sum(not layer.initialised for layer in layers)
            rows.append(
                (
                    textwrap.shorten(f"{len(layers)}: {', '.join(kinds)}", NAME_WIDTH, placeholder=" .."),
                    *_size(shape, rank),
                    str(max(layer.directions for layer in layers) or "-"),
                    _percent(lowest),
                    _percent(middle),
                    _percent(highest),
                    _decimal(median(ranks) if ranks else None),
                    f"{ordinary} {ORDINARY}" if ordinary else "",
                )
            )
        lines = _aligned(rows)
        known = [layer for layer in self.layers if layer.captured_energy is not None]
        if known:
            lines += ["", f"Lowest captured energy ({min(LOWEST, len(known))} of {len(known)} layers):"]
            known.sort(key=lambda layer: layer.captured_energy or 0.0)
            lines += [f"  {_percent(layer.captured_energy):>6}  {layer.name}" for layer in known[:LOWEST]]
        return lines

    def _ordinary_lines(self) -> list[str]:
        reasons: dict[str, list[str]] = defaultdict(list)
        for layer in self.ordinary:
            reasons[layer.reason].append(layer.name)
        lines = []
        for reason, names in reasons.items():
            more = f" and {len(names) - LOWEST} more" if len(names) > LOWEST else ""
            lines.append(f"Ordinary LoRA ({reason}): {len(names)} layer{'s' if len(names) > 1 else ''}")
            lines += [f"  {name}" for name in names[:LOWEST]] + ([f" {more}"] if more else [])
        return lines

    def _totals(self) -> list[str]:
        shares = [layer.captured_energy for layer in self.layers if layer.captured_energy is not None]
        total = f"{len(self.layers)} layers: {len(self.initialised)} initialised, {len(self.ordinary)} ordinary LoRA"
        if shares:
            total += f"; captured energy mean {_percent(fmean(shares))}, lowest {_percent(min(shares))}"
        left_out = f" ({self.skipped_batches} with NaN or Inf left out)" if self.skipped_batches else ""
        shared = f", {self.ranks} ranks with {size_text(self.reduced_bytes)} reduced" if self.ranks > 1 else ""
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())
        options = (self.config.get(key) for key in ("method", "start", "direction", "scale", "estimator"))
        return [
            total,
            f"{self.micro_batches} micro-batches{left_out}, state {size_text(self.state_bytes)}{shared}, "
            f"seed {self.seed}, {', '.join(str(option) for option in options if option is not None)}",
            f"{phases}, total {sum(self.seconds.values()):.2f} s" if phases else "no timings",
        ]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the spectra of all layers and the energy each recipe captured.

        Args:
            path (`str`, *optional*): also write the figure there (PNG, PDF or SVG by its suffix, PNG without one).

        Returns:
            `matplotlib.figure.Figure`: outside pyplot, so nothing is left open and no window appears.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no layer has a spectrum, so there is nothing to draw.
        """
        done = f"{len(self.initialised)} of {len(self.layers)} layers initialised"
        title = f"{self.config.get('method', 'loraga')}: {done} from {self.micro_batches} micro-batches"
        figure = draw(self.layers, title)
        if path is not None:
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=150)
        return figure


def _size(shape: tuple[int, int], rank: int) -> tuple[str, str]:
    return (f"{shape[0]} x {shape[1]}", str(rank)) if rank else ("-", "-")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first one to the left, numbers to the right, the last one free."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]
