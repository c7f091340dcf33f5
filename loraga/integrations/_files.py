"""Adapters on disk: go on training one with a frozen half, and export one at its trainable rank."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from loraga import offsets
from loraga.integrations._config import (
    double_rank,
    exactly,
    halve_rank,
    plain_start,
    read_side_file,
    write_side_file,
)
from loraga.integrations._slots import check_adapter, check_is_lora, find_slots, ranks_and_alphas
from loraga.integrations._targets import INNER_PREFIX
from loraga.offsets import AdapterSlot, halved, trained, whole
from loraga.sharding import is_sharded
from loraga.snapshot import structure
from loraga.whole_files import files_whole


def attach_anchor(peft_model: PeftModel, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Freeze the second half of an adapter that was read from disk, so that training goes on as before.

    PEFT reads an adapter saved with `offset="anchor"` or `"subtract"` as an ordinary LoRA of twice the rank. That is
    right for inference; to train on, the frozen half must be frozen again:

    ```py
    model = PeftModel.from_pretrained(base, path, is_trainable=True)
    loraga.attach_anchor(model, path)
    ```

    Call it before making the optimizer or trainer. `base` is the original model in both cases.

    Args:
        peft_model (`PeftModel`): the adapter as read.
        path (`str`): the directory it was read from, for its `loraga.json`.
        adapter_name (`str`): its name in `peft_model`.

    Raises:
        ValueError: there is no such adapter, `loraga.json` is missing, damaged or does not describe this adapter, the
            weights file beside it is damaged or of another adapter, or the model is sharded.
    """
    _check_not_sharded(peft_model, "attach the frozen half before fully_shard")
    check_adapter(peft_model, adapter_name)
    ranks = read_side_file(path)["trainable_rank"]
    found, unsupported = find_slots(peft_model, adapter_name)
    slots = {slot.name: slot for slot in found}
    for name, rank in ranks.items():
        slot = slots.get(name)
        if slot is None:
            raise ValueError(f"{os.fspath(path)!r} describes layer {name!r}, which adapter {adapter_name!r} lacks.")
        if halved(slot):
            raise ValueError(f"Adapter {adapter_name!r} has its frozen half attached already (layer {name!r}).")
        if slot.rank != 2 * rank:
            raise ValueError(
                f"Layer {name!r} of adapter {adapter_name!r} has rank {slot.rank}; {os.fspath(path)!r} describes one "
                f"of rank {2 * rank}. Is this the directory the adapter was read from?"
            )
    _check_weights_file(path, [slots[name] for name in ranks])
    config = peft_model.peft_config[adapter_name]
    others = [slot.path for slot in found if slot.name not in ranks] + list(unsupported)
    kept = ranks_and_alphas(peft_model, adapter_name, others)
    chosen = [slots[name] for name in ranks]
    restore = structure([module for slot in chosen for module in (slot.lora_A, slot.lora_B)])
    try:
        for slot in chosen:
            offsets.split_whole(slot)
        plain = plain_start(halve_rank(config))
        peft_model.peft_config[adapter_name] = double_rank(plain, "anchor", ranks, kept)
    except BaseException:
        restore()
        raise


