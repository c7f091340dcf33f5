"""The home of PEFT: find targets, inject an adapter, write its start, read and write its files.

Nothing else in loraga imports peft; the others import these names.
"""

from __future__ import annotations

from peft import LoraConfig, PeftModel

from loraga._rollback import remember_model
from loraga.integrations.peft.export import export_adapter
from loraga.integrations.peft.plugin import apply_to_peft, restore_peft
from loraga.integrations.peft.slots import (
    Adapter,
    AdapterSlot,
    adapters_disabled,
    base_weight,
    check_adapter,
    find_slots,
)
from loraga.integrations.peft.targets import find_target_names, inject, inner_model, is_linear_like
from loraga.integrations.peft.writing import check_magnitudes, start_of, write_start

__all__ = [
    "Adapter",
    "AdapterSlot",
    "LoraConfig",
    "PeftModel",
    "adapters_disabled",
    "apply_to_peft",
    "base_weight",
    "check_adapter",
    "check_magnitudes",
    "export_adapter",
    "find_slots",
    "find_target_names",
    "inject",
    "inner_model",
    "is_linear_like",
    "remember_model",
    "restore_peft",
    "start_of",
    "write_start",
]
