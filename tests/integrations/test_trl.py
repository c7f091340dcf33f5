"""Trainers of TRL and of transformers around a started adapter, made before the trainer or by it (`peft_config=`)."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from adapters import weights_of_base
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import loraga

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")

STARTS = ("mirror", "zero-b")
ORDERS = ("model first", "peft_config")
KINDS = ("dpo", "kto", "grpo", "sft")
WITH_REFERENCE = ("dpo", "kto", "grpo")
STEPS = 4
BETA = 0.1  # weight of the reference
ROUNDING = 1e-5  # of logits of size 1 in float32
MOVED = 1e-3  # by how much weights and logits must have changed, so that equality means something
WORDS = ("the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "red", "old", "small", "today", "never", "and")


# ---- a model, its words and its data


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    names = ("<pad>", "<eos>", "<unk>", *WORDS)
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **special)


def base() -> LlamaForCausalLM:
    """The same weights each time, large enough for logits that differ from each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 3 + len(WORDS), (rows, length), generator=generator)


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": (rows := ids(seed=seed)), "labels": rows} for seed in range(2)]


def sentences(count: int, seed: int, length: int = 6) -> list[str]:
    return [" ".join(WORDS[token - 3] for token in row) for row in ids(count, length, seed)]


def rows_of(kind: str, count: int = 4 * STEPS) -> datasets.Dataset:
    prompts, good, bad = (sentences(count, seed) for seed in (10, 11, 12))
    good, bad = ([f" {text}" for text in texts] for texts in (good, bad))  # they are put behind the prompts
    columns = {
        "dpo": {"prompt": prompts, "chosen": good, "rejected": bad},
        "kto": {"prompt": prompts, "completion": good, "label": [index % 2 == 0 for index in range(count)]},
        "grpo": {"prompt": prompts},
        "sft": {"text": good},
    }
    return datasets.Dataset.from_dict(columns[kind])


def cats(completions: list[str], **_) -> list[float]:
    """A reward on which an untrained model's completions differ."""
    return [float(len(set(text.split()) & {"cat", "red", "old", "sees"})) for text in completions]


def trainer_of(kind: str, model, folder: Path, peft_config: LoraConfig | None = None, **options) -> Trainer:
    own = {
        "dpo": {"max_length": 16, "beta": BETA},
        "kto": {"max_length": 16, "beta": BETA},
        "grpo": {"max_completion_length": 6, "num_generations": 4, "beta": BETA},
        "sft": {"max_length": 16},
    }
    shared = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = getattr(trl, f"{kind.upper()}Config")(**shared | own[kind] | options)
    rewards = {"reward_funcs": cats} if kind == "grpo" else {}
    return getattr(trl, f"{kind.upper()}Trainer")(
        model=model,
        args=arguments,
        train_dataset=rows_of(kind),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **rewards,
    )


def lora() -> LoraConfig:
    return tiny.config(task_type="CAUSAL_LM")


def started(model, start: str, config: LoraConfig | None = None, loader=None, **options) -> PeftModel:
    init = loraga.InitConfig(start=start)
    return loraga.fast_init(model, loader or batches(), config, init=init, show_progress_bar=False, **options)


# ---- what is compared


@torch.no_grad()
def logits(model) -> torch.Tensor:
    was = model.training
    found = model.eval()(input_ids=ids(seed=20)).logits
    model.train(was)
    return found


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".default." in name}


def largest(tensors) -> float:
    return max(float(value.abs().max()) for value in tensors)


@contextlib.contextmanager
def references(trainer: Trainer):
    """Logits of each reference that the trainer takes: TRL's switch to it is listened to."""
    module = sys.modules[type(trainer).__module__]
    switch, found = module.use_adapter, []

    @contextlib.contextmanager
    def listening(model, adapter_name):
        with switch(model, adapter_name=adapter_name):
            found.append(logits(model))
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "use_adapter", listening)
        yield found


def trained(kind: str, start: str, order: str, folder: Path) -> SimpleNamespace:
    """A run of a trainer, and what was seen before, meanwhile and afterwards."""
    if order == "model first":
        trainer = trainer_of(kind, started(base(), start, lora()), folder)
    else:
        trainer = trainer_of(kind, base(), folder, peft_config=lora())
        assert started(trainer.model, start) is trainer.model
    first = {"adapter": adapter(trainer.model), "logits": logits(trainer.model)}
    with references(trainer) if kind in WITH_REFERENCE else contextlib.nullcontext([]) as seen:
        trainer.train()
        log = trainer.state.log_history
        # what a further step would compare the trained model with
        if kind in WITH_REFERENCE:
            trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())), None)
    return SimpleNamespace(trainer=trainer, model=trainer.model, first=first, log=log, references=seen, folder=folder)


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    return trained(*request.param, tmp_path_factory.mktemp("run"))


