"""Load an adapter as someone would who has PEFT and has never heard of loraga, and write down what it answers.

    python examples/reload_in_plain_peft.py ADAPTER_DIR BATCHES.pt LOGITS.pt

The demo runs this in a process of its own. `import loraga` fails here, so nothing of it can have helped.
"""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import docstrings
import minilm
import torch
from peft import PeftModel
from training import logits_of


def main(adapter_dir: str, batches_file: str, logits_file: str) -> None:
    minilm.quiet()
    # None in sys.modules is Python's own way to say "this module cannot be imported".
    with patch.dict(sys.modules, {"loraga": None}):
        # Another seed than any the demo trains with: the head has to come out of the adapter's files.
        base = minilm.load_model(len(docstrings.MODULES), seed=12345)
        model = PeftModel.from_pretrained(base, adapter_dir)
        torch.save(logits_of(model, torch.load(batches_file, weights_only=True)), logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
