"""What an initialisation did, layer by layer, as data that can be saved and loaded."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraga._atomic_files import atomic_file
from loraga._version import __version__
from loraga.report.plot import draw
from loraga.report.text import table

INITIALISED = "initialised"
ORDINARY = "ordinary"
# why a layer has no start of its own; it has the embedding's (`ensure_weight_tying`)
TIED = "its adapter is the embedding's, transposed"
FORMAT = 2
LIBRARIES = ("torch", "triton", "peft", "transformers")


def effective_rank(spectrum: Sequence[float]) -> float | None:
    """How many directions a spectrum is spread over: exp of the entropy of the shares of energy, 1 to its length.

    Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007). The shares here are those of energy, sigma_i^2 / sum
    sigma^2, where the paper takes sigma_i / sum sigma. The result is 1 for one direction and q for q equal ones.

    Args:
        spectrum (`Sequence[float]`): singular values, in any order and of any scale.

    Returns:
        `float`, *optional*: `None` if the spectrum is empty, zero or not finite.
    """
    largest = max(spectrum, default=0.0)
    if not (math.isfinite(largest) and largest > 0):
        return None
    # Divide by the largest first: in float64 the squares of values below 1e-162 would underflow to 0.
    energies = [(s / largest) ** 2 for s in spectrum]
    total = sum(energies)
    return math.exp(-sum(e / total * math.log(e / total) for e in energies if e > 0))


def versions() -> dict[str, str | None]:
    """Installed versions of loraga and the libraries it works with, `None` where one is missing. None is imported."""
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

    ```py
    lowest = min(report.initialised, key=lambda layer: layer.captured_energy)
    print(lowest.name, lowest.captured_energy, lowest.spectrum[0])
    ```

    Attributes:
        name (`str`): of the module.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features); (0, 0) for a layer that loraga cannot start.
        rank (`int`): r of the adapter; 0 for a layer that loraga cannot start.
        status (`str`): `"initialised"`, or `"ordinary"` where the layer keeps an ordinary LoRA start.
        reason (`str`): why it is ordinary; empty where it is initialised.
        spectrum (`list[float]`): the leading singular values of the mean gradient, descending, in its unit.
        directions (`int`): how many singular directions of the gradient the start uses: r, or r - 1 where r is odd and
            the rows come in pairs, and fewer in a layer that has no more. Its other rows are ordinary LoRA.
        captured_energy (`float`, *optional*): the share of |G|_F^2 in the triplets that the start uses, 0 to 1.
        effective_rank (`float`, *optional*): see [`effective_rank`]. It is that of `spectrum`, so at most its length.
        updates (`int`): micro-batches that entered the mean.
        skipped (`int`): micro-batches left out because the layer's gradient had NaN or Inf.
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
    """What an initialisation did. `print` shows it as a table, [`~InitReport.plot`] draws it.

    ```py
    report = peft_model.loraga_report
    print(report)
    report.save("loraga_report.json")
    assert loraga.InitReport.load("loraga_report.json") == report
    ```

    Attributes:
        layers (`list[LayerReport]`): in the order of the model.
        config (`dict`): options of the initialisation.
        seconds (`dict[str, float]`): wall time by phase, in seconds.
        state_bytes (`int`): the largest memory of the estimators on this rank, in bytes.
        micro_batches (`int`): batches taken from the loaders of all ranks.
        skipped_batches (`int`): those of them in which a layer's gradient had NaN or Inf.
        versions (`dict`): of the libraries, see [`versions`].
        seed (`int`): of the random numbers used.
        ranks (`int`): processes that took part.
        reduced_bytes (`int`): bytes that this rank gave to reductions and broadcasts among the ranks.
        kernels (`dict[str, dict[str, str]]`): what ran each op that has a Triton kernel, for each CUDA device of this
            rank: "triton", or "torch: " and the reason (docs/kernels.md). Empty without a CUDA device.
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
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)

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
        """Write the report as JSON, the whole file or none. Missing folders are made."""
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
        return table(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the spectra of all layers, and the share of its gradient that the start of each layer captured.

        Args:
            path (`str`, *optional*): also write the figure there (PNG, PDF or SVG by the suffix, else PNG).

        Returns:
            `matplotlib.figure.Figure`: made without pyplot, so that no window opens and nothing has to be closed.

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
