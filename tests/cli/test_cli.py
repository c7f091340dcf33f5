"""The command line on tiny random models: what it writes, and every error with its exit code and one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command_line import QUIET, WORDS, row, run, weights_of, write_data

import loraga
from loraga.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ("loraga_report.json", "loraga_report.png")


def one_line(capsys, code):
    """The only line on stderr, which is an error."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("loraga: error: "), captured.err
    assert captured.out == ""
    return lines[0]


def nothing_left(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    "family, form",
    [("llama", "text"), ("llama", "completion"), ("llama", "messages"), ("bert", "text"), ("t5", "completion")],
)
def test_init_writes_an_adapter_that_plain_peft_loads(models, tmp_path, capsys, family, form):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    data = write_data(tmp_path / "data.jsonl", form)
    output = tmp_path / "adapter"
    code = run(models[family], "--data", data, "--output", output, *QUIET)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out == ""
    nothing_left(tmp_path, "adapter", "data.jsonl")
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[family])
    assert (config["r"], config["use_rslora"], config["init_lora_weights"]) == (2, False, True)
    assert config["lora_alpha"] == pytest.approx(16 * 2**0.5)
    nothing_left(output, "README.md", "adapter_config.json", "adapter_model.safetensors", *REPORTS)

    auto = {"llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}[family]
    base = auto.from_pretrained(models[family]).eval()
    batch = {"input_ids": torch.tensor([[1, 9, 10, 11, 2]])}
    if family == "t5":
        batch["labels"] = batch["input_ids"]
    with torch.no_grad():
        before = base(**batch).logits
        loaded = PeftModel.from_pretrained(base, output, is_trainable=True)
        torch.testing.assert_close(loaded.eval()(**batch).logits, before, rtol=0, atol=2e-5)
    weights = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert weights and all(p.requires_grad for p in weights.values())
    report = loraga.InitReport.load(output / "loraga_report.json")
    assert report.micro_batches == 2 and report.seed == 0 and report.config["start"] == "mirror"
    for layer in report.initialised:
        (A,) = [p for name, p in weights.items() if f"{layer.name}.lora_A" in name]
        (B,) = [p for name, p in weights.items() if f"{layer.name}.lora_B" in name]
        # one pair, of the length that makes the first step that of rank 1 and the same alpha
        size = layer.shape[0] ** 0.25 / 4.0
        assert torch.equal(A[0], A[1]) and torch.equal(B[:, 0], -B[:, 1])
        torch.testing.assert_close(torch.stack([A[0].norm(), B[:, 0].norm()]), torch.full((2,), size))
    assert len(report.initialised) == len(weights) // 2
    assert (output / "loraga_report.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_adapter_and_the_summary_is_printed(models, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": " ".join(WORDS * 2)}) + "\n" + json.dumps(row("text", 1)) + "\n")
    output = tmp_path / "deep" / "adapter"
    options = "--rank 3 --alpha 6 --target-modules q_proj,v_proj down_proj --scale gd --direction random"
    sizes = "--seed 5 --batch-size 1 --max-batches 2 --max-length 100 --dtype bfloat16 --device cpu --gamma 64"
    assert run(models["llama"], "--data", data, "--output", output, *options.split(), *sizes.split()) == 0
    captured = capsys.readouterr()
    assert "note: rows are cut off at 64 tokens, the model's largest length" in captured.err
    assert "6 layers: 6 initialised, 0 ordinary LoRA" in captured.out
    assert f"Adapter written to {output}." in captured.out and "is_trainable=True" in captured.out
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, False)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    report = loraga.InitReport.load(output / "loraga_report.json")
    assert (report.seed, report.micro_batches) == (5, 2)
    expected = {"direction": "random", "scale": "gd", "stable_gamma": 64, "start": "mirror"}
    assert expected.items() <= report.config.items()


