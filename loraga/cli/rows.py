"""Reads rows of a text file, and makes batches of them that a language model can learn from."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TASKS = ("causal", "seq2seq", "masked")
IGNORED = -100  # the label that the loss of every transformers model leaves out
MASKED_SHARE = 0.15

_SPACE = re.compile(r"\s*")
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        form (`str`): `"text"`, `"completion"` (a prompt and its completion) or `"messages"`.
        values (`dict`): the JSON object.
        where (`str`): file and line, for messages.
    """

    form: str
    values: dict[str, Any]
    where: str


def read_rows(path: Path, count: int, seed: int) -> list[Row]:
    """Draw `count` rows of a JSON-lines file or a JSON array at random; the same seed draws the same rows.

    The rows are drawn because files are often sorted, so that the first ones are a poor sample. Every row of the file
    is checked.

    Args:
        path (`Path`): each line, or each item of the array, is an object with `text`, with `prompt` and
            `completion`, or with `messages` (a list of objects with `role` and `content`).
        count (`int`): rows to draw; all of them, in order, if the file has no more.
        seed (`int`): of the draw.

    Raises:
        InputError: the file cannot be read, is empty, or a row is not of these forms; file and line are named.
    """
    draw = random.Random(seed)
    drawn: list[tuple[int, Row]] = []
    for index, (line, value) in enumerate(_objects(path)):
        row = _checked(value, f"{path}:{line}")
        # reservoir sampling: only `count` rows are in memory, however long the file is
        if len(drawn) < count:
            drawn.append((index, row))
        elif (place := draw.randrange(index + 1)) < count:
            drawn[place] = (index, row)
    if not drawn:
        raise InputError(f"{path} has no rows; give at least one.")
    return [row for _, row in sorted(drawn, key=lambda pair: pair[0])]


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each row. A file whose first character is "[" is read as one JSON array."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if start.startswith(b"["):
                yield from _items(_decoded(file.read(), path, 1), path)
                return
            for number, raw in enumerate(file, 1):
                text = _decoded(raw, path, number).strip()
                if text:
                    yield number, _parsed(text, path, number)
    except OSError as error:
        raise InputError(f"cannot read --data {path}: {error.strerror or error}.") from error


def _decoded(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from error


def _parsed(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno}); each line must be one JSON object."
        ) from error


