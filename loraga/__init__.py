"""loraga: start a LoRA adapter in the leading singular directions of the full fine-tuning gradient (LoRA-GA)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loraga._version import __version__

if TYPE_CHECKING:
    from loraga.api import estimate_factors, fast_init
    from loraga.config import InitConfig
    from loraga.factors import Factors
    from loraga.integrations.peft import (
        apply_to_peft,
        export_adapter,
        restore_peft,
    )
    from loraga.report.report import InitReport, LayerReport

# public name -> its module, which is imported on first use, so that `loraga --help` does not wait for torch
_MODULES = {
    "Factors": "loraga.factors",
    "InitConfig": "loraga.config",
    "InitReport": "loraga.report",
    "LayerReport": "loraga.report",
    "apply_to_peft": "loraga.integrations.peft",
    "estimate_factors": "loraga.api",
    "export_adapter": "loraga.integrations.peft",
    "fast_init": "loraga.api",
    "restore_peft": "loraga.integrations.peft",
}

__all__ = [
    "Factors",
    "InitConfig",
    "InitReport",
    "LayerReport",
    "__version__",
    "apply_to_peft",
    "estimate_factors",
    "export_adapter",
    "fast_init",
    "restore_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'loraga' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
