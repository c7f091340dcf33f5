"""The benchmark scripts: that they run, that their figures are right where that can be told, and that the documents
show what the committed results hold."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _machine
import operations
import roofline
import tables
import time_model
import torch
import whole_run
from meta import needs_meta_products

from loraga.kernels.dev.steps import Step
from loraga.ops.triton import LAUNCHERS

pytestmark = pytest.mark.slow

BENCHMARKS = tables.ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda document: document.parent.name)
def test_documents_show_the_committed_results(document):
    text = document.read_text("utf-8")
    assert "<!-- table:" in text and tables.filled(text) == text


def test_tables_are_put_in_their_places_and_nowhere_else():
    whole = tables.table("whole-run-cpu")
    assert whole.splitlines()[2].startswith("| floor |")
    before = "Before.\n\n<!-- table: whole-run-cpu: floor, lora-step -->\nold\n<!-- end -->\n\nAfter.\n"
    after = tables.filled(before)
    assert after.startswith("Before.\n\n<!-- table:") and after.endswith("<!-- end -->\n\nAfter.\n")
    rows = [line for line in after.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| case", "| floor", "| lora-step"] and "old" not in after
    assert tables.filled(after) == after


# the demo's has a form of its own: test_examples.py
@pytest.mark.parametrize(
    "file", sorted(set(RESULTS.glob("*.json")) - {RESULTS / "demo-cpu.json"}), ids=lambda f: f.stem
)
def test_results_name_commit_machine_and_versions(file):
    result = json.loads(file.read_text())
    if "benchmarks" in result:  # pytest-benchmark's own form
        result = result["benchmarks"][0]["extra_info"]["machine"]
    assert {"commit", "command", "cpu", "threads", "python", "torch"} <= result.keys()
    assert not result["commit"].endswith("dirty")


def run_whole(*arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--shape", "tiny", "--batches", "2", "--rows", "2", "--length", "48", "--rank", "4", "--repeats", "1"]
    command = [sys.executable, str(BENCHMARKS / "whole_run.py"), *options, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_whole_runs_measure_time_memory_and_objective(tmp_path):
    cases = ["floor", "loraga", "official-loraga", "lora-step"]
    file = tmp_path / "result.json"
    done = run_whole("--check-layers", "0", "--output", str(file), "--cases", *cases)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == cases and not result["failed"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    assert rows["floor"]["over_floor"] == 1 and rows["lora-step"]["memory_over_lora_step"] == 1
    # small layers are summed exactly; the official procedure has only its own few iterations between it and the truth
    for case, most in (("loraga", 1e-3), ("official-loraga", 0.05)):
        found = rows[case]["objective"]
        assert found["layers"] == 7 and -1e-4 < found["mean_excess"] <= found["worst_excess"] < most
    assert "objective" not in rows["floor"] | rows["lora-step"]
    assert all(f"| {case} |" in done.stdout for case in cases)


def test_a_peer_that_is_not_done_in_time_is_a_result(tmp_path):
    cases = ["floor", "loraga", "peft-eva"]
    done = run_whole("--limit", "0.01", "--output", str(tmp_path / "result.json"), "--cases", *cases)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| loraga \| \d", done.stdout)
    assert re.search(r"\| peft-eva \| stopped after \d+ s \|", done.stdout)
    done = run_whole("--limit", "2", "--cases", "peft-eva")
    assert done.returncode == 2 and "let the floor be the first" in done.stderr


def test_a_peer_that_fails_is_a_result_and_a_case_of_ours_is_not(tmp_path):
    file, cases = tmp_path / "result.json", ["loraga", "official-loraga"]
    # more directions than a layer has: ours takes what is there
    done = run_whole("--rank", "4000", "--check-layers", "--output", str(file), "--cases", *cases)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [row["case"] for row in result["rows"]] == ["loraga"] and list(result["failed"]) == ["official-loraga"]
    # of a single token there is nothing to predict, and no gradient
    done = run_whole("--length", "1", "--output", str(file), "--cases", "loraga")
    assert done.returncode == 1 and "failed: loraga" in done.stderr.splitlines()
    assert "The gradient is zero" in json.loads(file.read_text())["failed"]["loraga"]


@pytest.mark.parametrize("how", ["a signal", "nothing said"])
def test_a_process_that_dies_is_named_by_its_exit_code(how):
    dying, code = (os.abort, -signal.SIGABRT) if how == "a signal" else (functools.partial(os._exit, 3), 3)
    with pytest.raises(ChildProcessError, match=f"exit code {code}"):
        whole_run.alone(dying)


def test_a_machine_without_git_is_described(monkeypatch):
    _machine.said.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert _machine.commit() == "unknown"
    _machine.said.cache_clear()


@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30)])
def test_energies_of_a_layer_are_its_squared_singular_values(m, n, monkeypatch):
    monkeypatch.setattr(operations, "TOKENS", 64)
    exact = torch.linalg.svdvals(operations.total(operations.stream(m, n)).double()).square()
    assert (operations.squares(m, n, torch.float32) - exact).abs().max() <= 1e-12 * exact[0]


class TestRoofline:
    def test_every_op_that_has_a_kernel_has_a_row(self):
        device = torch.device("cpu")
        found = {case.op: case for case in roofline.cases(roofline.SIZES["tiny"], device)}
        assert found.keys() == set(LAUNCHERS)
        for case in found.values():
            case.run()
            assert case.error is None or case.error(case.run()) < 0.02

    def test_a_wrong_kernel_is_not_measured_and_torch_stands_in_for_it(self):
        problems = dict.fromkeys(LAUNCHERS, "") | {"basis": "wrong result"}
        runs: list[dict[str, str]] = []

        def figures() -> dict[str, float]:
            runs.append({op: roofline.selection.chosen(op, torch.device("cuda", 0)).runs for op in LAUNCHERS})
            return {"seconds": 1.0}

        assert roofline.both(figures, "basis", problems)["kernel"] == "not measured: wrong result"
        assert roofline.both(figures, "commit_", problems)["kernel"] == {"seconds": 1.0}
        torch_only, also_torch_only, with_kernels = runs
        assert set(torch_only.values()) == set(also_torch_only.values()) == {"torch"}
        assert with_kernels == dict.fromkeys(LAUNCHERS, "triton") | {"basis": "torch"}

    def test_without_a_gpu_there_is_nothing_to_measure(self):
        problems = roofline.checked(torch.device("cpu"))
        assert roofline.both(lambda: {"seconds": 1.0}, None, problems)["kernel"] == "not measured: no CUDA device"


def test_the_time_model_is_the_largest_of_work_traffic_and_a_launch():
    device = time_model.DEVICES[0]
    assert device.name == "H100 SXM"
    large = Step("torch", "mm", ((8192, 4096), (4096, 4096), (8192, 4096)), "bfloat16", 10**6, 2 * 8192 * 4096 * 4096)
    assert time_model.seconds(large, device) == pytest.approx(large.flops / (989e12 * 0.68))
    moving = Step("torch", "add", ((2**28,),), "float32", 2**32)
    assert time_model.seconds(moving, device) == pytest.approx(2**32 / (3.35e12 * 0.88))
    assert time_model.seconds(Step("torch", "add", ((4,),), "float32", 48), device) == 3e-6
    # one block of the result keeps one multiprocessor busy, and cut into 16 parts so many
    small = Step("torch", "mm", ((80, 4096), (4096, 80), (80, 80)), "float32", 10**6, 2 * 80 * 80 * 4096)
    assert time_model.seconds(small, device) == pytest.approx(small.flops / (67e12 * 0.68 * 16 / 132))
    doubled = replace(small, shapes=((2, 80, 4096), (2, 4096, 80), (2, 80, 80)), flops=2 * small.flops, name="bmm")
    assert time_model.seconds(doubled, device) == pytest.approx(time_model.seconds(small, device))
    added = replace(small, name="addmm_", shapes=((80, 80), *small.shapes[:2]))
    assert time_model.seconds(added, device) == time_model.seconds(small, device)
    with pytest.raises(ValueError, match="_new_kernel"):
        time_model.seconds(Step("triton", "_new_kernel", ((4, 4),), "float32", 64, programs=1), device)


@needs_meta_products
def test_the_time_model_separates_the_updates_from_the_model(monkeypatch):
    monkeypatch.setitem(time_model.MODELS, "small", (512, 1024, 2, 8, 8, 1000))
    monkeypatch.setattr(time_model, "SEQUENCE", 64)
    own, update, groups = time_model.work_of("small", 128, 1, None)
    assert sum(groups) == 14 and len(groups) < 14
    names = [step.name for step in update.steps]
    assert "cholesky_inverse" in names and "cholesky_inverse" not in [step.name for step in own.steps]
    # of the model: forward and backward of 7 layers in 2 blocks and of the head; the first layers' inputs need nothing
    products = [step for step in own.steps if step.name == "mm"]
    assert 25 <= len(products) <= 30
    assert sum(step.name == "mm" for step in update.steps) == 4 * 14


@needs_meta_products
def test_the_time_model_is_of_this_code():
    """After a change of updates run `time_model.py` on a clean tree, with and without `--layers`, and `tables.py`."""
    result = json.loads((RESULTS / "time-model-layers.json").read_text())
    (row,) = (
        row
        for row in result["rows"]
        if (row["layer"], row["tokens"], row["ranks"], row["path"])
        == ("7B attention: 4096 x 4096", 1024, "8, 16", "torch")
    )
    case = time_model.Case(time_model.LLAMA_7B[0], 1024, torch.bfloat16, 16, count=row["group"])
    estimators = case.estimators()
    case.update(estimators)
    with time_model.counted() as steps:
        case.update(estimators)
    assert len(steps.steps) / row["group"] == row["steps"]


def test_the_modelled_times_are_below_what_was_promised():
    """One of the promises of the GPU path; docs/time-model.md says how far a model can be trusted."""
    result = json.loads((RESULTS / "time-model.json").read_text())
    assert result["measured"] is False
    assert "**Nothing on this page is measured.**" in (tables.ROOT / "docs" / "time-model.md").read_text("utf-8")
    rows = [row for row in result["rows"] if row["model"] == "Llama-2-7B" and row["ranks"] == "8, 16"]
    for tokens, most in ((1024, 0.45), (8192, 0.15)):
        found = [row for row in rows if row["tokens"] == tokens and row["device"] == "H100 SXM"]
        assert [row["path"] for row in found] == ["torch", "Triton"]
        for row in found:
            assert row["updates_ms"] <= most * row["model_ms"] and row["updates_host_ms"] <= row["model_ms"]


@pytest.fixture
def session(tmp_path):
    """`gpu_session.sh` with a Python that notes what it is asked for: `native.py` fails, `roofline.py` never ends."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/bash