def test_same_seed_same_bits(models, tmp_path):
    data = write_data(tmp_path / "data.jsonl", rows=50)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(models["bert"], "--data", data, "--output", tmp_path / name, *QUIET, "--seed", seed) == 0
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_without_a_rank_it_is_the_adapter_that_fast_init_makes(models, tmp_path):
    from transformers import AutoModelForCausalLM

    data = write_data(tmp_path / "data.jsonl")
    sizes = ("--batch-size", "2", "--max-batches", "1", "--device", "cpu", "--quiet")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *sizes) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert type(config["lora_alpha"]) is int
    batch = {"input_ids": torch.tensor([[1, 9, 10, 11, 2]])}
    model = loraga.fast_init(
        AutoModelForCausalLM.from_pretrained(models["llama"]), [batch | {"labels": batch["input_ids"]}]
    )
    default = model.peft_config["default"]
    for option in ("r", "lora_alpha", "use_rslora"):
        assert config[option] == getattr(default, option) == {"r": 16, "lora_alpha": 64, "use_rslora": False}[option]


def test_zero_b_is_the_base_model_bit_for_bit(models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = write_data(tmp_path / "data.jsonl")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET, "--start", "zero-b") == 0
    assert loraga.InitReport.load(tmp_path / "out" / "loraga_report.json").config["start"] == "zero-b"
    weights = weights_of(tmp_path / "out")
    for name, value in weights.items():
        if "lora_A" in name:
            m = len(weights[name.replace("lora_A", "lora_B")])
            torch.testing.assert_close(value @ value.T, m**0.5 / 4 * torch.eye(2), rtol=1e-4, atol=1e-5)
        else:
            assert not value.any()
    base = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    ids = torch.tensor([[1, 9, 10, 11, 2]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "out")(input_ids=ids).logits, before)


def test_lora_one_starts_with_a_step(models, tmp_path):
    data = write_data(tmp_path / "data.jsonl")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET, "--method", "lora-one") == 0
    report = loraga.InitReport.load(tmp_path / "out" / "loraga_report.json")
    assert report.config["method"] == "lora-one" and report.config["start"] is None
    weights = weights_of(tmp_path / "out")
    steps = [weights[name.replace("lora_A", "lora_B")] @ value for name, value in weights.items() if "lora_A" in name]
    assert len(steps) == 14 and all(step.any() for step in steps)


