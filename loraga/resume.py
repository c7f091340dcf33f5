"""Say what is wrong when an optimizer's saved state meets an adapter whose frozen half was not attached.

PEFT reads an adapter saved with `anchor` or `subtract` as an ordinary LoRA of rank 2r. If a trainer then loads the
optimizer state of its r trained rows, torch does not notice, and a fused AdamW reads beyond the end of that state.
This is looked for once, at the first step of each of torch's own optimizers.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_seen: WeakSet[Optimizer] = WeakSet()
_ELEMENTWISE = ("exp_avg", "momentum_buffer")


def watch_optimizers() -> None:
    """Look at every optimizer's state before its first step, in this process."""
    register_optimizer_step_pre_hook(_refuse_state_of_another_shape)


def _refuse_state_of_another_shape(optimizer: Optimizer, *_: Any) -> None:
    """Raise `ValueError` if a moment does not have its parameter's shape."""
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    if not type(optimizer).__module__.startswith("torch.optim."):
        return  # others may keep state of any shape
    for parameter, state in optimizer.state.items():
        for key in _ELEMENTWISE:
            moment = state.get(key)
            if isinstance(moment, torch.Tensor) and moment.shape != parameter.shape:
                raise ValueError(_explain(key, moment, parameter))
    _seen.add(optimizer)


def _explain(key: str, moment: torch.Tensor, parameter: torch.Tensor) -> str:
    text = f"The optimizer's {key!r} has shape {tuple(moment.shape)}, its parameter {tuple(parameter.shape)}."
    if 2 * moment.numel() == parameter.numel():
        return text + (
            " The checkpoint was written by an adapter with a frozen half; call loraga.attach_anchor(model, "
            "checkpoint_dir) after PeftModel.from_pretrained and before making the trainer or optimizer."
        )
    return text + " It was saved by another model or with another rank."
