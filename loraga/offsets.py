"""How a non-zero start B0 A0 is cancelled, so that the model's function stays what it was.

| offset     | live adapter                      | base weights        | on disk                     |
|------------|-----------------------------------|---------------------|-----------------------------|
| `anchor`   | [A; A0] and [B, -B0], half frozen | untouched           | the same, a plain rank-2r   |
| `subtract` | A, B                              | W - s B0 A0         | [A; A0] and [B, -B0], so it |
|            |                                   |                     | is right on the original W  |
| `zero_b`   | A0, 0                             | untouched           | the same, rank r            |
| `none`     | A0, B0                            | untouched           | the same, rank r            |

With `anchor` and `subtract` the modules that hold an adapter's A and B know a second, frozen half of the rank. They
stay the modules PEFT made (hooks, devices and the trained parameter are kept); only their class changes, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import nn

from loraga.halves import AnchoredDict, HalvedDict, ShiftedDict, join, split, why_not, why_not_shifted
from loraga.precision import own_precision
from loraga.sharding import filled, gathered
from loraga.sink import WholeWeight

_RANK_DIM_A, _RANK_DIM_B = 0, 1


@dataclass(frozen=True)
class AdapterSlot:
    """One target layer with the adapter that belongs to it.

    Attributes:
        name (`str`): module name of the target in the base model, as PEFT matches it; with the parameter's name behind
            it where PEFT adapts a parameter (`target_parameters`).
        layer (`nn.Module`): PEFT's layer around the target.
        base_layer (`nn.Module`): the target itself.
        transposed (`bool`): the target stores W as (n, m), as transformers' `Conv1D` does.
        lora_A (`nn.Module`): holds A, (rank, n): a linear layer, a convolution whose weight is A reshaped, or the
            `ParameterDict` of an embedding.
        lora_B (`nn.Module`): holds B, (m, rank), likewise.
        rank (`int`): the trainable rank, of each expert.
        scaling (`float`): PEFT's s.
        shape (`tuple[int, int]`): (m, n) = (out_features, in_features) of the target, of each expert.
        key (`str`): what A and B are called in the modules that hold them.
        experts (`int`): so many matrices lie in the target. A holds theirs one behind the other, (experts rank, n); in
            B, (m, rank experts), the expert is the faster index of the columns. `start_of` and reports know each expert
            by itself, see `parts`.
        part (`int`): which expert this is, in one of the `parts`.
        whole (`WholeWeight`, *optional*): the target's weight, where autograd has to form its gradient.
        path (`str`): module name of `layer` in the base model.
    """

    name: str
    layer: Any
    base_layer: Any
    transposed: bool
    lora_A: Any
    lora_B: Any
    rank: int
    scaling: float
    shape: tuple[int, int]
    key: str = "weight"
    experts: int = 1
    part: int = 0
    whole: WholeWeight | None = None
    path: str = ""

    @property
    def weight(self) -> torch.Tensor:
        """The target's weight as it is stored."""
        return self.base_layer.weight if self.whole is None else self.whole.value

    @property
    def if_zero(self) -> str:
        """What a gradient of zero means here."""
        return "gradient is zero" if self.experts == 1 else "no token reached this expert"

    def parts(self) -> list[AdapterSlot]:
        """One for each matrix in the target."""
        if self.whole is None or self.experts == 1:
            return [self]
        return [replace(self, name=name, part=index) for index, name in enumerate(self.whole.parts(self.name))]

    def matrices(self, A: torch.Tensor, B: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A and B as PEFT holds them, of any rank, as views (rank, n) and (m, rank) for each of the `parts`."""
        if self.experts == 1:
            return [(A.flatten(1), B.flatten(1))]
        return list(zip(A.unflatten(0, (self.experts, -1)), B.unflatten(1, (-1, self.experts)).unbind(2), strict=True))

    def held(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `matrices`."""
        if self.experts > 1:
            return torch.cat([A for A, _ in parts]), torch.stack([B for _, B in parts], dim=2).flatten(1)
        ((A, B),) = parts
        sizes, ones = trained(self.lora_A, self.key).shape[2:], trained(self.lora_B, self.key).shape[2:]
        return A.unflatten(1, (-1, *sizes)) if sizes else A, B.reshape(*B.shape, *ones)


class TwoHalves(nn.Module):
    """A layer whose saved weight is the trained half followed by a frozen half, along `rank_dim`.

    Where that dimension holds several experts, `blocks` of them, this goes for the part of each. `state_dict` and
    `load_state_dict` speak the plain concatenated `weight` of rank 2r only. The frozen half is a buffer, so no
    optimizer and no gradient reduction sees it.
    """

    trained_name: ClassVar[str]
    rank_dim: int
    blocks: int
    frozen: torch.Tensor

    @property
    def trained(self) -> nn.Parameter:
        """The half the optimizer sees."""
        return cast(nn.Parameter, self._parameters[self.trained_name])

    def whole(self) -> torch.Tensor:
        """Both halves, as saved: (2r, n) for A, (m, 2r) for B."""
        trained = self.trained
        return join(trained, self.frozen.to(trained.dtype), self.rank_dim, self.blocks)

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
                trained, frozen = split(gathered(whole), self.rank_dim, self.blocks)
                inner[prefix + self.trained_name] = filled(self.trained, trained.clone())
                self._adopt(frozen, assign=local_metadata.get("assign_to_params_buffers", False))
        super()._load_from_state_dict(inner, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        # torch knows the trained half by its inner name; callers know only `weight`
        inner_key = prefix + self.trained_name
        missing_keys.extend(name for name in missing if name != inner_key)
        if whole is None and inner_key in missing:
            missing_keys.append(key)

    def _why_not(self, whole: torch.Tensor) -> str | None:
        """Why `whole` cannot be loaded here, or None."""
        return why_not(whole, self.trained, self.rank_dim)

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        raise NotImplementedError


class Anchored(TwoHalves):
    """`anchor`: both halves take part in the forward, only the trained one is a parameter."""

    trained_name = "trained_half"

    @property
    def weight(self) -> torch.Tensor:
        """The concatenation, made anew on each access."""
        return self.whole()

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        if assign:
            self.frozen = frozen.detach().clone()
        else:
            with torch.no_grad():
                self.frozen.copy_(frozen)


class Shifted(TwoHalves):
    """`subtract`: an ordinary rank-r layer over a base that holds the frozen half already; only saving knows it."""

    trained_name = "weight"

    def _why_not(self, whole: torch.Tensor) -> str | None:
        problem = super()._why_not(whole)
        return problem or why_not_shifted(split(gathered(whole), self.rank_dim, self.blocks)[1], self.frozen)

    def _adopt(self, frozen: torch.Tensor, assign: bool) -> None:
        """Nothing to take over: it was found equal to ours, and ours is what the base was shifted by."""


class AnchoredLinear(Anchored, nn.Linear):  # type: ignore[override]
    """`Anchored`, of a linear layer."""


class AnchoredConv1d(Anchored, nn.Conv1d):  # type: ignore[override]
    """`Anchored`, of a convolution."""


class AnchoredConv2d(Anchored, nn.Conv2d):  # type: ignore[override]
    """`Anchored`, of a convolution."""


class AnchoredConv3d(Anchored, nn.Conv3d):  # type: ignore[override]
    """`Anchored`, of a convolution."""


class ShiftedLinear(Shifted, nn.Linear):
    """`Shifted`, of a linear layer."""


class ShiftedConv1d(Shifted, nn.Conv1d):
    """`Shifted`, of a convolution."""


class ShiftedConv2d(Shifted, nn.Conv2d):
    """`Shifted`, of a convolution."""


class ShiftedConv3d(Shifted, nn.Conv3d):
    """`Shifted`, of a convolution."""


Kind = type[Anchored] | type[Shifted]

_CLASSES: dict[Kind, dict[type[nn.Module], type[TwoHalves]]] = {
    Anchored: {
        nn.Linear: AnchoredLinear,
        nn.Conv1d: AnchoredConv1d,
        nn.Conv2d: AnchoredConv2d,
        nn.Conv3d: AnchoredConv3d,
    },
    Shifted: {
        nn.Linear: ShiftedLinear,
        nn.Conv1d: ShiftedConv1d,
        nn.Conv2d: ShiftedConv2d,
        nn.Conv3d: ShiftedConv3d,
    },
}
_PLAIN = {kind: plain for kinds in _CLASSES.values() for plain, kind in kinds.items()}
_DICTS: dict[Kind, type[HalvedDict]] = {Anchored: AnchoredDict, Shifted: ShiftedDict}


def can_halve(module: nn.Module) -> bool:
    """Whether there is a form with two halves of what holds A or B."""
    return type(module) in _CLASSES[Anchored] or isinstance(module, (TwoHalves, nn.ParameterDict))


def halved(slot: AdapterSlot, kind: Kind | None = None) -> bool:
    """Whether the adapter has a frozen half (of this kind)."""
    holder = slot.lora_A
    if isinstance(holder, HalvedDict):
        return holder.halved(slot.key) and (kind is None or isinstance(holder, _DICTS[kind]))
    return isinstance(holder, kind or TwoHalves)


def trained(holder: nn.Module, key: str) -> nn.Parameter:
    """What the optimizer sees of A or B."""
    if isinstance(holder, HalvedDict):
        return holder.trained(key)
    return holder.trained if isinstance(holder, TwoHalves) else holder.get_parameter(key)


def _frozen(holder: nn.Module, key: str) -> torch.Tensor:
    return holder.frozen(key) if isinstance(holder, HalvedDict) else cast(TwoHalves, holder).frozen


def whole(holder: nn.Module, key: str) -> torch.Tensor:
    """A or B as saved: both halves where there are two."""
    if isinstance(holder, HalvedDict) and holder.halved(key):
        return holder.whole(key)
    return holder.whole() if isinstance(holder, TwoHalves) else holder.get_parameter(key)


def _sides(slot: AdapterSlot) -> tuple[tuple[nn.Module, int, int], ...]:
    """What holds A and what holds B, each with the dimension of the rank, and the blocks in it."""
    return (slot.lora_A, _RANK_DIM_A, slot.experts), (slot.lora_B, _RANK_DIM_B, 1)


def _add_half(holder: nn.Module, key: str, kind: Kind, rank_dim: int, blocks: int, frozen: torch.Tensor) -> None:
    """Turn `holder` into one of two halves, its weight being the trained one."""
    if isinstance(holder, nn.ParameterDict):
        holder.__class__ = _DICTS[kind]
        by_name = cast(HalvedDict, holder)
        by_name.rank_dim = rank_dim
        by_name.add_half(key, frozen)
        return
    new_class = _CLASSES[kind][type(holder)]
    # the dict is rebuilt, so that the order of the parameters (and with it an optimizer's state) stays the same
    parameters = {new_class.trained_name if k == "weight" else k: v for k, v in holder._parameters.items()}
    holder._parameters.clear()
    holder._parameters.update(parameters)
    holder.__class__ = new_class
    halves = cast(TwoHalves, holder)
    halves.rank_dim, halves.blocks = rank_dim, blocks
    weight = halves.trained
    halves.register_buffer("frozen", frozen.to(weight.device, weight.dtype, copy=True).contiguous(), persistent=False)
    shape = list(weight.shape)
    if issubclass(new_class, Anchored):
        shape[rank_dim] *= 2
    _set_features(holder, shape)


def _drop_half(holder: nn.Module, key: str) -> None:
    """Turn what `_add_half` made back into the plain holder of its trained half."""
    if isinstance(holder, HalvedDict):
        holder.drop_half(key)
        if not any(map(holder.halved, holder)):
            del holder.rank_dim
            cast(nn.Module, holder).__class__ = nn.ParameterDict
        return
    halves = cast(TwoHalves, holder)
    parameters = {"weight" if k == halves.trained_name else k: v for k, v in holder._parameters.items()}
    holder._parameters.clear()
    holder._parameters.update(parameters)
    del halves.rank_dim, halves.blocks, halves.frozen
    holder.__class__ = _PLAIN[type(halves)]
    _set_features(holder, holder.get_parameter("weight").shape)


def _set_features(holder: Any, shape: Sequence[int]) -> None:
    outs, ins = shape[:2]
    if isinstance(holder, nn.Linear):
        holder.out_features, holder.in_features = outs, ins
    else:
        holder.out_channels, holder.in_channels = outs, ins


def _fill(slot: AdapterSlot, A: torch.Tensor, B: torch.Tensor) -> None:
    with torch.no_grad():
        for holder, value in ((slot.lora_A, A), (slot.lora_B, B)):
            weight = trained(holder, slot.key)
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
    freeze_copy(slot, Anchored, A0, B0)


def write_subtract(slot: AdapterSlot, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """A = A0, B = B0 and W <- W - s B0 A0, in place (LoRA-GA, arXiv 2407.05000, to the letter)."""
    write_none(slot, A0, B0)
    shift_base(slot, -1)
    freeze_copy(slot, Shifted, A0, B0)


def freeze_copy(slot: AdapterSlot, kind: Kind, A0: torch.Tensor, B0: torch.Tensor) -> None:
    """Give the adapter, filled with A0 and B0, a frozen half that cancels them."""
    for (holder, rank_dim, blocks), half in zip(_sides(slot), (A0, -B0), strict=True):
        _add_half(holder, slot.key, kind, rank_dim, blocks, half)


def freeze_nothing(slot: AdapterSlot, kind: Kind) -> None:
    """Give an adapter without a start a frozen half of zeros: an ordinary LoRA that saves with rank 2r."""
    for holder, rank_dim, blocks in _sides(slot):
        _add_half(holder, slot.key, kind, rank_dim, blocks, torch.zeros(trained(holder, slot.key).shape))


def split_whole(slot: AdapterSlot) -> None:
    """Take a plain adapter of rank 2r (loaded from disk) as trained half and anchored half."""
    for holder, rank_dim, blocks in _sides(slot):
        weight = trained(holder, slot.key)
        first, frozen = split(weight.detach(), rank_dim, blocks)
        setattr(holder, slot.key, nn.Parameter(first.clone(), requires_grad=weight.requires_grad))
        _add_half(holder, slot.key, Anchored, rank_dim, blocks, frozen)


def drop_anchor(slot: AdapterSlot) -> None:
    """Make an anchored adapter plain again (rank r); what the frozen half held is gone."""
    _drop_half(slot.lora_A, slot.key)
    _drop_half(slot.lora_B, slot.key)


def unshift(slot: AdapterSlot) -> None:
    """Turn `subtract` into `anchor`: W <- W + s B0 A0, the function staying the same."""
    frozen_A, frozen_B = _frozen(slot.lora_A, slot.key), _frozen(slot.lora_B, slot.key)
    _shift(slot, frozen_A, frozen_B, -1)
    for (holder, rank_dim, blocks), half in zip(_sides(slot), (frozen_A, frozen_B), strict=True):
        _drop_half(holder, slot.key)
        _add_half(holder, slot.key, Anchored, rank_dim, blocks, half)


def shift_base(slot: AdapterSlot, sign: int) -> None:
    """W <- W + sign * s B A with the adapter's values as stored; summed in float32 or wider, then cast to W's dtype."""
    _shift(slot, trained(slot.lora_A, slot.key).detach(), trained(slot.lora_B, slot.key).detach(), sign)


def _shift(slot: AdapterSlot, A: torch.Tensor, B: torch.Tensor, sign: int) -> None:
    weight = slot.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), own_precision(weight.device):
        stored = (weight.T if slot.transposed else weight,) if slot.whole is None else slot.whole.matrices(weight)
        for matrix, (a, b) in zip(stored, slot.matrices(A, B), strict=True):
            delta = (sign * slot.scaling) * (b.to(weight.device, wide) @ a.to(weight.device, wide))
            matrix.copy_(matrix.to(wide) + delta.view(matrix.shape))
