"""Llama-2-7B on MetaMathQA, tested on GSM8K, with the settings of the LoRA-GA paper (arXiv 2407.05000).

    python benchmarks/paper/gsm8k.py              # weights and data are downloaded; one large GPU
    python benchmarks/paper/gsm8k.py --stand-in   # the same path with a tiny random Llama and made-up rows, seconds

Accuracy by greedy generation: the number in the answer must be the reference's. (Not called math.py: a script's folder
comes first in the import path, and the standard library has a module of that name.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import _harness
import torch
from _harness import Features, Settings
from torch import nn
from transformers import PreTrainedTokenizerBase

MODEL = "meta-llama/Llama-2-7b-hf"
PUBLISHED = Settings(rate=2e-5, batch=32, length=1024, micro_batch=4)
ROWS = 100_000  # of MetaMathQA
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Row = dict[str, Any]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARKS = ("The answer is", "####")


def number_of(text: str) -> Decimal | None:
    """The answer in a text: the first number after its last "The answer is" or "####"; without these, the last number.

    Signs of currency, commas between thousands and a full stop do not matter.
    """
    places = [(text.rfind(mark), mark) for mark in _MARKS]
    place, mark = max(places)
    found = _NUMBER.findall(text[place + len(mark) :] if place >= 0 else text)
    if not found:
        return None
    return Decimal((found[0] if place >= 0 else found[-1]).replace(",", ""))


def is_right(said: str, reference: str) -> bool:
    """Whether an answer's number equals the reference's; without a number it is wrong."""
    number = number_of(said)
    return number is not None and number == number_of(reference)


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _asked(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return first + tokenizer(prompt(question), add_special_tokens=False)["input_ids"]


def real() -> tuple[list[Row], list[Row]]:
    """`ROWS` rows of MetaMathQA (query, response) and the test set of GSM8K (question, answer)."""
    datasets = _harness.datasets_module("MetaMathQA and GSM8K")
    train = datasets.load_dataset("meta-math/MetaMathQA", split="train").shuffle(seed=0).select(range(ROWS))
    return list(train), list(datasets.load_dataset("openai/gsm8k", "main", split="test"))


def stand_in(train: int = 48, test: int = 8) -> tuple[list[Row], list[Row]]:
    """Sums over the sizes of the standard library's files, in the formats of MetaMathQA and GSM8K."""
    import _bytes

    sizes = [(file.stem, len(file.read_bytes().splitlines())) for file in _bytes.stdlib_files()]
    trained, tested = [], []
    for i in range(train + test):
        (a, m), (b, n) = sizes[i % len(sizes)], sizes[(7 * i + 3) % len(sizes)]
        question = f"{a} has {m} lines and {b} has {n}. How many have both?"
        if i < train:
            response = f"{m} + {n} = {m + n}.\nThe answer is: {m + n}"
            trained.append({"query": question, "response": response, "type": "stand-in"})
        else:
            tested.append({"question": question, "answer": f"{m} + {n} = <<{m}+{n}={m + n}>>{m + n}\n#### {m + n}"})
    return trained, tested


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> Features:
    """Question and answer in a row; the loss is that of the answer alone. Rows cut before their answer are left out."""
    found = []
    for row in rows:
        asked = _asked(row["query"], tokenizer)
        answered = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = [*asked, *answered, tokenizer.eos_token_id][:length]
        if len(asked) < len(ids):
            labels = [-100] * len(asked) + ids[len(asked) :]
            found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, new_tokens: int, batch: int
) -> float:
    """Share of GSM8K's questions answered with the right number."""
    prompts = [_asked(row["question"], tokenizer) for row in rows]
    said = _harness.generate(model, tokenizer, prompts, new_tokens=new_tokens, batch=batch)
    return sum(is_right(text, row["answer"]) for text, row in zip(said, rows, strict=True)) / len(rows)


def load(tiny: bool, method: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Llama-2-7B, or a tiny random Llama over bytes.

    In bfloat16 under an adapter; in float32 where all weights are trained, which bfloat16 would round away.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    dtype = torch.float32 if method == "full" else torch.bfloat16
    if not tiny:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        tokenizer.pad_token = tokenizer.unk_token
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype), tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype), ByT5Tokenizer()


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    # full fine-tuning of 7B needs 16 bytes per parameter and more than one GPU: only when asked for
    methods = [method for method in _harness.METHODS if method != "full"]
    parser = _harness.parser(__doc__, PUBLISHED, methods, seeds=(0,))
    parser.add_argument("--new-tokens", type=int, default=512, help="of a generated answer, at most")
    args, settings = _harness.parse(parser, arguments, PUBLISHED)

    def run(add: Callable[[dict], None]) -> None:
        train, test = stand_in() if args.stand_in else real()
        new_tokens = 16 if args.stand_in else args.new_tokens
        for seed in args.seeds:
            for method in args.methods:
                adapter = settings.adapter(method, TARGETS, task_type="CAUSAL_LM")
                model, tokenizer = load(args.stand_in, method)
                features = encode(train, tokenizer, settings.length)
                model, used = _harness.fine_tune(
                    method, model, features, tokenizer, adapter, settings, seed=seed, large=True
                )
                right = accuracy(model, tokenizer, test, new_tokens=new_tokens, batch=4 * settings.micro_batch)
                add({"task": "gsm8k", "method": method, "seed": seed, "accuracy": right, **used})

    return _harness.write(args, "gsm8k", settings, run)


if __name__ == "__main__":
    main()
