"""Where a number was measured: written into every result file."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# A script's own folder comes first in the import path, and an editable install may be of another checkout: the commit
# that is recorded below must be that of the loraga that runs.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SETTINGS = re.compile("LORAGA_|MALLOC_|GLIBC_TUNABLES|OMP_|MKL_|PYTORCH_")


@functools.cache
def said(*command: str) -> str:
    """What a program prints, or "unknown" where it is missing or fails: a lent machine may have no git."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """Of the sources here, "-dirty" where they were changed since."""
    found = said("git", "rev-parse", "HEAD")
    changed = said("git", "status", "--porcelain", "--untracked-files=no")
    return f"{found}-dirty" if changed and found != "unknown" else found


def describe() -> dict[str, str | int]:
    """Commit, command, processor, device and versions, and what in the environment changes memory and threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found: dict[str, str | int] = {
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if settings := [f"{key}={value}" for key, value in sorted(os.environ.items()) if SETTINGS.match(key)]:
        found["environment"] = " ".join(settings)
    if torch.cuda.is_available():
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or "", "driver": driver}
    for package in ("torch", "triton", "transformers", "peft", "loraga"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write a result as JSON, or print it where no file is given. Whoever reads the file sees all of one result.

    Scripts save what they have after every row: on a lent machine the last one may be cut short.
    """
    text = json.dumps(result, indent=1)
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        unfinished.write_text(text + "\n")
        unfinished.replace(path)
