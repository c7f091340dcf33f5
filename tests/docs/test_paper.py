"""The paper harness: settings as published, formats, answers, and both parts end to end on their stand-ins."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA (it came with 0.19)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "paper"))

import _harness
import _methods
import glue
import gsm8k
import published
from transformers import ByT5Tokenizer

PAPER = Path(glue.__file__).parent


@pytest.fixture(scope="module")
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


class Speaker:
    """A model that generates fixed answers, in order."""

    def __init__(self, tokenizer, answers: list[str], is_encoder_decoder: bool) -> None:
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.prompts: list[str] = []

    def eval(self) -> None:
        pass

    def generate(self, input_ids, attention_mask, **options) -> torch.Tensor:
        assert self.config.is_encoder_decoder or bool(attention_mask[:, -1].all()), "a causal prompt is padded left"
        self.prompts += self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        said, self.answers = self.answers[: len(input_ids)], self.answers[len(input_ids) :]
        tokens = self.tokenizer(said, padding=True, return_tensors="pt")["input_ids"]
        return tokens if self.config.is_encoder_decoder else torch.cat([input_ids, tokens], dim=1)


# --- settings and published numbers


def test_the_settings_are_the_published_ones():
    for settings, own in ((glue.PUBLISHED, (1e-4, 32, 128)), (gsm8k.PUBLISHED, (2e-5, 32, 1024))):
        assert (settings.rate, settings.batch, settings.length) == own
        assert (settings.rank, settings.alpha, settings.warmup) == (8, 16, 0.03)


@pytest.mark.parametrize(
    "method, rank, scaling",
    [("lora", 8, 2), ("pissa", 8, 2), ("dora", 8, 2), ("rslora", 8, 16 / 8**0.5), ("lora-ga-mirror", 16, 4)],
)
def test_every_method_has_the_papers_adapter(method, rank, scaling):
    adapter = glue.PUBLISHED.adapter(method, glue.TARGETS)
    assert (adapter.rank, adapter.alpha) == (rank, 16)
    assert adapter.scaling == pytest.approx(scaling)


class Regression(torch.nn.Module):
    """One linear layer and a squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(40, 48, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.layer(x) - y).square().sum())


def test_the_mirror_of_rank_16_takes_the_papers_first_step_of_adam():
    """The paper's: r 8, alpha 16, rsLoRA, stable with gamma 16, and W - s B A in the place of W."""
    torch.manual_seed(0)
    base = Regression()
    batch = {"x": torch.randn(64, 40, dtype=torch.float64), "y": torch.randn(64, 48, dtype=torch.float64)}
    (gradient,) = torch.autograd.grad(base(**batch).loss, base.layer.weight)
    U, _, Vh = torch.linalg.svd(gradient)
    s, size, rate = 16 / 8**0.5, 48**0.25 / 4, 1e-6
    A, B = size * Vh[:8], size * U[:, 8:16]
    # the first step of Adam is as long as the rate in every entry
    theirs = -rate * s * ((gradient @ A.T).sign() @ A + B @ (B.T @ gradient).sign())

    model = _methods.start(
        "lora-ga-mirror", base, [batch], glue.PUBLISHED.adapter("lora-ga-mirror", ("layer",)), seed=0
    )
    layer = model.base_model.model.layer
    before = layer.get_delta_weight("default").detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    ours = layer.get_delta_weight("default").detach() - before
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_readme_holds_the_tables_of_the_committed_results():
    readme = (PAPER / "README.md").read_text("utf-8")
    results = published.load([file for file in sorted(_harness.RESULTS.glob("paper-*.json"))])
    assert published.glue_table(results) in readme
    assert published.gsm8k_table(results) in readme


def test_measured_cells_are_means_over_the_seeds_of_that_task_and_method():
    rows = [("mrpc", "lora", 0.5), ("mrpc", "lora", 0.75), ("mrpc", "full", 1.0), ("cola", "lora", 0.0)]
    result = {"rows": [{"task": t, "method": m, "accuracy": a} for t, m, a in rows]}
    assert published.measured([result], "mrpc", "lora") == "62.50 (50.00 to 75.00; 2 seeds)"
    assert published.measured([result], "sst2", "lora") == "not measured"
    assert published.measured([result], "mrpc", None) == "not offered"


