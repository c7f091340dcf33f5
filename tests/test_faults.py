"""Faults put in on purpose: what is killed, breaks or runs full leaves earlier files and the model as they were."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import QUIET, run, weights_of, write_data
from peft import PeftModel
from tiny import MLP, assert_same, everything_about, init, mlp_batches
from torch import nn
from torch.utils.data import DataLoader, Dataset

import loraga
from loraga import _atomic_files
from loraga.capture import run as capture_run
from loraga.estimators import Dense, Streaming

pytestmark = pytest.mark.slow

SECONDS = 120  # what a fault may take at most, on a slow machine


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit code (negative: the signal that ended it)."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(SECONDS)
    assert not child.is_alive(), "it hangs"
    return child.exitcode


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def started() -> PeftModel:
    return init(MLP(), mlp_batches())


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, hidden files of a writer that died aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def readable(folder: Path) -> bool:
    """Whether PEFT takes this for a saved adapter."""
    return (folder / "adapter_config.json").exists()


# ------------------------------------------------------------------------------------------------------------- killed
def killed_at(monkeypatch, moment: str) -> None:
    """Have this process die at a moment of `loraga init`."""
    if moment == "between batches":
        loss, calls = capture_run.loss_of, []
        monkeypatch.setattr(capture_run, "loss_of", lambda *a: die() if len(calls) else calls.append(0) or loss(*a))
    elif moment == "while weights are written":
        save = PeftModel.save_pretrained

        def half(self, folder, **options):
            save(self, folder, **options)
            file = Path(folder, "adapter_model.safetensors")
            file.write_bytes(file.read_bytes()[:100])
            die()

        monkeypatch.setattr(PeftModel, "save_pretrained", half)
    else:
        monkeypatch.setattr(loraga.InitReport, "save", die)


@pytest.mark.parametrize("moment", ["between batches", "while weights are written", "before the report"])
def test_the_command_killed_leaves_the_old_adapter(moment, models, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data.jsonl")
    arguments = (models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET)
    killed_at(monkeypatch, moment)
    assert in_child(lambda: run(*arguments)) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()  # nothing that a trainer would read
    monkeypatch.undo()
    assert run(*arguments) == 0
    before = weights_of(tmp_path / "out")
    killed_at(monkeypatch, moment)
    assert in_child(lambda: run(*arguments, "--overwrite", "--seed", "9")) == -signal.SIGKILL
    after = weights_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    monkeypatch.undo()
    assert run(*arguments, "--overwrite", "--seed", "9") == 0  # what the dead left is in nobody's way


# what writes into a folder, and the files it puts in place, in this order
WRITERS = {
    "export": (loraga.export_adapter, ["README.md", "adapter_model.safetensors", "adapter_config.json"]),
    "report": (lambda model, folder: model.loraga_report.save(folder / "report.json"), ["report.json"]),
}


@pytest.mark.parametrize("call", WRITERS)
def test_killed_while_writing_into_a_folder(call, tmp_path, monkeypatch):
    model = started()
    write, names = WRITERS[call]
    replace = os.replace
    for survived in range(4):  # dies at the first, second, ... file that is put in place
        calls: list[int] = []

        def put(a, b, calls=calls, survived=survived):
            if len(calls) == survived:
                die()
            calls.append(0)
            replace(a, b)

        monkeypatch.setattr(_atomic_files.os, "replace", put)
        code = in_child(lambda: write(model, tmp_path))
        monkeypatch.undo()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not readable(tmp_path), "read as whole though the writer died"
        assert files(tmp_path).keys() == set(names[:survived])
    assert survived == len(names) and files(tmp_path).keys() == set(names)
    for name, content in files(tmp_path).items():
        assert not name.endswith(".json") or json.loads(content)


# --------------------------------------------------------------------------------------------------------------- full
@pytest.mark.parametrize("call", WRITERS)
def test_a_full_disk_leaves_earlier_files(call, tmp_path):
    """No file may grow beyond 64 bytes: every write fails as on a full disk, in the middle."""
    model = started()
    folder = tmp_path / "there"
    write, _ = WRITERS[call]
    write(model, folder)
    before = files(folder)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing gives an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        for to in (folder, tmp_path / "new"):
            try:
                write(model, to)
            except Exception as error:
                ok = isinstance(error, OSError) or "large" in str(error) or "I/O" in str(error)
                os._exit(3 if not ok else 0) if to.name == "new" else None
        os._exit(4)

    assert in_child(limited) == 0
    assert files(folder) == before and sorted(os.listdir(folder)) == sorted(before)
    assert not readable(tmp_path / "new") and not list(tmp_path.glob("new/*"))


def test_no_space_for_the_command(models, tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path / "data.jsonl")
    arguments = (models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    assert run(*arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["data.jsonl"]


# ------------------------------------------------------------------------------------------ memory, workers and loaders
class WithConvolution(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 8, 3, padding=1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(torch.tanh(self.mix(inputs[:, None]).mean(1)), labels)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["tap", "sink"])
@pytest.mark.parametrize("call", ["fast_init", "estimate_factors"])
def test_out_of_memory_within_backward(error, where, call, monkeypatch):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"
    update, calls = Dense.add if where == "sink" else None, []

    def full(self, *args, **kwargs):
        calls.append(0)
        if len(calls) > 2:
            raise error(text)
        return update(self, *args, **kwargs) if update else torch.ones((), dtype=torch.bool)

    for kind in (Dense,) if where == "sink" else (Dense, Streaming):
        monkeypatch.setattr(kind, "add" if where == "sink" else "update", full)
    model = WithConvolution()
    before = everything_about(model)
    targets = ["layers.0", "layers.1", "mix"]
    with pytest.raises(error, match="Tried to allocate"):
        if call == "fast_init":
            from peft import LoraConfig

            loraga.fast_init(model, mlp_batches(), LoraConfig(r=1, target_modules=targets), show_progress_bar=False)
        else:
            loraga.estimate_factors(model, mlp_batches(), targets, 1)
    assert len(calls) == 3
    assert_same(everything_about(model), before)


class Dying(Dataset):
    """The worker that is asked for the third batch ends without a word."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= 2 and torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return {key: value[0] for key, value in mlp_batches(1, rows=1, seed=index)[0].items()}


def test_a_dying_worker_of_the_loader(tmp_path):
    """In a child, since torch goes on looking after the dead worker for as long as its process lives."""

    def look() -> None:
        model = MLP()
        before = everything_about(model)
        try:
            init(model, DataLoader(Dying(), batch_size=1, num_workers=1))
        except (RuntimeError, OSError, EOFError) as error:  # the others where the worker dies with a batch on its way
            (tmp_path / "error").write_text(f"{type(error).__name__}: {error}")
        assert_same(everything_about(model), before)
        (tmp_path / "same").touch()
        os._exit(0)

    assert in_child(look) == 0
    message = (tmp_path / "error").read_text()
    assert "exited unexpectedly" in message or message.startswith(("Connection", "EOFError", "OSError"))
    assert (tmp_path / "same").exists()
