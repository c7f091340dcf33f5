"""Write a trained adapter at a smaller rank, for servers that limit the rank."""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Set
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from loraga._atomic_files import atomic_files
from loraga._messages import listed
from loraga.config import check_positive_int
from loraga.distributed.sharding import is_sharded
from loraga.integrations.peft.config import plain_start
from loraga.integrations.peft.slots import AdapterSlot, check_is_lora, find_slots, name_in_patterns
from loraga.integrations.peft.targets import INNER_PREFIX

# a warning names the layers whose update changes by more than this (relative Frobenius error)
_LARGE_ERROR = 0.1


def export_adapter(
    peft_model: PeftModel,
    output_dir: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    budget: int | None = None,
    one_rank: bool = False,
) -> dict[str, float]:
    """Write an adapter as a plain PEFT LoRA of a smaller rank, for servers that limit the rank.

    Every layer's update s B A of the base weight is replaced by its best approximation of that rank (Eckart and Young
    1936), found from the factors: no m x n matrix is formed. All layers get one scaling, alpha / r, and rsLoRA is never
    written, since several readers of adapters take it for alpha / r. The model is not changed. Anything else the
    adapter has (`modules_to_save`, DoRA magnitudes, layers that loraga cannot start) is written as it is.

    ```py
    errors = loraga.export_adapter(model, "adapter-r8", rank=8)
    errors = loraga.export_adapter(model, "adapter-small", budget=8 * number_of_layers)  # ranks by layer
    ```

    Args:
        peft_model (`PeftModel`): the model that has the adapter.
        output_dir (`str`): directory to write to; made if missing.
        adapter_name (`str`): the adapter's name.
        rank (`int`, *optional*): of every layer. Without `rank` and `budget` each layer keeps its own.
        budget (`int`, *optional*): the sum of all layers' ranks (an expert counts as a layer). The largest singular
            values of all updates share it, with one threshold for all layers; each layer keeps at least rank 1. The
            ranks are written as `rank_pattern`.
        one_rank (`bool`): fill every layer up with zeros to the largest rank among them, for readers that do not know
            `rank_pattern`.

    Returns:
        `dict[str, float]`: relative Frobenius error of each layer's update, by layer name. Above 0.1 a warning names
        the layers.

    Raises:
        TypeError: `rank` or `budget` is no whole number, or the adapter is no LoRA.
        ValueError: there is no such adapter or layer, `rank` or `budget` is too small, both are given, the model is
            sharded, or a layer shares memory with another in a way that the export would break.
    """
    for name, given in (("rank", rank), ("budget", budget)):
        if given is not None:
            check_positive_int(name, given)
    if rank is not None and budget is not None:
        raise ValueError(f"rank={rank} and budget={budget} exclude each other; give one of them.")
    if is_sharded(peft_model):
        raise ValueError(
            "The parameters of this model are sharded; save the adapter, and export it from a whole model."
        )
    check_is_lora(peft_model, adapter_name)
    slots, others = find_slots(peft_model, adapter_name)
    updates = [_Update(slot) for slot in slots]
    if budget is not None:
        _share(budget, updates)
    elif rank is not None:
        for update in updates:
            update.rank = rank
    if one_rank:
        largest = max((update.rank for update in updates), default=1)
        for update in updates:
            update.filled = largest
    weights = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    layout = _Layout(peft_model, adapter_name, updates, others)
    for update in updates:
        A, B = update.values(layout.scaling)
        for key, value in zip(_saved_keys(update.slot), (A, B), strict=True):
            weights[key] = value.to(update.slot.A.dtype)
    for path, update in layout.tied.items():
        key_A, key_B = (f"{INNER_PREFIX}{path}.lora_{letter}.weight" for letter in "AB")
        A, B = (weights[key] for key in _saved_keys(update.slot))
        weights[key_A], weights[key_B] = B.T, A.T
    errors = {name: error for update in updates for name, error in update.errors().items()}
    _write(peft_model, output_dir, weights, layout.config)
    large = {name: error for name, error in errors.items() if error > _LARGE_ERROR}
    if large:
        named = listed([f"{name} ({error:.0%})" for name, error in sorted(large.items(), key=lambda item: -item[1])])
        warnings.warn(
            f"At this rank the export changes the update of {len(large)} of {len(errors)} layers by more than "
            f"{_LARGE_ERROR:.0%}: {named}. Take a larger rank or budget.",
            stacklevel=2,
        )
    return errors