def test_published_cells_have_the_published_averages():
    # plain LoRA is not among them: its printed average, 82.08, is not the mean of its printed cells, 82.01
    averages = {
        "Full": 87.91,
        "PiSSA": 84.71,
        "rsLoRA": 79.64,
        "LoRA+": 84.95,
        "DoRA": 82.57,
        "AdaLoRA": 81.62,
        "LoRA-GA": 87.77,
    }
    means = {name: fmean(float(cell.split()[0]) for cell in cells) for _, name, cells in published.PUBLISHED_GLUE}
    assert means.pop("LoRA") == pytest.approx(82.006)
    assert means == pytest.approx(averages, abs=0.0051)


def test_a_stand_ins_result_is_refused(tmp_path):
    file = tmp_path / "paper-glue.json"
    file.write_text(json.dumps({"stand_in": True, "rows": []}))
    with pytest.raises(ValueError, match="stand-in"):
        published.load([file])


# --- answers


@pytest.mark.parametrize(
    "text, number",
    [
        ("3 + 4 = 7.\nThe answer is: 7", "7"),
        ("The answer is: $1,234.50.", "1234.50"),
        ("so <<3*4=12>>12\n#### 12", "12"),
        ("The answer is: 5\nThe answer is: -6", "-6"),
        ("#### 1,000", "1000"),
        ("first 3, then 4 apples", "4"),
        ("The answer is: 12 apples in 3 bags", "12"),
        ("The answer is: \\boxed{8}", "8"),
        ("The answer is: unknown, though 7 was named", "7"),
        ("no idea", None),
        ("", None),
        ("The answer is:", None),
    ],
)
def test_number_of(text, number):
    assert gsm8k.number_of(text) == (None if number is None else Decimal(number))


def test_exact_match_is_numeric_and_needs_a_number():
    assert gsm8k.is_right("The answer is: 18.00", "#### 18")
    assert not gsm8k.is_right("The answer is: 18.5", "#### 18")
    assert not gsm8k.is_right("I cannot say", "#### 18")


def test_gsm8k_accuracy_counts_generated_answers_and_not_the_prompts(tokenizer):
    _, rows = gsm8k.stand_in(test=4)
    rows.append({"question": "Is it more than 7?", "answer": "#### 7"})  # the right number stands in the prompt
    right = [row["answer"] for row in rows]
    said = [right[0], "The answer is: -1", right[2], right[3], "no number"]
    model = Speaker(tokenizer, said, is_encoder_decoder=False)
    assert gsm8k.accuracy(model, tokenizer, rows, new_tokens=8, batch=2) == 3 / 5
    assert model.prompts == [gsm8k.prompt(row["question"]) for row in rows]
    assert tokenizer.padding_side == "right"


def test_glue_accuracy_counts_exact_words(tokenizer):
    _, rows = glue.stand_in("mrpc", validation=4)
    words = [glue.TASKS["mrpc"].answer(row) for row in rows]
    said = [words[0].upper() + " ", words[1] + " indeed", words[2], ""]
    model = Speaker(tokenizer, said, is_encoder_decoder=True)
    assert glue.accuracy(model, tokenizer, "mrpc", rows, glue.PUBLISHED) == 2 / 4


# --- rows


@pytest.mark.parametrize("task", glue.TASKS)
def test_stand_in_rows_have_glues_fields_and_every_label(task):
    train, validation = glue.stand_in(task)
    fields = {*glue.TASKS[task].fields, "label"}
    assert all(set(row) == fields for row in train + validation)
    for rows in (train, validation):
        assert {row["label"] for row in rows} == set(range(len(glue.TASKS[task].answers)))


