"""What `test_engines` has each rank do: train a started adapter and a plain one in an engine, and take its state."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import tiny
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import loraga
from loraga import InitConfig

RATE = 1e-2
STEPS = 2
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def config():
    return tiny.config(task_type="CAUSAL_LM")


def probe() -> dict[str, torch.Tensor]:
    """What all models are asked."""
    return {"input_ids": tiny.batches("llama", 1, rows=2, seed=9)[0]["input_ids"]}


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


class FSDP2:
    """`fully_shard` of torch."""

    def __init__(self, model) -> None:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        self.model = fully_shard(model)

    def train(self, loader) -> None:
        optimizer = optimizer_of(self.model)
        for batch in loader:
            self.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """On rank 0 the whole model's; on others nothing."""
        return get_model_state_dict(self.model, options=GATHERED)

    def is_sharded(self) -> bool:
        return all(hasattr(p, "device_mesh") for p in self.model.parameters())

    def saved(self, folder: Path) -> dict[str, torch.Tensor]:
        """The state once more, from the engine's own files where it has some."""
        return self.state()

    def restored(self, model, folder: Path) -> FSDP2:
        """The same engine around another model, with the state of this one."""
        other = FSDP2(model)
        set_model_state_dict(other.model, self.state(), options=SPREAD)
        return other


class Zero:
    """DeepSpeed's ZeRO, over the process group that is there."""

    def __init__(self, model, stage: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__ = {}  # no shared-memory op is compiled: gloo does its work
        settings = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        self.stage = stage
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)

    def train(self, loader) -> None:
        for batch in loader:
            self.model.backward(self.model(**batch).loss)
            self.model.step()

    def state(self) -> dict[str, torch.Tensor]:
        if self.stage == 3:
            return self.model._zero3_consolidated_16bit_state_dict() or {}
        return self.model.module.state_dict()

    def is_sharded(self) -> bool:
        """ZeRO-3's weights are, ZeRO-2's optimizer is."""
        if self.stage == 3:
            return all(p.ds_tensor.numel() < p.ds_numel and not p.numel() for p in self.model.module.parameters())
        return self.model.optimizer.partition_gradients

    def saved(self, folder: Path) -> dict[str, torch.Tensor]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        self.model.save_checkpoint(folder)
        torch.distributed.barrier()
        return get_fp32_state_dict_from_zero_checkpoint(folder)

    def restored(self, model, folder: Path) -> Zero:
        other = Zero(model, self.stage)
        other.model.load_checkpoint(folder)
        return other


def engines(rank, world, cases, folder):
    """All cases in one process group: DeepSpeed keeps to the first one that it saw."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    found = {}
    for case in cases:
        try:
            found[case] = _trip(rank, world, *case, Path(folder) / "-".join(case))
        except Exception:
            return found | {case: traceback.format_exc()}  # the ranks are out of step now
    return found


def _trip(rank, world, name, start, folder):
    """Start, train, take the state, save from it and restore from it; a plain LoRA is trained and described too."""
    engine = _engine(rank, world, name, start)
    begun = _logits(engine)
    loader = tiny.batches("llama", world * STEPS, rows=2, seed=5)[rank::world]
    engine.train(loader)
    sharded, state, saved = engine.is_sharded(), engine.state(), engine.saved(folder / "checkpoint")
    plain = _wrapped(name, get_peft_model(tiny.build("llama"), config()))
    plain.train(loader)
    if rank == 0:
        _save(engine, state, folder / "adapter")
    other = engine.restored(get_peft_model(tiny.build("llama"), config()), folder / "checkpoint")
    return {
        "sharded": sharded,
        "begun": begun,
        "trained": _logits(engine),
        "plain": _logits(plain),
        "restored": _logits(other),
        "kept": {name: _whole(value) for name, value in state.items() if "lora_" not in name},
        "saved": _described(saved),
        "saved alike": all(torch.equal(saved[name], value) for name, value in state.items()),
        "described": _described(state),
        "described plain": _described(plain.state()),
    }


def _engine(rank, world, name, start):
    batches = tiny.batches("llama", 2 * world, rows=2)[rank::world]
    options = {"init": InitConfig(start=start), "show_progress_bar": False}
    if not name.endswith("then start"):
        return _wrapped(name, loraga.fast_init(tiny.build("llama"), batches, config(), **options))
    engine = _wrapped(name, get_peft_model(tiny.build("llama"), config()))
    loraga.fast_init(engine.model, batches, **options)
    return engine


def _wrapped(name, model):
    return FSDP2(model) if name.startswith("fsdp2") else Zero(model, int(name[-1]))


def _save(engine, state, folder):
    model = getattr(engine.model, "module", engine.model)
    ours = get_peft_model_state_dict(model, state_dict=state)
    folder.mkdir(parents=True)
    torch.save({name: _whole(value) for name, value in ours.items()}, folder / "adapter_model.bin")
    model.peft_config["default"].save_pretrained(folder)


def _whole(value):
    return value.detach().cpu().clone()


def _described(state):
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


def _logits(engine):
    engine.model.eval()
    with torch.no_grad():
        found = engine.model(**probe()).logits.clone()
    engine.model.train()
    return found
