"""All use of PEFT: find targets, inject an adapter, write its start, export it, replace PEFT's own LoRA-GA.

No other part of loraga imports peft: they import the names below.
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
