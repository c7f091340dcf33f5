"""One adapter from the data of all processes:  torchrun --nproc-per-node 2 examples/torchrun.py

Runs on GPUs or without, on a byte-level Llama with random weights; all ranks print the same adapter, rank 0 saves it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import loraga

GPU = torch.cuda.is_available()
SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def batches(rank: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Lines of the standard library, other ones on each rank."""
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    generator = torch.Generator().manual_seed(rank)
    starts = torch.randint(len(text) - 65, (count, 4), generator=generator).tolist()
    ids = [torch.stack([torch.tensor(list(text[i : i + 64])) for i in row]) for row in starts]
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPU else "gloo")
    torch.manual_seed(0)  # the same base model everywhere
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, use_cache=False)).to(device)

    # every rank calls it, with its own batches
    model = loraga.fast_init(model, batches(dist.get_rank(), 4))

    adapter = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters() if p.requires_grad)
    print(f"rank {dist.get_rank()}: adapter {hashlib.sha256(adapter).hexdigest()[:16]}", flush=True)
    if dist.get_rank() == 0:  # which alone writes files
        print(model.loraga_report)
        model.save_pretrained("torchrun-adapter")
    # from here on as ever: DistributedDataParallel(model), or fully_shard, and full fine-tuning's learning rate
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
