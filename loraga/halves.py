"""Two halves of a rank in one tensor, and the embedding adapters that have them.

PEFT keeps A and B of a linear layer or convolution in modules of their own (`loraga.offsets.TwoHalves`), but those of
an embedding as bare parameters in a `ParameterDict`, by adapter name. That dictionary, too, only changes its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loraga.sharding import filled, gathered, is_distributed

_FROZEN = "_frozen"


def join(trained: Tensor, frozen: Tensor, dim: int, blocks: int = 1) -> Tensor:
    """Trained half, then frozen half, along `dim`; where that holds several equal blocks, within each of them.

    Where the trained half is sharded (the frozen one never is), so is the result.
    """
    if is_distributed(trained):
        if blocks > 1:  # no rank's part of them need be whole blocks
            return filled(trained, join(gathered(trained.detach()), frozen, dim, blocks))
        whole: Any = torch.cat([trained, filled(trained, frozen)], dim)
        return whole.redistribute(placements=trained.placements)  # type: ignore[attr-defined]
    if blocks == 1:
        return torch.cat([trained, frozen], dim)
    parts = [half.unflatten(dim, (blocks, -1)) for half in (trained, frozen)]
    return torch.cat(parts, dim + 1).flatten(dim, dim + 1)


def split(whole: Tensor, dim: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """The inverse of `join`."""
    if blocks == 1:
        trained, frozen = whole.chunk(2, dim)
        return trained, frozen
    trained, frozen = whole.unflatten(dim, (blocks, -1)).chunk(2, dim + 1)
    return trained.flatten(dim, dim + 1), frozen.flatten(dim, dim + 1)


def why_not(whole: Tensor, trained: Tensor, dim: int) -> str | None:
    """Why a saved `whole` cannot be loaded beside `trained`, or None."""
    expected = list(trained.shape)
    rank = expected[dim]
    if list(whole.shape) == expected:
        return (
            f"the saved adapter has rank {rank} and no frozen half, while this one has rank {2 * rank} (half of "
            "it frozen by loraga). Load it into a plain PEFT model, or initialise this one without an offset."
        )
    expected[dim] = 2 * rank
    if list(whole.shape) != expected:
        return f"the saved shape is {tuple(whole.shape)}, expected is {tuple(expected)}."
    return None


def why_not_shifted(saved: Tensor, frozen: Tensor) -> str | None:
    """Why the saved frozen half does not go with a base from which `frozen` was subtracted, or None."""
    if (saved.to(frozen) - frozen).abs().max() > 1e-5 * frozen.abs().max():
        return (
            "the saved adapter was started elsewhere: what was subtracted from its base is not what was "
            "subtracted from this one. Load it with PeftModel.from_pretrained on the original base and call "
            "loraga.attach_anchor; training then goes on as before."
        )
    return None


class HalvedDict(nn.ParameterDict):
    """Parameters by adapter name, some of them the trained half of what is saved.

    `state_dict` and `load_state_dict` speak the concatenation of both halves, along `rank_dim`. Iterating gives the
    trained parameters.
    """

    rank_dim: int

    def halved(self, key: str) -> bool:
        """Whether this adapter has a frozen half."""
        return key + _FROZEN in self._buffers

    def frozen(self, key: str) -> Tensor:
        """The frozen half of an adapter that has one."""
        return self.get_buffer(key + _FROZEN)

    def whole(self, key: str) -> Tensor:
        """Both halves, as saved."""
        trained = self.trained(key)
        return join(trained, self.frozen(key).to(trained.dtype), self.rank_dim)

    def trained(self, key: str) -> nn.Parameter:
        """What the optimizer sees of an adapter."""
        return self.get_parameter(key)

    def add_half(self, key: str, frozen: Tensor) -> None:
        """Give an adapter a frozen half."""
        trained = self.trained(key)
        frozen = frozen.to(trained.device, trained.dtype, copy=True).contiguous()
        self.register_buffer(key + _FROZEN, frozen, persistent=False)

    def drop_half(self, key: str) -> None:
        """Take the frozen half away."""
        delattr(self, key + _FROZEN)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        if self.halved(key):
            self.drop_half(key)

    def items(self) -> Iterable[tuple[str, Any]]:
        return ((key, self.trained(key)) for key in self)

    def values(self) -> Iterable[Any]:
        return (self.trained(key) for key in self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in filter(self.halved, self):
            whole = self.whole(key)
            destination[prefix + key] = whole if keep_vars else whole.detach()

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
        inner = dict(state_dict)
        for key in filter(self.halved, self):
            whole = inner.get(prefix + key)
            if whole is None:
                continue
            problem = why_not(whole, self.trained(key), self.rank_dim) or self._why_not(key, whole)
            if problem:
                error_msgs.append(f"{prefix}{key}: {problem}")
                del inner[prefix + key]
            else:
                trained, frozen = split(gathered(whole), self.rank_dim)
                inner[prefix + key] = filled(self.trained(key), trained.clone())
                self._adopt(key, frozen)
        missing: list[str] = []
        super()._load_from_state_dict(inner, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in missing if name not in state_dict)

    def _why_not(self, key: str, whole: Tensor) -> str | None:
        return None

    def _adopt(self, key: str, frozen: Tensor) -> None:
        raise NotImplementedError


class AnchoredDict(HalvedDict):
    """`anchor`: both halves take part in the forward."""

    def __getitem__(self, key: str) -> Any:
        return self.whole(key) if self.halved(key) else super().__getitem__(key)

    def _adopt(self, key: str, frozen: Tensor) -> None:
        self.add_half(key, frozen.detach())


class ShiftedDict(HalvedDict):
    """`subtract`: the base holds the frozen half already; only saving knows it."""

    def _why_not(self, key: str, whole: Tensor) -> str | None:
        return why_not_shifted(split(gathered(whole), self.rank_dim)[1], self.frozen(key))

    def _adopt(self, key: str, frozen: Tensor) -> None:
        """Nothing to take over: it was found equal to ours."""
