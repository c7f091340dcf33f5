"""Shared by all tests: quiet offline libraries, and no uninitialised memory that happens to be zero."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

import pytest
import torch
from transformers.utils import logging

logging.set_verbosity_error()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny random models by family, for the command line."""
    from command_line import tiny_models

    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _deterministic_and_poisoned():
    """A fixed global seed; torch.empty gives NaN, so that an entry nobody wrote shows."""
    torch.manual_seed(0)
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