class _Update:
    """A layer's update s B A as singular triplets, in float64 on the host, and the rank that it gets."""

    def __init__(self, slot: AdapterSlot) -> None:
        self.slot = slot
        self.parts = [_triplets(A, B) for A, B in slot.matrices(slot.A.detach(), slot.B.detach())]
        self.rank = slot.rank
        self.filled = 0

    @property
    def stored(self) -> int:
        """The rank in the file: that of the update, or more where zeros are added."""
        return max(self.rank, self.filled)

    def strengths(self) -> Tensor:
        """By index (r,), the largest singular value of the update s B A over all parts."""
        return torch.stack([S for _, S, _ in self.parts]).amax(0) * abs(self.slot.scaling)

    def values(self, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B in PEFT's shape, for a layer whose scaling is this one."""
        parts = []
        for U, S, Vh in self.parts:
            root = S[: self.rank].sqrt()
            A, B = root[:, None] * Vh[: len(root)], U[:, : len(root)] * root * (self.slot.scaling / scaling)
            missing = self.stored - len(root)
            parts.append((nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))))
        return self.slot.joined(parts)

    def errors(self) -> dict[str, float]:
        """The relative Frobenius error of each part, by name."""
        found = {}
        for part, (_, S, _) in zip(self.slot.parts(), self.parts, strict=True):
            total = float(S.norm())
            found[part.name] = float(S[self.rank :].norm()) / total if total else 0.0
        return found


class _Layout:
    """The config of the export, the scaling of all its layers, and the layers whose adapter is another's transpose."""

    def __init__(
        self, peft_model: PeftModel, adapter_name: str, updates: list[_Update], others: Mapping[str, str]
    ) -> None:
        trained = peft_model.peft_config[adapter_name]
        self.config = copy.copy(plain_start(trained))
        self.scaling = _scaling_of(trained)
        self.tied = _tied(peft_model, adapter_name, updates, others)
        layers = {update.slot.name: (update.stored, self.scaling) for update in updates}
        for path in others:
            layer = peft_model.base_model.model.get_submodule(path)
            tied = self.tied.get(path)
            kept = (layer.r[adapter_name], layer.scaling[adapter_name])
            layers[name_in_patterns(path, layer)] = (tied.stored, self.scaling) if tied else kept
        rank = max((rank for rank, _ in layers.values()), default=trained.r)
        self.config.use_rslora = False
        self.config.r, self.config.lora_alpha = rank, _whole(self.scaling * rank)
        ranks = {name: own for name, (own, _) in layers.items() if own != rank}
        alphas = {name: _whole(own * s) for name, (own, s) in layers.items() if own * s != rank * self.scaling}
        self.config.rank_pattern = {_pattern(name, layers.keys()): own for name, own in ranks.items()}
        self.config.alpha_pattern = {_pattern(name, layers.keys()): alpha for name, alpha in alphas.items()}


def _scaling_of(config: LoraConfig) -> float:
    """PEFT's s of a layer that no pattern matches; 1 where it is 0, since B is divided by it."""
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) or 1.0