def export_adapter(
    peft_model: PeftModel, output_dir: str | os.PathLike, adapter_name: str = "default", rank: int | None = None
) -> dict[str, float]:
    """Write an adapter as a plain PEFT LoRA of a smaller rank, for servers that limit the rank.

    Every layer's update of the original base weights is replaced by its best approximation of that rank (Eckart and
    Young), found from the factors: no m x n matrix is formed. The model is not changed. Anything else the adapter
    holds (`modules_to_save`, DoRA magnitudes, layers loraga cannot start) is written as it is.

    Args:
        peft_model (`PeftModel`): holds the adapter.
        output_dir (`str`): directory to write to; made if missing.
        adapter_name (`str`): the adapter's name.
        rank (`int`, *optional*): of the export; by default the rank that was trained, layer by layer.

    Returns:
        `dict[str, float]`: relative Frobenius error of each layer's update, by layer name; also in `loraga.json`.

    Raises:
        ValueError: there is no such adapter or layer, `rank` is below 1, or the model is sharded.
    """
    _check_not_sharded(peft_model, "save the adapter, and export it from a whole model")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    check_is_lora(peft_model, adapter_name)
    slots, unsupported = find_slots(peft_model, adapter_name)
    config = _config_of_rank(
        peft_model.peft_config[adapter_name], rank, ranks_and_alphas(peft_model, adapter_name, unsupported)
    )
    weights = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    errors: dict[str, float] = {}
    for slot in slots:
        held = slot.matrices(whole(slot.lora_A, slot.key), whole(slot.lora_B, slot.key))
        best = [_best_approximation(A, B, rank or slot.rank) for A, B in held]
        errors |= {part.name: error for part, (*_, error) in zip(slot.parts(), best, strict=True)}
        A, B = slot.held([(A, B) for A, B, _ in best])
        if rank is not None:
            # one alpha for all layers: what a layer's scaling was beyond it moves into B
            B *= slot.scaling / (config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank))
        key_A, key_B = _saved_keys(slot)
        dtype = trained(slot.lora_A, slot.key).dtype
        weights[key_A], weights[key_B] = A.to(dtype), B.to(dtype)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    with files_whole(output_dir, last=CONFIG_NAME) as folder:
        card = Path(output_dir, "README.md")  # one that is there is updated
        if card.is_file():
            shutil.copy(card, folder)
        peft_model.create_or_update_model_card(os.fspath(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(folder))
        write_side_file(folder, {"offset": "export", "relative_error": errors})
    return errors


def _check_not_sharded(model: nn.Module, instead: str) -> None:
    if is_sharded(model):
        raise ValueError(f"The parameters of this model are sharded; {instead}.")


def _check_weights_file(path: str | os.PathLike, slots: Iterable[AdapterSlot]) -> None:
    """Raise `ValueError` if there is a weights file that is damaged or holds another adapter. Its head is read only."""
    file = os.path.join(path, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(file):
        return  # read from a hub's cache, or saved in torch's own format
    try:
        with safe_open(file, framework="pt") as saved:
            shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is damaged ({error}). Take it from another copy of the adapter, or save the adapter again."
        ) from error
    for slot in slots:
        for key, holder in zip(_saved_keys(slot), (slot.lora_A, slot.lora_B), strict=True):
            expected = tuple(whole(holder, slot.key).shape)
            if shapes.get(key) != expected:
                has = f"shape {shapes[key]}" if key in shapes else "not there"
                raise ValueError(
                    f"{key} is {has} in {file}, and {expected} in the model. Is this the directory the adapter was "
                    "read from?"
                )


def _saved_keys(slot: AdapterSlot) -> tuple[str, str]:
    """What PEFT calls A and B in the file."""
    kind, end = ("embedding_", "") if isinstance(slot.lora_A, nn.ParameterDict) else ("", ".weight")
    key = f"{INNER_PREFIX}{slot.path}.lora_{kind}"
    return f"{key}A{end}", f"{key}B{end}"


def _best_approximation(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best A (rank, n), B (m, rank) for the product B A, and the relative error; in float64 on the host."""
    Q_B, R_B = torch.linalg.qr(B.detach().to("cpu", torch.float64))
    Q_A, R_A = torch.linalg.qr(A.detach().to("cpu", torch.float64).T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = S[:rank].sqrt()
    best_A = root[:, None] * (Vh[: len(root)] @ Q_A.T)
    best_B = (Q_B @ U[:, : len(root)]) * root
    missing = rank - len(root)
    best_A = nn.functional.pad(best_A, (0, 0, 0, missing))
    best_B = nn.functional.pad(best_B, (0, missing))
    total = float(S.norm())
    return best_A, best_B, float(S[rank:].norm()) / total if total else 0.0


def _config_of_rank(config: LoraConfig, rank: int | None, kept: dict[str, tuple[int, float]]) -> LoraConfig:
    """The config of the export: the trained one, or one rank for all layers but those in `kept`."""
    plain = plain_start(config)
    if rank is not None:
        grown = rank / plain.r
        plain.lora_alpha *= math.sqrt(grown) if plain.use_rslora else grown
        plain.r = rank
        plain.rank_pattern = {exactly(name): r for name, (r, _) in kept.items()}
        plain.alpha_pattern = {exactly(name): alpha for name, (_, alpha) in kept.items()}
    return plain
