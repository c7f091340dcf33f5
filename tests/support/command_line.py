"""`loraga init` in this process, tiny models of each family and rows of each form for it."""

from __future__ import annotations

import json

import tokenizers
import torch

from loraga.cli.main import main

WORDS = [f"w{i}" for i in range(60)]


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "user", "assistant", ":"]


TEMPLATE = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}"


QUIET = ("--rank", "2", "--batch-size", "2", "--max-batches", "2", "--device", "cpu", "--quiet")


def save_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def tiny_models(folder):
    """Folders of tiny random models by family."""
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    llama = transformers.LlamaConfig(**size, **width, num_key_value_heads=2, max_position_embeddings=64)
    bert = transformers.BertConfig(**size, **width, max_position_embeddings=64)
    t5 = transformers.T5Config(
        **size, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, dropout_rate=0.1
    )
    made = {
        "llama": transformers.LlamaForCausalLM(llama),
        "bert": transformers.BertForMaskedLM(bert),
        "t5": transformers.T5ForConditionalGeneration(t5),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = folder / name
        model.save_pretrained(folders[name])
        save_tokenizer(folders[name])
    return folders


def row(form, i):
    words = [" ".join(f"w{(i * j + k) % 60}" for k in range(6)) for j in (3, 7)]
    if form == "text":
        return {"text": " ".join(words)}
    if form == "completion":
        return {"prompt": words[0], "completion": words[1]}
    roles = ("user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]}


def write_data(path, form="text", rows=8):
    path.write_text("".join(json.dumps(row(form, i)) + "\n" for i in range(rows)))
    return path


def run(*arguments):
    """`loraga init`, in this process."""
    return main(["init", *map(str, arguments)])


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
