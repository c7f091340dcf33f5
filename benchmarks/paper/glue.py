"""T5-base on MNLI, SST-2, CoLA, QNLI and MRPC with the settings of the LoRA-GA paper (arXiv 2407.05000, table 1).

    python benchmarks/paper/glue.py              # weights and data are downloaded; one GPU
    python benchmarks/paper/glue.py --stand-in   # the same path with a tiny random T5 and made-up rows, seconds

Accuracy on the validation sets: the generated answer must be the label's word, exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _harness
import torch
from _harness import Features, Settings
from torch import nn
from transformers import PreTrainedTokenizerBase

MODEL = "google-t5/t5-base"
PUBLISHED = Settings(rate=1e-4, batch=32, length=128, micro_batch=32)
TARGETS = ("q", "k", "v", "o", "wi", "wo")
Row = dict[str, Any]


@dataclass(frozen=True)
class GlueTask:
    """Fields of a row, the question put to the model, and the answer's word for every label.

    The wording is ours, and is not that of T5's own training: the released T5 has seen these tasks under its prefixes.
    """

    fields: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    validation: str = "validation"

    def prompt(self, row: Row) -> str:
        return " ".join(f"{field.capitalize()}: {row[field]}" for field in self.fields) + f" {self.question}"

    def answer(self, row: Row) -> str:
        return self.answers[row["label"]]


TASKS = {
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        "Does the hypothesis follow? Yes, maybe or no?",
        ("yes", "maybe", "no"),
        "validation_matched",
    ),
    "sst2": GlueTask(("sentence",), "Is this review good or bad?", ("bad", "good")),
    "cola": GlueTask(("sentence",), "Is this correct English? Yes or no?", ("no", "yes")),
    "qnli": GlueTask(("question", "sentence"), "Does the sentence answer the question? Yes or no?", ("yes", "no")),
    "mrpc": GlueTask(("sentence1", "sentence2"), "Do both mean the same? Yes or no?", ("no", "yes")),
}


def real(task: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows as GLUE has them."""
    found = _harness.datasets_module("GLUE").load_dataset("nyu-mll/glue", task)
    return list(found["train"]), list(found[TASKS[task].validation])


@functools.cache
def _texts() -> list[list[str]]:
    import docstrings

    return [text.split() for text, _ in docstrings.load().train]


def stand_in(task: str, train: int = 48, validation: int = 12) -> tuple[list[Row], list[Row]]:
    """Rows with GLUE's fields and labels, made from the docstrings of the standard library.

    With one field: the text as it is (1) or its words reversed (0). With two: a text's beginning, and as its partner
    its end, another text's end, or (MNLI) its end reversed.
    """
    texts = _texts()[: train + validation]
    form = TASKS[task]
    rows = []
    for i, words in enumerate(texts):
        kind = i % len(form.answers)
        if len(form.fields) == 1:
            rows.append({form.fields[0]: " ".join(words if kind else words[::-1]), "label": kind})
            continue
        other = texts[(i + 1) % len(texts)]
        half = len(words) // 2
        partners = (words[half:], other[len(other) // 2 :], words[half:][::-1])
        matching = form.answers[kind] == "yes"
        partner = partners[kind] if len(form.answers) == 3 else partners[0 if matching else 1]
        rows.append(dict(zip(form.fields, (" ".join(words[:half]), " ".join(partner)), strict=True)) | {"label": kind})
    return rows[:train], rows[train:]


def encode(task: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> Features:
    form = TASKS[task]
    found = []
    for row in rows:
        inputs = tokenizer(form.prompt(row), truncation=True, max_length=length)["input_ids"]
        labels = tokenizer(text_target=form.answer(row))["input_ids"]
        found.append({"input_ids": inputs, "attention_mask": [1] * len(inputs), "labels": labels})
    return found


def accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, rows: Sequence[Row], settings: Settings
) -> float:
    """Share of the rows whose generated answer is the label's word; case and spaces at the ends do not matter."""
    form = TASKS[task]
    prompts = [feature["input_ids"] for feature in encode(task, rows, tokenizer, settings.length)]
    said = _harness.generate(model, tokenizer, prompts, new_tokens=8, batch=4 * settings.micro_batch)
    return sum(a.strip().lower() == form.answer(row) for a, row in zip(said, rows, strict=True)) / len(rows)


def load(tiny: bool) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """T5-base in float32, or a tiny random T5 over bytes."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    if not tiny:
        return AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), ByT5Tokenizer()


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = _harness.parser(__doc__, PUBLISHED, _harness.METHODS, seeds=(0, 1, 2))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args, settings = _harness.parse(parser, arguments, PUBLISHED)

    def run(add: Callable[[dict], None]) -> None:
        for task in args.tasks:
            train, validation = (stand_in if args.stand_in else real)(task)
            for seed in args.seeds:
                for method in args.methods:
                    adapter = settings.adapter(method, TARGETS, token_labels=False, task_type="SEQ_2_SEQ_LM")
                    model, tokenizer = load(args.stand_in)
                    features = encode(task, train, tokenizer, settings.length)
                    model, used = _harness.fine_tune(method, model, features, tokenizer, adapter, settings, seed=seed)
                    right = accuracy(model, tokenizer, task, validation, settings)
                    add({"task": task, "method": method, "seed": seed, "accuracy": right, **used})

    return _harness.write(args, "glue", settings, run)


if __name__ == "__main__":
    main()
