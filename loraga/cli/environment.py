"""What `loraga env` prints: versions, devices, and whether Triton and the native core can be used on this machine."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from loraga.ops import native_core
from loraga.ops.calibration import file_in_use
from loraga.ops.device_facts import facts_of
from loraga.ops.triton import selection
from loraga.report.report import versions
from loraga.report.text import kernel_lines


def environment() -> dict[str, Any]:
    """Everything that decides which code of loraga runs here, as plain values for JSON.

    Kernels that were never used on a device are checked, which takes seconds where they have to be compiled.

    Returns:
        `dict`: `versions` by library (`None` where one is missing), `platform`, `devices` (a description by name),
        `triton` (`usable`, and `reason` where it is not), `kernels` (for each CUDA device what runs each op, "triton"
        or "torch: " and the reason), `calibration` (for each CUDA device the file of `loraga calibrate` that is in use,
        or `None`), and `native` (`devices`, with `usable` and `reason` for each of them, and `build`, the options that
        it was built with, or `None`).

    Raises:
        ValueError: LORAGA_TRITON is neither 0 nor 1.
    """
    devices = _devices()
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    files = {str(gpu): _text(file_in_use(facts_of(gpu), selection.ops)) for gpu in gpus}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons are part of the result
        kernels = selection.report(gpus)
    native = {name: native_core.why_unavailable(name) for name in devices}
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "platform": platform.platform(),
        "devices": devices,
        "triton": _state(_why_no_triton()),
        "kernels": kernels,
        "calibration": files,
        "native": {
            "devices": {name: _state(reason) for name, reason in native.items()},
            "build": native_core.build_info() if native_core.available() else None,
        },
    }


def describe(found: dict[str, Any]) -> str:
    """The result of `environment` as text."""
    versions_line = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    lines = [versions_line, found["platform"], "devices:"]
    lines += [f"  {name}: {text}" for name, text in found["devices"].items()]
    lines.append(f"Triton kernels: {_yes(found['triton'])}")
    lines += [f"  {line}" for line in kernel_lines(found["kernels"])]
    lines += [f"  {gpu}: chosen by {file}" for gpu, file in found["calibration"].items() if file]
    lines.append("native core:")
    lines += [f"  {name}: {_yes(state)}" for name, state in found["native"]["devices"].items()]
    if found["native"]["build"]:
        built = ", ".join(f"{key} {value}" for key, value in found["native"]["build"].items() if value != "")
        lines.append(f"  built with: {built}")
    return "\n".join(lines)


def _state(reason: str | None) -> dict[str, Any]:
    return {"usable": reason is None, "reason": reason}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _yes(state: dict[str, Any]) -> str:
    return "usable" if state["usable"] else f"not usable: {state['reason']}"


def _devices() -> dict[str, str]:
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.1f} GiB"
    return found


def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed (pip install triton; torch for CUDA brings it)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, so kernels run in the interpreter, which is for tests"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a driver may raise any error, and that is the reason
        return " ".join(str(error).split())
    return None
