"""Processes on this machine that talk over gloo, and what the tests let them do.

Everything runs in one set of processes, which form one process group after the other: imports cost more than the jobs.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)


def launch(jobs: dict[str, tuple], directory: Path, limit: float = 400.0) -> dict[str, list]:
    """Run jobs (function, world size, arguments) by name, function(rank, world, *arguments) on each rank.

    Returns:
        what each rank returned, by job and rank; an exception that a job raised is returned as one, and where a rank
        was killed in a job, the exit code of its process.
    """
    here = str(Path(__file__).parent)
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, root, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks", "tiny"])
    size = max(world for _, world, *_ in jobs.values())
    ranks = [context.Process(target=_work, args=(rank, jobs, directory), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        assert not hung, f"ranks {hung} hang"
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()

    def result(name: str, rank: int) -> object:
        file = directory / f"{name}.{rank}"
        return torch.load(file, weights_only=False) if file.exists() else ranks[rank].exitcode

    return {name: [result(name, rank) for rank in range(world)] for name, (_, world, *_) in jobs.items()}


def _work(rank: int, jobs: dict[str, tuple], directory: Path) -> None:
    torch.set_num_threads(1)
    for name, (function, world, *arguments) in jobs.items():
        if rank >= world:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/store-{name}",
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
        torch.manual_seed(rank)  # what must be equal is not because of equal seeds
        try:
            result = function(rank, world, *arguments)
        except Exception as error:
            result = error
            result.trace = traceback.format_exc()
        torch.save(result, directory / f"{name}.{rank}")
        if name != list(jobs)[-1]:  # after the last one the process just ends
            dist.barrier()
            dist.destroy_process_group()
