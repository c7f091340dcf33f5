"""What an initialisation did, layer by layer: a table, a JSON file, a plot."""

from loraga.report.report import FORMAT, InitReport, LayerReport, effective_rank, versions

__all__ = ["FORMAT", "InitReport", "LayerReport", "effective_rank", "versions"]
