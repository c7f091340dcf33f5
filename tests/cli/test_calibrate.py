"""`loraga calibrate` with a fake clock and fake devices; that its steps run every op; what it says without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from loraga.cli import calibrate
from loraga.cli.main import main
from loraga.ops import calibration
from loraga.ops.device_facts import DeviceFacts
from loraga.ops.selection import TORCH, TRITON, Selection
from loraga.ops.triton import LAUNCHERS

FACTS = DeviceFacts("Some GPU", (9, 0), "580.1", "2.13.0", "3.7.1")
GPU = torch.device("cuda", 0)
OPS = ("basis", "commit_", "accumulate_")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORAGA_TRITON", raising=False)
    calibration._read.cache_clear()
    yield tmp_path
    calibration._read.cache_clear()


class FakeGpu:
    """A clock whose steps take 1 s, and with a kernel `factors[op]` of that; later steps take the factors after it."""

    def __init__(self, **factors: float | Iterator[float]) -> None:
        self.factors = {op: f if isinstance(f, Iterator) else itertools.repeat(f) for op, f in factors.items()}
        self.problems: dict[str, str] = {}
        self.steps_run: list[dict[str, str]] = []
        self.selection = Selection(OPS, lambda op, _: self.problems.get(op, ""), lambda _: FACTS, lambda *_: {})

    def step(self) -> None:
        self.steps_run.append({op: self.selection.chosen(op, GPU).runs for op in OPS})

    def seconds(self, step: Callable[[], object]) -> float:
        step()
        taken = 1.0
        for op, runs in self.steps_run[-1].items():
            if runs == TRITON and op in self.factors:
                taken *= next(self.factors[op])
        return taken

    def measure(self, *of: tuple[str, ...]) -> dict[str, calibrate.Outcome]:
        steps = [calibrate.Step(f"step {i}", ops, self.step) for i, ops in enumerate(of)]
        return calibrate.measure(self.selection, GPU, steps, self.seconds, lambda line: None)


def test_a_kernel_stays_that_is_a_tenth_faster_twice():
    for factor, expected in ((0.5, TRITON), (0.9, TRITON), (0.91, TORCH), (1.2, TORCH)):
        found = FakeGpu(basis=factor).measure(("basis",))["basis"]
        assert found.runs == expected
        assert found.triton == pytest.approx((factor, factor)) and found.torch == (1.0, 1.0)


@pytest.mark.parametrize("slow_round", [0, 1])
def test_once_is_not_enough(slow_round):
    warm_up, each = 1, calibrate.REPEATS
    rounds = [[0.5] * each, [0.5] * each]
    rounds[slow_round] = [0.95] * each
    found = FakeGpu(basis=iter([1.0] * warm_up + rounds[0] + rounds[1])).measure(("basis",))["basis"]
    assert found.runs == TORCH and sorted(found.triton) == [0.5, 0.95]
    assert found.reason.startswith("not a tenth faster twice: step 0 in ")


def test_a_few_slow_calls_do_not_matter():
    times = [50.0] + ([0.5] * (calibrate.REPEATS - 3) + [9.0] * 3) * calibrate.ROUNDS
    assert FakeGpu(basis=iter(times)).measure(("basis",))["basis"].runs == TRITON


def test_each_op_is_compared_while_the_others_are_on():
    gpu = FakeGpu()
    gpu.measure(("basis", "commit_"), ("accumulate_",))
    timed = {tuple(run.values()) for run in gpu.steps_run[len(OPS) :]}
    assert timed == {
        (TRITON, TRITON, TRITON),
        (TORCH, TRITON, TRITON),
        (TRITON, TORCH, TRITON),
        (TRITON, TRITON, TORCH),
    }


def test_both_are_timed_in_turn():
    gpu = FakeGpu()
    gpu.measure(("basis",))
    runs = [run["basis"] for run in gpu.steps_run[1:]]
    assert runs == [TRITON, TORCH] * (1 + calibrate.ROUNDS * calibrate.REPEATS)


def test_a_kernel_that_fails_its_check_is_neither_timed_nor_on():
    gpu = FakeGpu(basis=0.5, commit_=0.5)
    gpu.problems["basis"] = "wrong result: of a test"
    found = gpu.measure(("basis", "commit_"))
    assert found["basis"] == calibrate.Outcome(TORCH, "wrong result: of a test")
    assert found["commit_"].runs == TRITON
    assert {run["basis"] for run in gpu.steps_run} == {TORCH}


def test_a_kernel_that_cannot_run_at_full_size_is_off_and_no_other_is_blamed():
    gpu = FakeGpu(commit_=0.5)

    def fails_with_basis() -> None:
        gpu.step()
        if gpu.steps_run[-1]["basis"] == TRITON:
            raise RuntimeError("out of resource")

    steps = [calibrate.Step("step", ("commit_", "basis"), fails_with_basis)]
    found = calibrate.measure(gpu.selection, GPU, steps, gpu.seconds, lambda line: None)
    assert found["basis"] == calibrate.Outcome(TORCH, "RuntimeError: out of resource")
    assert found["commit_"].runs == TRITON


class TestCommand:
    @pytest.fixture
    def gpus(self, monkeypatch):
        """Two equal devices and another one; every kernel but `basis` wins."""
        kinds = [FACTS, FACTS, replace(FACTS, name="Another")]
        gpu = FakeGpu(basis=1.0, commit_=0.8, accumulate_=0.8)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
        monkeypatch.setattr(calibrate, "facts_of", lambda device: kinds[device.index])
        monkeypatch.setattr(calibrate, "selection", gpu.selection)
        monkeypatch.setattr(calibrate, "steps", lambda device: [calibrate.Step("a step", OPS, gpu.step)])
        monkeypatch.setattr(calibrate, "seconds_on", lambda device: gpu.seconds)
        return kinds

    def test_each_kind_gets_a_file(self, gpus, cache, capsys):
        assert main(["calibrate"]) == 0
        said = capsys.readouterr().out
        files = [calibration.path_of(facts) for facts in (FACTS, gpus[2])]
        assert sorted(os.listdir(cache / "loraga")) == sorted(file.name for file in files)
        for facts, file in zip((FACTS, gpus[2]), files, strict=True):
            assert calibration.stored(facts, OPS) == {"basis": TORCH, "commit_": TRITON, "accumulate_": TRITON}
            assert f"  stored in {file}\n" in said
        assert "cuda:0: Some GPU\n" in said and "cuda:2: Another\n" in said and "cuda:1" not in said
        assert "  basis         torch   not a tenth faster twice: a step in 640 against 640 ms, 640 against" in said
        measured = json.loads(files[0].read_text())["measured"]["commit_"]
        assert measured["triton"] == pytest.approx([0.64, 0.64])
        assert measured["torch"] == pytest.approx([0.8, 0.8]), "the other kernel was on"

    def test_where_kernels_cannot_run(self, gpus, cache, capsys):
        old = replace(FACTS, capability=(7, 0))
        gpus[:] = [old, FACTS]
        assert main(["calibrate"]) == 0
        assert "cuda:0: Some GPU\n  left out: Triton needs compute capability 8.0" in capsys.readouterr().out
        (file,) = (cache / "loraga").iterdir()
        file.unlink()
        gpus[:] = [old]
        assert main(["calibrate"]) == 2
        assert "no kernel to measure on Some GPU: Triton needs compute capability 8.0" in capsys.readouterr().err
        assert not os.listdir(cache / "loraga")

    def test_where_there_is_too_little_memory(self, gpus, cache, capsys, monkeypatch):
        def fails(device: torch.device) -> list[calibrate.Step]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        monkeypatch.setattr(calibrate, "steps", fails)
        assert main(["calibrate"]) == 2
        assert "cuda:0 has too little free memory to measure: CUDA out of memory" in capsys.readouterr().err
        assert not os.listdir(cache)

    def test_where_nothing_can_be_written(self, gpus, cache, capsys, monkeypatch):
        (cache / "loraga").write_text("a file in the way")
        assert main(["calibrate"]) == 2
        assert "the choices cannot be stored: " in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_device(cache):
    command = [sys.executable, "-m", "loraga", "calibrate"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    expected = "loraga: error: calibrate measures on a CUDA device, and torch sees none here; nothing was written.\n"
    assert done.returncode == 2 and done.stdout == "" and done.stderr.endswith(expected)
    assert not os.listdir(cache)


def test_the_steps_run_the_ops_that_they_are_for(monkeypatch):
    """On the CPU, with small layers: the op of each step is called, and all ops with a kernel have a step."""
    for name, value in {"_LAYERS": 2, "_WIDTH": 96, "_TOKENS": 8, "_RANK": 2}.items():
        monkeypatch.setattr(calibrate, name, value)
    called: list[str] = []
    for op in LAUNCHERS:
        run = getattr(torch.ops.loraga, op)
        monkeypatch.setattr(torch.ops.loraga, op, lambda *args, _run=run, _op=op: called.append(_op) or _run(*args))
    steps = calibrate.steps(torch.device("cpu"))
    assert {op for step in steps for op in step.ops} == set(LAUNCHERS)
    for step in steps:
        called.clear()
        step.run()
        assert set(step.ops) <= set(called), step.name