def test_labels_stand_for_glues_words():
    assert glue.TASKS["mnli"].answers == ("yes", "maybe", "no")  # entailment, neutral, contradiction
    assert glue.TASKS["qnli"].answers == ("yes", "no")  # entailment, not entailment
    assert glue.TASKS["sst2"].answers == ("bad", "good")  # negative, positive
    assert glue.TASKS["cola"].answers[1] == glue.TASKS["mrpc"].answers[1] == "yes"


def test_long_rows_are_cut(tokenizer):
    (features,) = glue.encode("cola", [{"sentence": "a" * 500, "label": 1}], tokenizer, 128)
    assert len(features["input_ids"]) == 128
    assert tokenizer.decode(features["labels"], skip_special_tokens=True) == "yes"


def test_the_loss_of_a_maths_row_is_that_of_its_answer(tokenizer):
    row = {"query": "2 + 2?", "response": "The answer is: 4"}
    (features,) = gsm8k.encode([row], tokenizer, 1024)
    ids, labels = features["input_ids"], features["labels"]
    kept = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert kept == [label for label in labels if label != -100]
    assert tokenizer.decode(kept, skip_special_tokens=True) == row["response"]
    assert kept[-1] == tokenizer.eos_token_id
    assert gsm8k.encode([row], tokenizer, len(gsm8k.prompt(row["query"]))) == []  # nothing of the answer is left


def test_stand_in_sums_are_right():
    train, test = gsm8k.stand_in()
    for row in test:
        a, b = (int(n) for n in row["answer"].split(" = ")[0].split(" + "))
        assert gsm8k.number_of(row["answer"]) == a + b
    assert all(gsm8k.number_of(row["response"]) is not None for row in train)


# --- the whole


@pytest.mark.parametrize("method", ["full", "lora", "lora-ga-mirror"])
def test_gsm8k_stand_in_from_end_to_end(method, tmp_path):
    file = tmp_path / "result.json"
    options = ["--stand-in", "--seeds", "0", "--micro-batch", "16", "--methods", method, "--output", str(file)]
    (row,) = gsm8k.main(options)
    saved = json.loads(file.read_text())
    assert saved["stand_in"] and saved["rows"] == [row]
    assert row["steps"] == 2 and 0 <= row["accuracy"] <= 1
    assert 3 < row["training_loss"] < 9  # of 384 bytes, log(384) = 5.95


def test_glue_stand_in_from_end_to_end_trains_what_the_method_says(tmp_path):
    file = tmp_path / "result.json"
    options = ["--stand-in", "--seeds", "0", "--methods", "lora", "lora-ga-mirror", "--tasks", "mnli"]
    lora, ours = glue.main([*options, "--output", str(file)])
    assert (lora["rank"], lora["scaling"]) == (8, 2.0) and (ours["rank"], ours["scaling"]) == (16, 4.0)
    assert 2 * lora["trainable_parameters"] == ours["trainable_parameters"]
    assert ours["init"]["start"] == "mirror"
    assert json.loads(file.read_text())["settings"]["rate"] == 1e-4


def test_fine_tuning_moves_the_adapter_and_leaves_the_base(tokenizer):
    train, _ = gsm8k.stand_in()
    model, tokenizer = gsm8k.load(tiny=True, method="lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = _harness.replace(gsm8k.PUBLISHED, micro_batch=16)
    adapter = settings.adapter("lora-ga-mirror", gsm8k.TARGETS, task_type="CAUSAL_LM")
    features = gsm8k.encode(train, tokenizer, settings.length)
    trained, _ = _harness.fine_tune("lora-ga-mirror", model, features, tokenizer, adapter, settings, seed=0, large=True)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in trained.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [  # both halves of B by the same, which begin as B0 and -B0
        module.lora_B["default"].weight[:, :8] + module.lora_B["default"].weight[:, 8:]
        for module in trained.modules()
        if hasattr(module, "lora_B")
    ]
    assert moved and all(bool(delta.abs().max() > 0) for delta in moved)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(capsys):
    with pytest.raises(SystemExit):
        glue.main(["--stand-in", "--micro-batch", "5"])
    assert "does not divide" in capsys.readouterr().err


def test_without_the_package_datasets_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        glue.real("mnli")
