"""What nvcc makes of the CUDA kernels, read from the machine code: no spills, no access whose address space it does not
know, and wide loads where they were meant. No GPU is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
if not CSRC.is_dir():
    pytest.skip("these tests compile csrc/, which an installed wheel does not carry", allow_module_level=True)


def _nvcc() -> str | None:
    """The nvcc that CMakeLists.txt would find."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home]
    return next((found for found in [os.environ.get("CUDACXX"), *beside, shutil.which("nvcc")] if found), None)


def _cuobjdump() -> str | None:
    """That of the CUDA toolkit, or the one that Triton brings along."""
    nvcc, triton = _nvcc(), importlib.util.find_spec("triton")
    folders = [Path(nvcc).parent] if nvcc else []
    folders += (
        [Path(home) / "backends" / "nvidia" / "bin" for home in (triton.submodule_search_locations or [])]
        if triton
        else []
    )
    beside = [shutil.which("cuobjdump", path=str(folder)) for folder in folders]
    return next((found for found in [*beside, shutil.which("cuobjdump")] if found), None)


if _nvcc() is None:
    pytest.skip("no nvcc on this machine", allow_module_level=True)
needs_cuobjdump = pytest.mark.skipif(_cuobjdump() is None, reason="no cuobjdump on this machine, to read machine code")

(_LISTED,) = re.findall(r"foreach\(architecture ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
ARCHITECTURES = _LISTED.split()
KERNELS = {"cholesky": 4, "gradient": 36, "jacobi": 3}  # instantiations


@functools.cache
def _known() -> list[str]:
    return subprocess.run([_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def _compiled(source: str, architecture: str) -> tuple[Path, str]:
    """The machine code, and what ptxas says of it."""
    if f"sm_{architecture}" not in _known():
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    cubin = Path(_folder().name) / f"{source}-{architecture}.cubin"
    command = [_nvcc(), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    command += [f"-I{CSRC / 'include'}", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(cubin)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return cubin, ran.stderr


def _accesses(source: str, architecture: str) -> dict[str, Counter[str]]:
    """For each kernel how often it has each memory instruction, such as LDS or LDG.128; LD and ST are generic."""
    cubin, _ = _compiled(source, architecture)
    ran = subprocess.run([_cuobjdump(), "-sass", cubin], capture_output=True, text=True)
    if "Function :" not in ran.stdout:
        pytest.skip(f"{_cuobjdump()} cannot read what this nvcc makes for sm_{architecture}: {ran.stderr}")
    kernels: dict[str, Counter[str]] = {}
    for line in ran.stdout.splitlines():
        if name := re.search(r"Function : (\w+)", line):
            found = kernels[name[1]] = Counter()
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?((?:LD|ST)[GSL]?)(\.\S+)?\s", line):
            width = [part for part in (code[2] or "").split(".") if part in ("64", "128")]
            found[".".join([code[1], *width])] += 1
    assert len(kernels) == KERNELS[source]
    return kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_no_kernel_spills(source, architecture):
    _, said = _compiled(source, architecture)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == KERNELS[source], f"ptxas reported something else:\n{said}"
    assert set(spills) == {("0", "0", "0")}, said


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_the_address_space_of_every_access_is_known(source, architecture):
    for name, accesses in _accesses(source, architecture).items():
        generic = {code: count for code, count in accesses.items() if code.partition(".")[0] in ("LD", "ST")}
        assert not generic, name
        if source != "gradient":
            assert {"LDS", "STS", "LDG", "STG"} <= {code.partition(".")[0] for code in accesses}, name


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_jacobi_keeps_its_arrays_where_the_kernel_says(architecture):
    """All numbers of 8 bytes are those of the arrays and of vectors in shared memory; core and results have 4."""
    in_global = {
        re.search(r"ILi(\d)E", name)[1]: accesses["LDG.64"] + accesses["STG.64"]
        for name, accesses in _accesses("jacobi", architecture).items()
    }
    assert in_global["0"] > in_global["1"] > in_global["2"] == 0


@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_order_are_moved_in_16_bytes(architecture):
    for name, accesses in _accesses("gradient", architecture).items():
        in_order = "_in_order_kernel" in name
        assert bool(accesses["LDG.128"]) == in_order, name
        assert bool(accesses["STG.128"]) == (in_order and "add_" in name), name