def _whole(alpha: float) -> float:
    """`alpha`, as an int where it is a whole number, since some readers of adapters take an int only."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _pattern(name: str, names: Set[str]) -> str:
    """A key of `rank_pattern` that matches this layer only.

    PEFT takes a key for a regular expression that matches the end of a name, from a dot on. A plain name is what most
    readers of adapters understand, so it is escaped and tied to the beginning only where it would match another layer.
    """
    alone = re.fullmatch(name, name) and not any(re.match(rf"(.*\.)?({name})$", other) for other in names - {name})
    return name if alone else f"^{re.escape(name)}"


def _share(budget: int, updates: list[_Update]) -> None:
    """Set the rank of each update, at least 1: the largest singular values of all updates share the budget.

    Raises:
        ValueError: the budget is too small for rank 1 everywhere.
    """
    costs = [len(update.parts) for update in updates]
    if budget < sum(costs):
        raise ValueError(f"budget={budget} is too small: {sum(costs)} is rank 1 for each layer of the adapter.")
    entries = [
        (float(strength) if index else float("inf"), cost, update)
        for update, cost in zip(updates, costs, strict=True)
        for index, strength in enumerate(update.strengths())
    ]
    entries.sort(key=lambda entry: -entry[0])
    spent = list(accumulate(cost for _, cost, _ in entries))
    chosen = [update for (_, _, update), sum_so_far in zip(entries, spent, strict=True) if sum_so_far <= budget]
    for update in updates:
        update.rank = sum(one is update for one in chosen)


def _triplets(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), Vh (r, n) of B A; zeros fill the three up where B A has fewer than r triplets."""
    Q_B, R_B = torch.linalg.qr(B.to("cpu", torch.float64))
    Q_A, R_A = torch.linalg.qr(A.to("cpu", torch.float64).T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    missing = A.shape[0] - len(S)
    U, Vh = Q_B @ U, Vh @ Q_A.T
    return (
        nn.functional.pad(U, (0, missing)),
        nn.functional.pad(S, (0, missing)),
        nn.functional.pad(Vh, (0, 0, 0, missing)),
    )


def _tied(
    peft_model: PeftModel, adapter_name: str, updates: list[_Update], others: Mapping[str, str]
) -> dict[str, _Update]:
    """Layers whose A and B are another layer's B and A transposed (`ensure_weight_tying`), by path."""
    found = {}
    owners = {tensor.data_ptr(): update for update in updates for tensor in (update.slot.A, update.slot.B)}
    for path in others:
        layer = peft_model.base_model.model.get_submodule(path)
        if adapter_name not in layer.lora_A:
            continue
        A, B = (getattr(holder[adapter_name], "weight", None) for holder in (layer.lora_A, layer.lora_B))
        if not isinstance(A, Tensor) or not isinstance(B, Tensor) or A.data_ptr() not in owners:
            continue
        update = owners[A.data_ptr()]
        slot = update.slot
        tied = A.data_ptr() == slot.B.data_ptr() and B.data_ptr() == slot.A.data_ptr()
        if not tied or layer.scaling[adapter_name] != slot.scaling:
            raise ValueError(
                f"The adapter of {path!r} shares memory with that of {slot.name!r}, but is not its transpose with the "
                "same scaling, so they cannot be exported together. Leave one of them out of the adapter."
            )
        found[path] = update
    return found


def _saved_keys(slot: AdapterSlot) -> tuple[str, str]:
    """The names of A and B in the file."""
    prefix, end = ("embedding_", "") if isinstance(slot.lora_A, nn.ParameterDict) else ("", ".weight")
    key = f"{INNER_PREFIX}{slot.path}.lora_{prefix}"
    return f"{key}A{end}", f"{key}B{end}"


def _write(
    peft_model: PeftModel, output_dir: str | os.PathLike[str], weights: dict[str, Tensor], config: LoraConfig
) -> None:
    """Write the files of the adapter: all of them, or none."""
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    with atomic_files(output_dir, last=CONFIG_NAME) as folder:
        card = Path(output_dir, "README.md")  # PEFT updates one that is there
        if card.is_file():
            shutil.copy(card, folder)
        peft_model.create_or_update_model_card(os.fspath(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(folder))
