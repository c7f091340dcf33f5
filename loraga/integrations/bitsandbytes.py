"""Layers of bitsandbytes. The library itself is never imported: its layers are recognised by their module's name."""

from __future__ import annotations

from torch import nn


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes'.

    In eval mode on a CPU these layers use code for inference only: 4-bit layers repack their weight for good, into a
    form without backward (`is_packed_for_inference`), and 8-bit layers round their input to int8.
    """
    return type(module).__module__.startswith("bitsandbytes.")


def is_packed_for_inference(module: nn.Module) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight for inference, so that this layer has no backward any more."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
