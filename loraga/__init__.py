"""loraga: start a LoRA adapter in the leading singular directions of the full fine-tuning gradient (LoRA-GA)."""

from loraga import backends as _backends  # registers the ops' implementations
from loraga.api import estimate_factors, fast_init
from loraga.config import InitConfig
from loraga.factors import Factors
from loraga.report import InitReport, LayerReport

__all__ = [
    "Factors",
    "InitConfig",
    "InitReport",
    "LayerReport",
    "estimate_factors",
    "fast_init",
]

__version__ = "0.1.0"
