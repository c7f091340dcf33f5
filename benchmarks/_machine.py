"""Where a number was measured: written into every result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# A script's own folder comes first in the import path, and an editable install may be of another checkout: the commit
# that is recorded below must be that of the loraga that runs.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def describe() -> dict[str, str | int]:
    """Commit, command, processor, device and versions."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found: dict[str, str | int] = {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "command": " ".join(["python", *sys.argv]),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    for package in ("torch", "triton", "transformers", "peft", "loraga"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write a result as JSON, or print it where no file is given."""
    text = json.dumps(result, indent=1)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