def test_whole_conversations_are_said_to_be_learned(models, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl", "messages")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET) == 0
    assert "note: the chat template does not mark the assistant's turns" in capsys.readouterr().err


def test_no_plot_without_matplotlib(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = write_data(tmp_path / "data.jsonl")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET) == 0
    assert "note: no plot. Drawing a report needs matplotlib: pip install 'loraga[plot]'." in capsys.readouterr().err
    assert not (tmp_path / "out" / "loraga_report.png").exists()
    assert (tmp_path / "out" / "loraga_report.json").exists()


# Usage and input errors: exit code 2 and one line.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: {init,plan,calibrate,env}"),
        (["foo"], "invalid choice: 'foo'"),
        (["init", "model"], "the following arguments are required: --data, --output"),
        (
            ["init", "m", "--data", "d", "--output", "o", "--rank", "0"],
            "--rank: '0' must be a whole number of at least 1",
        ),
        (["init", "m", "--data", "d", "--output", "o", "--rank", "1.5"], "--rank: '1.5' must be a whole number"),
        (["init", "m", "--data", "d", "--output", "o", "--max-batches", "-1"], "must be a whole number of at least 1"),
        (["init", "m", "--data", "d", "--output", "o", "--alpha", "nan"], "--alpha: 'nan' must be a number above 0"),
        (["init", "m", "--data", "d", "--output", "o", "--gamma", "0"], "--gamma: '0' must be a number above 0"),
        (["init", "m", "--data", "d", "--output", "o", "--scale", "foo"], "--scale: invalid choice: 'foo'"),
        (["init", "m", "--data", "d", "--output", "o", "--start", "foo"], "--start: invalid choice: 'foo'"),
        (["init", "m", "--data", "d", "--output", "o", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["init", "m", "--data", "d", "--output", "o", "--foo"], "unrecognized arguments: --foo"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = one_line(capsys, 2)
    assert message in line and "--help)" in line


def test_options_that_do_not_go_together(tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl")
    common = ("model", "--data", data, "--output", tmp_path / "out")
    lora_one, zero_b = ("--method", "lora-one"), ("--start", "zero-b")
    for options, message in (
        ((*lora_one, *zero_b), "start='zero-b' does not go with method='lora-one'"),
        ((*lora_one, "--direction", "random"), "direction='random' does not go with method='lora-one'"),
        ((*zero_b, "--direction", "random"), "direction='random' does not go with start='zero-b'"),
    ):
        assert run(*common, *options) == 2
        assert message in one_line(capsys, 2)


def test_bad_data_is_found_before_the_model_is_looked_for(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1"}\n{"txt": "w2"}\n')
    assert run("no/such-model", "--data", data, "--output", tmp_path / "out") == 2
    assert f"{data}:2: has 'txt'; a row needs 'text'" in one_line(capsys, 2)
    assert run("no/such-model", "--data", tmp_path / "nope", "--output", tmp_path / "out") == 2
    assert f"cannot read --data {tmp_path / 'nope'}: No such file" in one_line(capsys, 2)
    nothing_left(tmp_path, "data.jsonl")


def test_several_processes_do_not_write_one_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("model", "--data", tmp_path / "data", "--output", tmp_path / "out") == 2
    assert "torchrun started several" in one_line(capsys, 2)
    nothing_left(tmp_path)


def test_no_such_model(tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data.jsonl")
    (tmp_path / "empty").mkdir()
    for model, message in (
        ("./nope", "cannot load MODEL './nope': no such folder."),
        (str(tmp_path / "nope"), "no such folder."),
        ("empty", "cannot load MODEL 'empty': "),
        ("loraga-tests/nope", "cannot load MODEL 'loraga-tests/nope': "),
    ):
        assert run(model, "--data", data, "--output", "out", *QUIET) == 2
        assert message in one_line(capsys, 2)
    nothing_left(tmp_path, "data.jsonl", "empty")


def test_rows_that_do_not_go_with_the_model(models, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl", "messages")
    assert run(models["t5"], "--data", data, "--output", tmp_path / "out", *QUIET) == 2
    assert "an encoder-decoder model learns from 'prompt' and 'completion' rows" in one_line(capsys, 2)
    nothing_left(tmp_path, "data.jsonl")


@pytest.mark.parametrize("start", ["mirror", "zero-b"])
def test_a_rank_above_what_a_layer_has_is_filled_up(models, tmp_path, start):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = write_data(tmp_path / "data.jsonl")
    options = (*QUIET, "--rank", "40", "--start", start)
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *options) == 0
    report = loraga.InitReport.load(tmp_path / "out" / "loraga_report.json")
    assert {layer.directions for layer in report.initialised} == {16, 32} and not report.ordinary
    weights = weights_of(tmp_path / "out")
    assert all(40 in value.shape for value in weights.values())
    base = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    ids = torch.tensor([[1, 9, 10, 11, 2]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)


def test_no_such_layer(models, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl")
    arguments = (models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET)
    assert run(*arguments, "--target-modules", "c_attn") == 2
    assert "c_attn" in one_line(capsys, 2)


def test_a_device_that_is_not_there(models, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl")
    for device in ("foo", "cuda:99"):
        code = run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET, "--device", device)
        assert code == 2 and f"--device {device} cannot be used here: " in one_line(capsys, 2)
    nothing_left(tmp_path, "data.jsonl")


# The output folder.


def test_an_output_with_something_in_it_is_refused(tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert run("model", "--data", data, "--output", output) == 2
    assert "exists and is not empty; give another folder, or --overwrite" in one_line(capsys, 2)
    assert run("model", "--data", data, "--output", output, "--overwrite") == 2
    assert "holds no adapter, so --overwrite will not delete it" in one_line(capsys, 2)
    assert run("model", "--data", data, "--output", data) == 2
    assert "is a file; give a folder" in one_line(capsys, 2)
    (output / "adapter_config.json").write_text("{}")
    inside = write_data(output / "data.jsonl")
    assert run("model", "--data", inside, "--output", output, "--overwrite") == 2
    assert f"holds {inside}, which --overwrite would delete" in one_line(capsys, 2)
    assert run(output, "--data", data, "--output", output, "--overwrite") == 2
    assert "which --overwrite would delete" in one_line(capsys, 2)
    nothing_left(output, "notes.txt", "adapter_config.json", "data.jsonl")
    assert run("model", "--data", data, "--output", data / "out") == 2
    assert "cannot write to" in one_line(capsys, 2)


def test_an_empty_folder_is_filled_and_an_adapter_replaced(models, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl")
    output = tmp_path / "out"
    output.mkdir()
    arguments = (models["llama"], "--data", data, "--output", output, *QUIET)
    assert run(*arguments) == 0
    (output / "left-over").write_text("")
    assert run(*arguments) == 2
    capsys.readouterr()
    assert run(*arguments, "--overwrite", "--target-modules", "q_proj") == 0
    assert not (output / "left-over").exists()
    assert json.loads((output / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    nothing_left(tmp_path, "data.jsonl", "out")


def test_a_failure_leaves_the_old_adapter(models, tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path / "data.jsonl")
    arguments = (models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET)
    assert run(*arguments) == 0
    before = weights_of(tmp_path / "out")
    capsys.readouterr()

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(loraga.InitReport, "save", fail)
    assert run(*arguments, "--overwrite", "--seed", "9") == 1
    assert one_line(capsys, 1) == "loraga: error: OSError: disk gone"
    after = weights_of(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)
    nothing_left(tmp_path, "data.jsonl", "out")


# What is neither usage nor input.


@pytest.mark.parametrize(
    "raised, code, message",
    [
        (RuntimeError("first line\nsecond line"), 1, "RuntimeError: first line"),
        (ValueError("Layer 'x' is too small."), 2, "Layer 'x' is too small."),
        (torch.OutOfMemoryError("CUDA ..."), 1, "out of memory: use a smaller --batch-size"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_failures_have_their_exit_code_and_one_line(models, tmp_path, capsys, monkeypatch, raised, code, message):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(loraga, "fast_init", fail)
    data = write_data(tmp_path / "data.jsonl")
    arguments = (models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET)
    assert run(*arguments) == code
    assert message in one_line(capsys, code)
    nothing_left(tmp_path, "data.jsonl")
    monkeypatch.setenv("LORAGA_DEBUG", "1")
    assert run(*arguments) == code
    captured = capsys.readouterr().err
    assert "Traceback" in captured and message in captured.splitlines()[-1]


def test_warnings_are_one_line(models, tmp_path, capsys, monkeypatch):
    real = loraga.fast_init

    def warn(*arguments, **options):
        warnings.warn("look\nhere", stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        return real(*arguments, **options)

    monkeypatch.setattr(loraga, "fast_init", warn)
    data = write_data(tmp_path / "data.jsonl")
    assert run(models["llama"], "--data", data, "--output", tmp_path / "out", *QUIET) == 0
    assert capsys.readouterr().err.splitlines() == ["loraga: warning: look here"]


# As a process.


def process(*arguments, code=None, **environment):
    command = [sys.executable, *(("-c", code) if code else ("-m", "loraga", *map(str, arguments)))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_env_as_a_process():
    result = process("env", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["versions"]["loraga"] == loraga.__version__ and found["versions"]["torch"] == version("torch")
    assert "cpu" in found["devices"]
    for state in (found["triton"], *found["native"]["devices"].values()):
        assert state["usable"] is (state["reason"] is None)
    if not torch.cuda.is_available():
        assert found["triton"]["usable"] is False and found["triton"]["reason"]


def test_env_is_readable(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"torch {version('torch')}," in text and "  cpu: " in text
    assert "Triton kernels: " in text and "native core:" in text


def test_env_says_what_is_missing():
    without = (
        "import sys, json; sys.modules['triton'] = None; sys.modules['loraga._C'] = None\n"
        "from loraga.cli.environment import environment, describe; found = environment(); print(describe(found))"
    )
    result = process(code=without)
    assert "Triton kernels: not usable: triton is not installed" in result.stdout, result.stderr
    assert "cpu: not usable: loraga's native core could not be loaded" in result.stdout


def test_an_error_as_a_process(tmp_path):
    result = process("init", "model", "--data", tmp_path / "nope.jsonl", "--output", tmp_path / "out")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"loraga: error: cannot read --data {tmp_path / 'nope.jsonl'}: No such file or directory.\n"


def test_version_and_help(capsys):
    for argument, expected in (("--version", f"loraga {loraga.__version__}\n"), ("--help", "env"), ("-h", "init")):
        with pytest.raises(SystemExit) as stop:
            main([argument])
        assert stop.value.code == 0 and expected in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    """The command's own modules; `loraga/__init__.py` is replaced by an empty package of the same place."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('loraga'); package.__path__ = [{str(ROOT / 'loraga')!r}]\n"
        "sys.modules['loraga'] = package\n"
        "from loraga.cli.main import main\n"
        "try:\n    main(['init', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = process(code=code)
    assert result.returncode == 0 and "--trust-remote-code" in result.stdout, result.stderr
