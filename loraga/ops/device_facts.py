"""What is known of a CUDA device before a kernel has run on it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraga._version import __version__

# Triton supports NVIDIA devices from this compute capability on; its compiler may end the process on older ones.
_OLDEST = (8, 0)
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class DeviceFacts:
    """One kind of device, with the software that runs kernels on it.

    Attributes:
        name (`str`): as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        capability (`tuple[int, int]`): compute capability, such as (9, 0).
        driver (`str`): its version.
        torch, loraga (`str`): their versions.
        triton (`str`, *optional*): its version; `None` where it is not installed.
        rocm (`bool`): an AMD device; torch calls those "cuda", too.
        interpreted (`bool`): whether kernels run in Triton's interpreter, which is for tests.
    """

    name: str
    capability: tuple[int, int]
    driver: str
    torch: str
    triton: str | None
    loraga: str = __version__
    rocm: bool = False
    interpreted: bool = False

    @property
    def obstacle(self) -> str:
        """Why kernels are not tried on this device; an empty string if they are."""
        if self.triton is None:
            return "triton is not installed (pip install triton; torch for CUDA brings it)"
        if self.interpreted:
            return "TRITON_INTERPRET=1 is set, so kernels would run in the interpreter, which is for tests"
        if self.rocm:
            return "the kernels are for NVIDIA devices"
        if self.capability < _OLDEST:
            return f"Triton needs compute capability {_dotted(_OLDEST)}, and this device has {_dotted(self.capability)}"
        return ""

    def key(self) -> dict[str, Any]:
        """What a measurement depends on, as plain values for JSON."""
        facts = asdict(self)
        del facts["rocm"], facts["interpreted"]
        return facts | {"capability": _dotted(self.capability)}


@functools.cache
def facts_of(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA device. Triton is not imported."""
    return DeviceFacts(
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        driver=_driver(),
        torch=torch.__version__,
        triton=_triton(),
        rocm=torch.version.hip is not None,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
    )


def _driver() -> str:
    """The version of NVIDIA's driver, or of the CUDA that it supports where the system does not say more."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text())
    except OSError:
        found = None
    if found:
        return found.group()
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _triton() -> str | None:
    try:
        if importlib.util.find_spec("triton") is None:
            return None
        return importlib.metadata.version("triton")
    except ValueError:  # `sys.modules["triton"]` is None
        return None
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        return "unknown"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
