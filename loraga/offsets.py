"""How a non-zero start B0 A0 is cancelled, so that the model's function stays what it was.

| offset     | live adapter                      | base weights        | on disk                     |
|------------|-----------------------------------|---------------------|-----------------------------|
| `anchor`   | [A; A0] and [B, -B0], half frozen | untouched           | the same, a plain rank-2r   |
| `subtract` | A, B                              | W - s B0 A0         | [A; A0] and [B, -B0], so it |
|            |                                   |                     | is right on the original W  |
| `zero_b`   | A0, 0                             | untouched           | the same, rank r            |
| `none`     | A0, B0                            | untouched           | the same, rank r            |

With `anchor` and `subtract` an adapter's two linear layers know a second, frozen half of the rank. They stay the
modules PEFT made (hooks, devices and the trained parameter are kept); only their class changes, in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from loraga.sharding import filled, gathered, is_distributed

_RANK_DIM_A, _RANK_DIM_B = 0, 1


@dataclass(frozen=True)
class AdapterSlot:
    """One target layer with the adapter that belongs to it.

    Attributes:
        name (`str`): module name of the target in the base model, as PEFT matches it.
        layer (`nn.Module`): PEFT's layer around the target.
        base_layer (`nn.Module`): the target itself.
        transposed (`bool`): the target stores W as (n, m), as transformers' `Conv1D` does.
        lora_A (`nn.Linear`): A, (rank, n).
        lora_B (`nn.Linear`): B, (m, rank).
        rank (`int`): the trainable rank.
        scaling (`float`): PEFT's s.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features) of the target.
    """

    name: str
    layer: Any
    base_layer: Any
    transposed: bool
    lora_A: nn.Linear
    lora_B: nn.Linear
    rank: int
    scaling: float
    shape: tuple[int, int]


class TwoHalves(nn.Linear):
    """A linear layer whose saved weight is the trained half followed by a frozen half, along `rank_dim`.

    `state_dict` and `load_state_dict` speak the plain concatenated `weight` of rank 2r only. The frozen half is a
    buffer, so no optimizer and no gradient reduction sees it.
    """

    trained_name: ClassVar[str]
    rank_dim: int
    frozen: torch.Tensor

    @property
    def trained(self) -> nn.Parameter:
        """The half the optimizer sees."""
        return cast(nn.Parameter, self._parameters[self.trained_name])

    def whole(self) -> torch.Tensor:
        """Both halves, as saved: (2r, n) for A, (m, 2r) for B."""
        trained: Any = self.trained
        whole: Any = torch.cat([trained, filled(trained, self.frozen.to(trained.dtype))], dim=self.rank_dim)
        return whole.redistribute(placements=trained.placements) if is_distributed(trained) else whole

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + self.trained_name]
        whole = self.whole()
        destination[prefix + "weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        inner = dict(state_dict)
        whole = inner.pop(key, None)
        missing: list[str] = []
        if whole is not None:
            problem = self._why_not(whole)
            if problem:
                error_msgs.append(f"{key}: {problem}")
            else:
                trained, frozen = whole.chunk(2, dim=self.rank_dim)
                inner[prefix + self.trained_name] = filled(self.trained, trained.clone())
                self._adopt(gathered(frozen), assign=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(inner, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        # torch knows the trained half by its inner name; callers know only `weight`
        inner_key = prefix + self.trained_name
        missing_keys.extend(name for name in missing if name != inner_key)
        if whole is None and inner_key in missing:
            missing_keys.append(key)

    def _why_not(self, whole: torch.Tensor) -> str | None:
        """Why `whole` cannot be loaded here, or None."""
        expected = list(self.trained.shape)
        rank = expected[self.rank_dim]
        if list(whole.shape) == expected:
            return (
                f"the saved adapter has rank {rank} and no frozen half, while this one has rank {2 * rank} (half of "
                "it frozen by loraga). Load it into a plain PEFT model, or initialise this one without an offset."
            )
        expected[self.rank_dim] = 2 * rank
        if list(whole.shape) != expected:
            return f"the saved shape is {tuple(whole.shape)}, expected is {tuple(expected)}."
        return None

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        raise NotImplementedError


class AnchoredLinear(TwoHalves):
    """`anchor`: both halves take part in the forward, only the trained one is a parameter."""

    trained_name = "trained_half"

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The concatenation, made anew on each access."""
        return self.whole()

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        if assign:
            self.frozen = frozen.detach().clone()
        else:
            with torch.no_grad():
                self.frozen.copy_(frozen)


class ShiftedLinear(TwoHalves):
    """`subtract`: an ordinary rank-r layer over a base that holds the frozen half already; only saving knows it."""

    trained_name = "weight"

    def _why_not(self, whole: torch.Tensor) -> str | None:
        problem = super()._why_not(whole)
        if problem:
            return problem
        frozen = gathered(whole.chunk(2, dim=self.rank_dim)[1]).to(self.frozen)
        if (frozen - self.frozen).abs().max() > 1e-5 * self.frozen.abs().max():
            return (
                "the saved adapter was started elsewhere: what was subtracted from its base is not what was "
                "subtracted from this one. Load it with PeftModel.from_pretrained on the original base and call "
                "loraga.attach_anchor; training then goes on as before."
            )
        return None

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        """Nothing to take over: it was found equal to ours, and ours is what the base was shifted by."""