def _items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each item of a JSON array."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip(text, _skip(text, 0) + 1)
    more = text[position : position + 1] != "]"
    while more:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}).") from error
        line, counted = line + text.count("\n", counted, position), position
        yield line, value
        position = _skip(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _skip(text, position + 1)
    line += text.count("\n", counted, position)
    if text[position : position + 1] != "]":
        raise InputError(f"{path}:{line}: not valid JSON (expected ',' or ']' after an item of the array).")
    if _skip(text, position + 1) != len(text):
        raise InputError(f"{path}:{line}: text after the end of the array; give one array, or one object per line.")


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _checked(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f'{where}: a row must be a JSON object such as {{"text": "..."}}, not {_type(value)}.')
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: 'messages' must be a list of at least one message, not {_type(messages)}.")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise InputError(f"{where}: message {i + 1} must be an object with 'role' and 'content'.")
        return Row("messages", value, where)
    if "prompt" in value or "completion" in value:
        for key in ("prompt", "completion"):
            _check_text(value, key, where)
        return Row("completion", value, where)
    if "text" in value:
        _check_text(value, "text", where)
        return Row("text", value, where)
    keys = ", ".join(repr(key) for key in value) or "nothing"
    raise InputError(f"{where}: has {keys}; a row needs 'text', 'prompt' and 'completion', or 'messages'.")


def _check_text(value: dict[str, Any], key: str, where: str) -> None:
    if key not in value:
        raise InputError(f"{where}: {key!r} is missing; 'prompt' and 'completion' go together.")
    if not isinstance(value[key], str):
        raise InputError(f"{where}: {key!r} must be a string, not {_type(value[key])}.")


def _type(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {str: "a string", dict: "an object", type(None): "null", bool: "a boolean"}.get(type(value), "a number")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and the labels for the loss; a token with the label `IGNORED` is not in the loss."""

    input_ids: list[int]
    labels: list[int]

    def learns(self, task: str) -> bool:
        """Whether the loss has any token. A causal model does not predict the first one, so that one does not count."""
        return any(label != IGNORED for label in self.labels[1 if task == "causal" else 0 :])


def make_batches(
    rows: Iterable[Row], tokenizer: Any, task: str, *, max_length: int, batch_size: int, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
    """Tokenise rows and put them into padded batches.

    Tokens in the loss: every token of `text`; the completion and the end token of `prompt` and `completion`; the
    assistant's turns of `messages` if the chat template marks them, else the whole conversation. For a masked model
    15 % of the tokens of `text` are in the loss, as in the training of BERT (arXiv 1810.04805): of these 80 % are
    replaced by the mask token, 10 % by a random token, and 10 % stay.

    Args:
        rows (iterable of `Row`): examples.
        tokenizer (`transformers.PreTrainedTokenizerBase`): of the model.
        task (`str`): `"causal"`, `"seq2seq"` (prompt to the encoder, completion to the decoder) or `"masked"`.
        max_length (`int`): tokens at which a row is cut off.
        batch_size (`int`): rows per batch.
        seed (`int`): of the masking.

    Returns:
        `tuple[list[dict], list[str]]`: batches with `input_ids`, `attention_mask` and `labels` (int64), and notes
        for the user.

    Raises:
        InputError: a row's form does not go with the task, or no row has a token to learn from.
    """
    encode = _Encoder(tokenizer, task, max_length, seed)
    rows = list(rows)
    kept = [encoded for encoded in map(encode, rows) if encoded.learns(task)]
    if not kept:
        raise InputError(
            f"none of the {len(rows)} rows drawn has a token to learn from within --max-length {max_length}; give "
            "longer texts, shorter prompts or a larger --max-length."
        )
    notes = list(encode.notes)
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept)} of {len(rows)} rows left out: no token to learn from within --max-length "
            f"{max_length}"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return [_padded(kept[i : i + batch_size], pad) for i in range(0, len(kept), batch_size)], notes


class _Encoder:
    def __init__(self, tokenizer: Any, task: str, max_length: int, seed: int) -> None:
        import torch

        self.notes: dict[str, None] = {}  # the keys are the notes; a set would not keep their order
        self._tokenizer, self._task, self._max_length = tokenizer, task, max_length
        self._generator = torch.Generator().manual_seed(seed)
        if task == "masked" and tokenizer.mask_token_id is None:
            raise InputError("the tokenizer of this masked language model has no mask token; set one and save it.")

    def __call__(self, row: Row) -> Encoded:
        if self._task == "masked":
            self._insist(row, "text", "a masked language model learns from 'text' rows")
            return self._masked(self._ids(row.values["text"]))
        if self._task == "seq2seq":
            self._insist(row, "completion", "an encoder-decoder model learns from 'prompt' and 'completion' rows")
            target = self._tokenizer(text_target=row.values["completion"], truncation=True, max_length=self._max_length)
            return Encoded(self._ids(row.values["prompt"]), list(target["input_ids"]))
        if row.form == "messages":
            return self._conversation(row)
        if row.form == "text":
            ids = self._ended(self._ids(row.values["text"]))
            return Encoded(ids, list(ids))
        prompt = self._ids(row.values["prompt"])
        if prompt and prompt[-1] == self._tokenizer.eos_token_id:
            prompt.pop()
        ids = self._ended(prompt + self._ids(row.values["completion"], special=False))
        return Encoded(ids, [IGNORED] * len(prompt) + ids[len(prompt) :])

    def _insist(self, row: Row, form: str, sentence: str) -> None:
        if row.form != form:
            keys = {"completion": "'prompt' and 'completion'"}.get(row.form, repr(row.form))
            raise InputError(f"{row.where}: {sentence}, this one has {keys}.")

    def _ids(self, text: str, special: bool = True) -> list[int]:
        encoded = self._tokenizer(text, truncation=True, max_length=self._max_length, add_special_tokens=special)
        return list(encoded["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` with the end token that a trainer would add, cut off at the largest length."""
        end = self._tokenizer.eos_token_id
        if ids and end is not None and ids[-1] != end:
            ids = [*ids, end]
        return ids[: self._max_length]

    def _conversation(self, row: Row) -> Encoded:
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise InputError(
                f"{row.where}: 'messages' need a chat template and the tokenizer has none; use 'prompt' and "
                "'completion' or 'text' rows, or a model with a chat template."
            )
        marked = tokenizer.is_fast and bool(_GENERATION.search(tokenizer.get_chat_template()))
        try:
            encoded = tokenizer.apply_chat_template(
                row.values["messages"],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=marked,
                truncation=True,
                max_length=self._max_length,
            )
        except Exception as error:  # a template is code by the model's author, and may raise any error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{row.where}: the chat template does not take these messages: {reason}") from error
        ids = list(encoded["input_ids"])
        if not marked:
            self.notes["the chat template does not mark the assistant's turns; the loss is on whole conversations"] = (
                None
            )
            return Encoded(ids, list(ids))
        mask = encoded["assistant_masks"]
        return Encoded(ids, [i if counts else IGNORED for i, counts in zip(ids, mask, strict=True)])

    def _masked(self, ids: list[int]) -> Encoded:
        import torch

        special = self._tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        places = torch.tensor([i for i, fixed in enumerate(special) if not fixed], dtype=torch.long)
        labels = [IGNORED] * len(ids)
        count = max(1, round(MASKED_SHARE * len(places))) if len(places) else 0
        chosen = places[torch.randperm(len(places), generator=self._generator)[:count]].tolist()
        chances = torch.rand(count, generator=self._generator).tolist()
        others = torch.randint(self._tokenizer.vocab_size, (count,), generator=self._generator).tolist()
        ids = list(ids)
        for place, chance, other in zip(chosen, chances, others, strict=True):
            labels[place] = ids[place]
            if chance < 0.8:
                ids[place] = self._tokenizer.mask_token_id
            elif chance < 0.9:
                ids[place] = other
        return Encoded(ids, labels)


def _padded(rows: list[Encoded], pad: int) -> dict[str, torch.Tensor]:
    import torch

    def fill(sequences: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, sequences))
        return torch.tensor([sequence + [value] * (width - len(sequence)) for sequence in sequences])

    return {
        "input_ids": fill([row.input_ids for row in rows], pad),
        "attention_mask": fill([[1] * len(row.input_ids) for row in rows], 0),
        "labels": fill([row.labels for row in rows], IGNORED),
    }