echo "LORAGA_TRITON=$LORAGA_TRITON $*" >>"$WORK/calls"
case "$*" in
*loraga*env*) echo '"basis": "torch: wrong result"' ;;
*calibrate*) mkdir -p "$XDG_CACHE_HOME/loraga"; echo "{}" >"$XDG_CACHE_HOME/loraga/kernels-some-gpu.json" ;;
*native.py*) echo "it broke"; exit 3 ;;
*roofline.py*) trap 'echo interrupted; exit 2' INT; echo "row 1"; sleep 60 & wait ;;
esac
"""
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "WORK": str(tmp_path / "work")}

    def start(*sections: str, **more: str) -> subprocess.Popen[str]:
        command = [str(BENCHMARKS / "gpu_session.sh"), str(tmp_path / "out"), *sections]
        return subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, text=True)

    return start


def test_a_gpu_session_goes_on_where_it_was(session, tmp_path):
    first = session("build", "native", "operations")
    assert "failed (3)" in first.communicate()[0] and first.returncode == 1
    said = session("build", "native", "operations").communicate()[0]
    assert "build: done before" in said and "operations: done before" in said and said.endswith("not done: native\n")
    calls = (tmp_path / "work" / "calls").read_text()
    assert calls.count("pip install") == calls.count("operations.py") == 1 and calls.count("native.py") == 2
    assert "no time left" in session("tests", CALL_SECONDS="5").communicate()[0]
    with tarfile.open(tmp_path / "out" / "gpu-session.tar.gz") as brought:
        assert {"./build.done", "./native.log", "./operations.log"} <= set(brought.getnames())


def test_a_gpu_session_says_where_a_kernel_fails_and_measures_with_and_without(session, tmp_path):
    said = session("choice", "calibrate", "whole8", "torch8").communicate()[0]
    assert said.endswith("not done: choice\n") and '"basis": "torch: wrong result"' in said
    whole, without = (tmp_path / "work" / "calls").read_text().splitlines()[-2:]
    assert whole.startswith("LORAGA_TRITON= ") and "whole8-gpu.json" in whole
    assert without.startswith("LORAGA_TRITON=0 ") and "torch8-gpu.json" in without
    # what `calibrate` chose is brought back, and does not change the sections after it
    assert (tmp_path / "work" / "calibration.json").exists()
    assert not list((tmp_path / "work" / "cache").rglob("*.json"))


def test_a_gpu_session_that_is_stopped_brings_back_what_it_has(session, tmp_path):
    running = session("kernels")
    log = tmp_path / "work" / "kernels.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    assert running.returncode == 130
    with tarfile.open(tmp_path / "out" / "gpu-session.tar.gz") as brought:
        assert brought.extractfile("./kernels.log").read() == b"row 1\ninterrupted\n"
        assert "./kernels.done" not in brought.getnames()