def every(kinds=KINDS):
    cases = [(kind, start, order) for kind in kinds for start in STARTS for order in ORDERS]
    return pytest.mark.parametrize("run", cases, ids=" ".join, indirect=True)


# ---- TRL


@every()
def test_training_moves_a_and_b_and_nothing_else(run):
    after = adapter(run.model)
    assert len(run.log) >= STEPS
    for name, value in run.first["adapter"].items():
        assert largest([after[name] - value]) > MOVED, name
    assert largest([logits(run.model) - run.first["logits"]]) > MOVED
    weights = weights_of_base(run.model)
    for name, value in base().state_dict().items():
        assert torch.equal(weights[name], value), name


@every()
def test_training_begins_at_the_base(run):
    assert largest([run.first["logits"] - logits(base())]) < ROUNDING


@every(WITH_REFERENCE)
def test_reference_is_the_base_before_and_after_training(run):
    assert len(run.references) == STEPS + 1
    for found in run.references:
        assert largest([found - logits(base())]) < ROUNDING
    with run.model.disable_adapter():
        assert torch.equal(logits(run.model), logits(base()))


@every(("dpo",))
def test_first_dpo_loss_is_ln_2(run):
    assert run.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.log[STEPS - 1]["loss"] != pytest.approx(math.log(2), abs=MOVED)


@every(("kto", "grpo"))
def test_first_kl_is_zero(run):
    assert run.log[0]["kl"] == pytest.approx(0, abs=ROUNDING)
    assert any(entry.get("kl", 0) > MOVED for entry in run.log)


@every()
def test_checkpoint_loads_in_plain_peft(run):
    loaded = PeftModel.from_pretrained(base(), run.folder / f"checkpoint-{STEPS}")
    assert set(loaded.peft_config) == {"default"}
    assert largest([logits(loaded) - logits(run.model)]) == 0


@pytest.mark.parametrize("start", STARTS)
def test_dpo_starts_at_ln_2_with_the_defaults_of_trl(start, tmp_path):
    """bfloat16 by autocast and gradient checkpointing: the halves of A and B round alike."""
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1}
    trainer = trainer_of("dpo", base(), tmp_path, peft_config=lora(), **options)
    started(trainer.model, start)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def preference(model, batch) -> torch.Tensor:
    """DPO's loss where the reference is the model itself."""
    scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    scores = scores.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    chosen, rejected = scores.sum(1).chunk(2)
    margin = chosen - rejected
    return -torch.nn.functional.logsigmoid(BETA * (margin - margin.detach())).mean()


def test_a_trainers_own_loss_can_start_its_adapter(tmp_path):
    """Also one that was trained, which TRL switches off for its reference and on again: the gradient is the base's."""
    trainer = trainer_of("dpo", base(), tmp_path, peft_config=lora())
    trainer.train()
    loader = list(trainer.get_train_dataloader())
    started(trainer.model, "zero-b", loader=loader, loss_fn=trainer.compute_loss)
    names = [layer.name for layer in trainer.model.loraga_report.layers]
    gradients = tiny.exact_gradients(base(), names, loader, preference)
    for name, gradient in gradients.items():
        A = trainer.model.base_model.model.get_submodule(name).lora_A["default"].weight.detach().double()
        best = torch.linalg.svdvals(gradient)[: tiny.R].square().sum()
        assert (gradient @ torch.linalg.qr(A.T).Q).square().sum() > 0.99 * best, name


# ---- transformers' Trainer

RESUME = """
import sys
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

base, rows, checkpoint, result = sys.argv[1:]
config = PeftConfig.from_pretrained(checkpoint)
config.inference_mode = False
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
arguments = torch.load(f"{checkpoint}/training_args.bin", weights_only=False)
Trainer(model=model, args=arguments, train_dataset=torch.load(rows)).train(resume_from_checkpoint=checkpoint)
torch.save(model.state_dict(), result)
assert "loraga" not in sys.modules
"""


@pytest.mark.parametrize("start", STARTS)
def test_plain_peft_resumes_to_the_uninterrupted_weights(start, tmp_path):
    """A process that has never heard of loraga goes on from a checkpoint."""
    rows = [{"input_ids": row, "labels": row} for row in ids(4 * STEPS)]
    torch.save(rows, tmp_path / "rows.pt")
    base().save_pretrained(tmp_path / "base")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = started(base(), start, lora())
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    places = ("base", "rows.pt", f"run/checkpoint-{STEPS // 2}", "resumed.pt")
    command = [sys.executable, "-c", RESUME, *(str(tmp_path / place) for place in places)]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    resumed = torch.load(tmp_path / "resumed.pt")
    halfway = load_file(tmp_path / places[2] / "adapter_model.safetensors")
    assert set(resumed) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(resumed[name], value), name
        if "lora_" in name:
            assert largest([halfway[name.replace(".default", "")] - value]) > MOVED
