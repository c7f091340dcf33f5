"""The native core below Python: sanitizers, and the CUDA kernels on emulated threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = ROOT / "tests" / "native"
if not CSRC.is_dir():
    pytest.skip("these tests compile csrc/, which an installed wheel does not carry", allow_module_level=True)
CORES = sorted(path.stem for path in (CSRC / "cpu").glob("*.cpp"))
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-g")


compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C++ compiler on this machine")


def _build(output: Path, *arguments: str | Path) -> Path:
    assert compiler is not None
    command = [compiler, *WARNINGS, f"-I{CSRC / 'include'}", *map(str, arguments), "-o", str(output)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return output


@needs_compiler
@pytest.mark.parametrize("name", CORES)
def test_host_twin_under_address_and_undefined_behaviour_sanitizers(name, tmp_path):
    sanitize = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    sources = (HERE / "host" / f"{name}.cpp", CSRC / "cpu" / f"{name}.cpp")
    program = _build(tmp_path / "host_twin", *sanitize, *sources)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("name", "arguments", "comparisons"),
    [("cholesky", ("1", "2", "9", "32", "41"), 40), ("gradient", (), 60), ("jacobi", ("1", "2", "5", "9"), 8)],
)
def test_cuda_kernel_on_emulated_threads_gives_the_bits_of_the_host_twin(name, arguments, comparisons, tmp_path):
    """A missing barrier is a data race to ThreadSanitizer, wrong bits, or a hang: removing any one of them fails."""
    emulation = HERE / "emulation"
    program = _build(
        tmp_path / "emulated",
        *("-O1", "-fsanitize=thread", "-ffp-contract=off", "-pthread", "-Wno-unknown-pragmas"),
        *(f"-I{emulation}", f"-I{CSRC}", emulation / f"{name}.cpp", CSRC / "cpu" / f"{name}.cpp"),
    )
    command = [str(program), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in ran.stderr:  # more address randomisation than it bears
        ran = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("same bits") == comparisons
