"""What each rank chooses, where the checks of kernels end differently on them: jobs for `ranks.launch`.

The devices are only names, since no kernel is launched; what is exchanged is in host memory.
"""

from __future__ import annotations

import warnings

import torch

from loraga.distributed import ranks as communication
from loraga.ops.device_facts import DeviceFacts
from loraga.ops.selection import Selection

OPS = ("basis", "commit_", "accumulate_")
FACTS = DeviceFacts("Some GPU", (9, 0), "580.1", "2.13.0", "3.7.1")


def agreed(rank: int, problems: dict[int, dict[str, str]], devices: int = 1) -> dict:
    """What is chosen on this rank, how it warned, and the bytes that it sent. The first `devices` ranks have a GPU."""
    communication._reachable = lambda device: torch.device("cpu")
    mine = problems.get(rank, {})
    selection = Selection(OPS, lambda op, device: mine.get(op, ""), lambda device: FACTS, lambda facts, ops: {})
    here = [torch.device("cuda", rank)] if rank < devices else [torch.device("cpu")]
    with communication.Ranks() as ranks, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        selection.agree(ranks, here)
        return {
            "chosen": selection.report().get(f"cuda:{rank}"),
            "warnings": [str(warning.message) for warning in said],
            "bytes": ranks.reduced_bytes,
        }


def one_fails(rank: int, world: int) -> dict:
    return agreed(rank, {1: {"commit_": "wrong result"}}, devices=world)


def all_work(rank: int, world: int) -> dict:
    return agreed(rank, {}, devices=world)


def some_without_a_device(rank: int, world: int) -> dict:
    return agreed(rank, {0: {"basis": "no compiler"}}, devices=world - 1)
