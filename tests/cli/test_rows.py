"""Reading rows and making batches: every form, every error with its file and line."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from loraga.cli.rows import IGNORED, InputError, make_batches, read_rows

tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "user", "assistant", ":"]
MARKING = (
    "{% for m in messages %}{{ m.role + ' : ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}"


def make_tokenizer(chat_template=None, begin=False, **special):
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if begin:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def ids(text):
    return [(SPECIAL + WORDS).index(word) for word in text.split()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches(tmp_path, rows, tokenizer=None, task="causal", max_length=64, batch_size=4, seed=0):
    read = read_rows(write(tmp_path / "data.jsonl", rows), 1000, 0)
    tokenizer = tokenizer or make_tokenizer()
    return make_batches(read, tokenizer, task, max_length=max_length, batch_size=batch_size, seed=seed)


TEXT, PAIR = {"text": "w1"}, {"prompt": "w1", "completion": "w2"}
CHAT = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}


def test_rows_know_their_form_and_line(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(TEXT), "", json.dumps(PAIR), "   ", json.dumps(CHAT)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = read_rows(path, 10, 0)
    assert [(row.form, row.where) for row in rows] == [
        ("text", f"{path}:1"),
        ("completion", f"{path}:3"),
        ("messages", f"{path}:5"),
    ]
    assert rows[1].values == PAIR


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_too(tmp_path, indent):
    path = tmp_path / "data.json"
    path.write_text(" \n" + json.dumps([TEXT, PAIR, CHAT], indent=indent) + "\n")
    rows = read_rows(path, 10, 0)
    assert [row.values for row in rows] == [TEXT, PAIR, CHAT]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in ([2, 2, 2] if indent is None else [3, 6, 10])]


def test_rows_are_drawn_at_random_and_always_the_same(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": f"w{i}"} for i in range(1000)])
    drawn = [[int(row.where.rsplit(":", 1)[1]) for row in read_rows(path, 20, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(lines == sorted(set(lines)) and len(lines) == 20 for lines in drawn)
    assert max(drawn[0]) > 700 and min(drawn[0]) < 300
    # Every line is as likely as any other: the mean of 200 draws of 20 is near the middle.
    means = [sum(int(r.where.rsplit(":", 1)[1]) for r in read_rows(path, 20, seed)) / 20 for seed in range(200)]
    assert abs(sum(means) / 200 - 500.5) < 20


def test_every_set_of_rows_is_drawn_equally_often(tmp_path):
    """All 15 pairs of 6 rows, in 1500 draws: chi-squared with 14 degrees of freedom stays below its 99.99 % point."""
    path = write(tmp_path / "data.jsonl", [{"text": f"w{i}"} for i in range(6)])
    drawn = Counter(tuple(row.values["text"] for row in read_rows(path, 2, seed)) for seed in range(1500))
    assert len(drawn) == 15
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 42.6


BAD_ROWS = [
    ('{"text": "w1"', r"not valid JSON \(.*column 14\); each line must be one JSON object"),
    ("3", "a row must be a JSON object .*, not a number"),
    ('"text"', "a row must be a JSON object .*, not a string"),
    ("null", "not null"),
    ("{}", "has nothing; a row needs 'text', 'prompt' and 'completion', or 'messages'"),
    ('{"input": "a", "output": "b"}', "has 'input', 'output'; a row needs 'text'"),
    ('{"text": 3}', "'text' must be a string, not a number"),
    ('{"text": null}', "'text' must be a string, not null"),
    ('{"prompt": "a"}', "'completion' is missing; 'prompt' and 'completion' go together"),
    ('{"completion": "a"}', "'prompt' is missing"),
    ('{"prompt": "a", "completion": ["b"]}', "'completion' must be a string, not a list"),
    ('{"messages": []}', "'messages' must be a list of at least one message, not an empty list"),
    ('{"messages": "hello"}', "'messages' must be a list of at least one message, not a string"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', "message 2 must be an object with 'role'"),
    ('{"messages": [{"role": 1, "content": "a"}]}', "message 1 must be an object with 'role' and 'content'"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(TEXT) + "\n\n" + row + "\n" + json.dumps(TEXT) + "\n")
    with pytest.raises(InputError, match=rf"data\.jsonl:3: .*{message}") as error:
        read_rows(path, 1, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, line, message",
    [
        ('[{"text": "a"},\n{"text": }]', 2, "not valid JSON"),
        ('[{"text": "a"},\n\n{"texts": "a"}]', 3, "has 'texts'"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "expected ',' or ']'"),
        ('[{"text": "a"},\n', 2, "not valid JSON"),
        ('[{"text": "a"}\n', 2, "expected ',' or ']'"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', 1, "text after the end of the array"),
        ('[[{"text": "a"}]]', 1, "a row must be a JSON object .*, not a list"),
    ],
)
def test_a_bad_array_is_named_by_file_and_line(tmp_path, text, line, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"data\.json:{line}: .*{message}"):
        read_rows(path, 1, 0)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf[ ]"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.jsonl has no rows; give at least one"):
        read_rows(path, 1, 0)


@pytest.mark.parametrize("start", [b'{"text": "a"}\n', b'[{"text": "a"},\n'])
def test_other_encodings_are_named_by_line(tmp_path, start):
    path = tmp_path / "data.jsonl"
    path.write_bytes(start + b'{"text": "caf\xe9"}')
    with pytest.raises(InputError, match=r"data\.jsonl:2: not UTF-8 text"):
        read_rows(path, 1, 0)


def test_a_missing_file_or_a_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read --data .*nope\.jsonl: No such file"):
        read_rows(tmp_path / "nope.jsonl", 1, 0)
    with pytest.raises(InputError, match=r"cannot read --data .*: Is a directory"):
        read_rows(tmp_path, 1, 0)


def test_text_learns_from_every_token_and_the_end(tmp_path):
    (batch,), notes = batches(tmp_path, [{"text": "w1 w2 w3"}, {"text": "w4"}])
    assert batch["input_ids"].tolist() == [ids("w1 w2 w3 </s>"), ids("w4 </s> <pad> <pad>")]
    assert batch["labels"].tolist() == [ids("w1 w2 w3 </s>"), [*ids("w4 </s>"), IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values()) and notes == []


def test_completion_learns_from_the_completion_only(tmp_path):
    (batch,), _ = batches(tmp_path, [{"prompt": "w1 w2", "completion": "w3 w4"}], make_tokenizer(begin=True))
    assert batch["input_ids"].tolist() == [ids("<s> w1 w2 w3 w4 </s>")]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + ids("w3 w4 </s>")]


def test_messages_learn_from_the_assistant_where_the_template_marks_it(tmp_path):
    row = {
        "messages": [*CHAT["messages"], {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]
    }
    (batch,), notes = batches(tmp_path, [row], make_tokenizer(MARKING))
    text = "user : w1 assistant : w2 user : w3 assistant : w4 w5"
    assert batch["input_ids"].tolist() == [ids(text)]
    learned = [word for word, label in zip(text.split(), batch["labels"][0].tolist(), strict=True) if label != IGNORED]
    assert learned == ["w2", "w4", "w5"] and notes == []
    (cut,), _ = batches(tmp_path, [row], make_tokenizer(MARKING), max_length=7)
    assert cut["labels"].tolist() == [[IGNORED] * 5 + ids("w2") + [IGNORED]]


def test_messages_without_marks_learn_from_everything_and_say_so(tmp_path):
    (batch,), notes = batches(tmp_path, [CHAT, CHAT], make_tokenizer(PLAIN))
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [ids("user : w1 assistant : w2")] * 2
    assert notes == ["the chat template does not mark the assistant's turns; the loss is on whole conversations"]


def test_messages_need_a_template_that_takes_them(tmp_path):
    with pytest.raises(InputError, match=r"data\.jsonl:2: 'messages' need a chat template and the tokenizer has none"):
        batches(tmp_path, [TEXT, CHAT])
    picky = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"data\.jsonl:1: the chat template does not take .*: roles must alternate"):
        batches(tmp_path, [CHAT], picky)


def test_seq2seq_reads_the_prompt_and_writes_the_completion(tmp_path):
    rows = [{"prompt": "w1 w2 w3", "completion": "w4"}, {"prompt": "w5", "completion": "w6 w7"}]
    (batch,), _ = batches(tmp_path, rows, make_tokenizer(begin=True), task="seq2seq")
    assert batch["input_ids"].tolist() == [ids("<s> w1 w2 w3 </s>"), ids("<s> w5 </s> <pad> <pad>")]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[*ids("<s> w4 </s>"), IGNORED], ids("<s> w6 w7 </s>")]


def test_masked_learns_from_15_percent_of_the_words(tmp_path):
    text = " ".join(WORDS)
    tokenizer = make_tokenizer(begin=True)
    (batch,), _ = batches(tmp_path, [{"text": text}] * 40, tokenizer, "masked", max_length=100, batch_size=40)
    (again,), _ = batches(tmp_path, [{"text": text}] * 40, tokenizer, "masked", max_length=100, batch_size=40)
    (other,), _ = batches(tmp_path, [{"text": text}] * 40, tokenizer, "masked", 100, batch_size=40, seed=1)
    assert torch.equal(batch["input_ids"], again["input_ids"]) and torch.equal(batch["labels"], again["labels"])
    assert not torch.equal(batch["labels"], other["labels"])
    true = torch.tensor(ids(f"<s> {text} </s>")).expand(40, -1)
    learned = batch["labels"] != IGNORED
    assert (learned.sum(dim=1) == 9).all()  # 15 % of 60 words
    assert not learned[:, 0].any() and not learned[:, -1].any()
    assert torch.equal(batch["labels"][learned], true[learned])
    assert torch.equal(batch["input_ids"][~learned], true[~learned])
    masked = (batch["input_ids"] == tokenizer.mask_token_id)[learned].double().mean()
    kept = (batch["input_ids"] == true)[learned].double().mean()
    assert abs(masked - 0.8) < 0.08 and abs(kept - 0.1) < 0.08
    (short,), _ = batches(tmp_path, [{"text": "w1"}], tokenizer, "masked")
    assert (short["labels"] != IGNORED).sum() == 1


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("masked", PAIR, "a masked language model learns from 'text' rows, this one has 'prompt' and 'completion'"),
        ("masked", CHAT, "a masked language model learns from 'text' rows, this one has 'messages'"),
        ("seq2seq", TEXT, "an encoder-decoder model learns from 'prompt' and 'completion' rows, this one has 'text'"),
        ("seq2seq", CHAT, "an encoder-decoder model learns .*, this one has 'messages'"),
    ],
)
def test_rows_that_do_not_go_with_the_model(tmp_path, task, row, message):
    with pytest.raises(InputError, match=rf"data\.jsonl:1: {message}"):
        batches(tmp_path, [row], task=task)


def test_a_masked_model_needs_a_mask_token(tmp_path):
    with pytest.raises(InputError, match="no mask token"):
        batches(tmp_path, [TEXT], make_tokenizer(mask_token=None), "masked")


def test_rows_are_cut_off_and_those_with_nothing_to_learn_left_out(tmp_path):
    rows = [
        {"text": "w1 w2 w3 w4 w5 w6"},
        {"prompt": "w1 w2 w3 w4 w5", "completion": "w6"},
        {"text": ""},
        {"text": "w1"},
    ]
    (batch,), notes = batches(tmp_path, rows, max_length=4)
    assert batch["input_ids"].tolist() == [ids("w1 w2 w3 w4"), ids("w1 </s> <pad> <pad>")]
    assert notes == ["2 of 4 rows left out: no token to learn from within --max-length 4"]
    # A causal model cannot predict the first token, so one token teaches nothing.
    with pytest.raises(InputError, match="none of the 4 rows drawn has a token to learn from within --max-length 1"):
        batches(tmp_path, rows, max_length=1)


def test_batches_have_the_size_asked_for_and_pad_without_a_pad_token(tmp_path):
    tokenizer = make_tokenizer(pad_token=None)
    made, _ = batches(tmp_path, [{"text": f"w{i} w1" if i % 2 else f"w{i}"} for i in range(7)], tokenizer, batch_size=3)
    assert [len(batch["labels"]) for batch in made] == [3, 3, 1]
    assert made[0]["labels"].tolist()[0][-1] == IGNORED and made[0]["attention_mask"].tolist()[0] == [1, 1, 0]
