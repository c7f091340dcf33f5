"""What is read of a device and of the software on it, without a device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from loraga._version import __version__
from loraga.ops import device_facts

OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (buildd@host)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183  Sun May 12 19:39:15 UTC 2024\n"


@pytest.mark.parametrize(("text", "version"), [(OPEN, "580.159.04"), (CLOSED, "535.183")])
def test_the_driver(tmp_path, monkeypatch, text, version):
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(device_facts, "_DRIVER", file)
    assert device_facts._driver() == version


def test_the_driver_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(device_facts, "_DRIVER", Path("/nowhere/version"))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert device_facts._driver() == "CUDA 13000"


def test_triton(monkeypatch):
    assert device_facts._triton() == importlib.metadata.version("triton")

    def unnamed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unnamed)
    assert device_facts._triton() == "unknown", "a build under another name is one, too"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert device_facts._triton() is None


def test_the_facts_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(device_facts, "_driver", lambda: "580.1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    facts = device_facts.facts_of.__wrapped__(torch.device("cuda", 0))
    assert facts.key() == {
        "name": "NVIDIA L4",
        "capability": "8.9",
        "driver": "580.1",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "loraga": __version__,
    }
    assert facts.obstacle == ""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in device_facts.facts_of.__wrapped__(torch.device("cuda", 0)).obstacle