def _add_half(linear: nn.Linear, kind: type[TwoHalves], rank_dim: int, frozen: torch.Tensor) -> None:
    """Turn `linear` into `kind`, its weight being the trained half."""
    # the dict is rebuilt, so that the order of the parameters (and with it an optimizer's state) stays the same
    parameters = {kind.trained_name if k == "weight" else k: v for k, v in linear._parameters.items()}
    linear._parameters.clear()
    linear._parameters.update(parameters)
    linear.__class__ = kind
    halves = cast(TwoHalves, linear)
    halves.rank_dim = rank_dim
    trained = halves.trained
    halves.register_buffer("frozen", frozen.to(trained.device, trained.dtype, copy=True).contiguous(), persistent=False)
    shape = list(trained.shape)
    if issubclass(kind, AnchoredLinear):
        shape[rank_dim] *= 2
    linear.out_features, linear.in_features = shape


def _drop_half(linear: nn.Linear) -> None:
    """Turn a `TwoHalves` back into the plain linear layer of its trained half."""
    trained_name = cast(TwoHalves, linear).trained_name
    parameters = {"weight" if k == trained_name else k: v for k, v in linear._parameters.items()}
    linear._parameters.clear()
    linear._parameters.update(parameters)
    del linear.rank_dim, linear.frozen
    linear.__class__ = nn.Linear
    linear.out_features, linear.in_features = linear.weight.shape


def _fill(slot: AdapterSlot, A: torch.Tensor, B: torch.Tensor) -> None:
    with torch.no_grad():
        for weight, value in ((slot.lora_A.weight, A), (slot.lora_B.weight, B)):
            weight.copy_(filled(weight, value))


def write_none(slot: AdapterSlot, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """A = A0, B = B0; the function changes by s B0 A0 (LoRA-One, arXiv 2502.01235, means it to)."""
    _fill(slot, A0, B0)


def write_zero_b(slot: AdapterSlot, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """A = A0, B = 0; the function is the base's bit for bit."""
    _fill(slot, A0, torch.zeros_like(B0))


def write_anchor(slot: AdapterSlot, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """[A0; A0] and [B0, -B0], the second half frozen: the paper's dynamics, base untouched."""
    write_none(slot, A0, B0)
    freeze_copy(slot, AnchoredLinear, A0, B0)


def write_subtract(slot: AdapterSlot, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """A = A0, B = B0 and W <- W - s B0 A0, in place (LoRA-GA, arXiv 2407.05000, to the letter)."""
    write_none(slot, A0, B0)
    shift_base(slot, -1)
    freeze_copy(slot, ShiftedLinear, A0, B0)


def freeze_copy(slot: AdapterSlot, kind: type[TwoHalves], A0: torch.Tensor, B0: torch.Tensor) -> None:
    """Give the adapter, filled with A0 and B0, a frozen half that cancels them."""
    _add_half(slot.lora_A, kind, _RANK_DIM_A, A0)
    _add_half(slot.lora_B, kind, _RANK_DIM_B, -B0)


def freeze_nothing(slot: AdapterSlot, kind: type[TwoHalves]) -> None:
    """Give an adapter without a start a frozen half of zeros: an ordinary LoRA that saves with rank 2r."""
    _add_half(slot.lora_A, kind, _RANK_DIM_A, torch.zeros(slot.lora_A.weight.shape))
    _add_half(slot.lora_B, kind, _RANK_DIM_B, torch.zeros(slot.lora_B.weight.shape))


def split_whole(slot: AdapterSlot) -> None:
    """Take a plain adapter of rank 2r (loaded from disk) as trained half and anchored half."""
    for linear, rank_dim in ((slot.lora_A, _RANK_DIM_A), (slot.lora_B, _RANK_DIM_B)):
        weight = linear.weight
        trained, frozen = weight.detach().chunk(2, dim=rank_dim)
        linear.weight = nn.Parameter(trained.clone(), requires_grad=weight.requires_grad)
        _add_half(linear, AnchoredLinear, rank_dim, frozen)


def drop_anchor(slot: AdapterSlot) -> None:
    """Make an anchored adapter plain again (rank r); what the frozen half held is gone."""
    _drop_half(slot.lora_A)
    _drop_half(slot.lora_B)


def unshift(slot: AdapterSlot) -> None:
    """Turn `subtract` into `anchor`: W <- W + s B0 A0, the function staying the same."""
    frozen_A, frozen_B = cast(TwoHalves, slot.lora_A).frozen, cast(TwoHalves, slot.lora_B).frozen
    _shift(slot, frozen_A, frozen_B, -1)
    for linear, rank_dim, frozen in ((slot.lora_A, _RANK_DIM_A, frozen_A), (slot.lora_B, _RANK_DIM_B, frozen_B)):
        _drop_half(linear)
        _add_half(linear, AnchoredLinear, rank_dim, frozen)


def shift_base(slot: AdapterSlot, sign: int) -> None:
    """W <- W + sign * s B A with the adapter's values as stored; summed in float32 or wider, then cast to W's dtype."""
    _shift(slot, slot.lora_A.weight.detach(), slot.lora_B.weight.detach(), sign)


def _shift(slot: AdapterSlot, A: torch.Tensor, B: torch.Tensor, sign: int) -> None:
    weight = slot.base_layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        delta = (sign * slot.scaling) * (B.to(weight.device, wide) @ A.to(weight.device, wide))
        weight.copy_(weight.to(wide) + (delta.T if slot.transposed else delta))
